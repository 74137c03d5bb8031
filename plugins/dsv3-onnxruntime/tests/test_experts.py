"""The mixture of experts, whole and by products."""

import pytest
import torch
from budgets import DTYPES, SCHEMES, UNIT, draw, prepared, real_weight, within
from dsv3_onnxruntime import kernels
from hypothesis import given, settings
from hypothesis import strategies as st
from test_products import operands

from dsv3 import ops
from dsv3.ops.experts import expert_weight

NAN = float("nan")


def choices(t: int, experts: int, k: int, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    rows = [torch.randperm(experts, generator=g)[:k] for _ in range(t)]
    return torch.stack(rows).int() if rows else torch.zeros(0, k, dtype=torch.int32)


def check(x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, quant: str, inner: int = 64, experts: int = 5) -> None:
    """Against the decomposition in float64. Activations quantised in between may land on the neighbouring code where
    float32 and float64 differ: the bound of those schemes is that of one code."""
    w13, w2 = prepared(quant, (experts, 2 * inner, x.shape[1])), prepared(quant, (experts, x.shape[1], inner), seed=1)
    kept = x.clone(), weights.clone(), ids.clone()
    found = kernels.fused_experts(x=x, weights=weights, ids=ids, w13=w13, w2=w2)
    assert found.dtype == x.dtype
    for before, after in zip(kept, (x, weights, ids), strict=True):
        assert torch.equal(before.nan_to_num(), after.nan_to_num())
    wanted = ops.fused_experts(x.double(), weights.double(), ids, w13, w2)
    rows = (ids >= 0).any(dim=1)
    assert torch.equal(found[~rows], torch.zeros_like(found[~rows]))
    found, wanted = found[rows].double(), wanted[rows]
    if not found.numel():
        return
    code = {"fp8-w8a8": 2.0**-4, "int8-w8a8": 2.0**-7}.get(quant, 0.0)
    size = wanted.square().mean(dim=1, keepdim=True).sqrt()
    bound = UNIT[x.dtype] * wanted.abs() + (1e-5 + 0.2 * code) * size + 1e-30
    worst = float(((found - wanted).abs() / bound).max())
    assert worst <= 1, f"{quant}: error is {worst:.3g} times its bound"


@pytest.mark.parametrize("quant", SCHEMES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_decode_prefill_and_nothing(quant: str, dtype: torch.dtype) -> None:
    for t, k in ((0, 2), (1, 2), (1, 5), (9, 1), (33, 3)):
        check(draw("outliers", t, 128).to(dtype), draw("positive", t, k), choices(t, 5, k), quant)
    check(draw("normal", 4, 129).to(dtype), draw("positive", 4, 2), choices(4, 5, 2), quant, inner=50)


@given(st.integers(0, 12), st.integers(1, 5), st.booleans(), st.integers(0, 50))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_absent_experts_contribute_nothing_even_nan(t: int, k: int, wide: bool, seed: int) -> None:
    ids = choices(t, 5, k, seed)
    x, weights = draw("normal", t, 64, seed=seed), draw("normal", t, k, seed=seed)
    absent = draw("normal", t, k, seed=seed + 1) > 0
    ids[absent], weights[absent] = -1, NAN
    x[(ids < 0).all(dim=1)] = NAN
    check(x, weights, ids.long() if wide else ids, "none")


def test_all_tokens_on_one_expert_and_all_elsewhere() -> None:
    x, weights = draw("normal", 70, 64), draw("positive", 70, 1)
    check(x, weights, torch.full((70, 1), 3, dtype=torch.int32), "fp8-w8a16")
    check(x, weights * NAN, torch.full((70, 1), -1, dtype=torch.int32), "fp8-w8a16")


def test_a_nan_token_spoils_its_own_row_only() -> None:
    x, ids, weights = draw("normal", 6, 64), choices(6, 5, 2), draw("positive", 6, 2)
    w13, w2 = prepared("int8-w8a16", (5, 64, 64)), prepared("int8-w8a16", (5, 64, 32), seed=1)
    clean = kernels.fused_experts(x=x, weights=weights, ids=ids, w13=w13, w2=w2)
    x[2] = NAN
    found = kernels.fused_experts(x=x, weights=weights, ids=ids, w13=w13, w2=w2)
    assert found[2].isnan().all()
    others = torch.arange(6) != 2
    torch.testing.assert_close(found[others], clean[others])


@pytest.mark.parametrize("quant", SCHEMES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_grouped_linear(quant: str, dtype: torch.dtype) -> None:
    for n, k in ((128, 256), (100, 129)):
        w = prepared(quant, (4, n, k))
        for bounds, m in (
            ((0, 2, 2, 5, 7), 9),
            ((0, 0, 0, 0, 0), 3),
            ((0, 3, 3, 3, 3), 3),
            ((0, 0, 0, 0, 1), 1),
            ((0,) * 5, 0),
        ):
            x = draw("outliers", m, k).to(dtype)
            x[bounds[-1] :] = NAN
            for offsets in (torch.tensor(bounds), torch.tensor(bounds, dtype=torch.int32)):
                found = kernels.grouped_linear(x=x, w=w, offsets=offsets)
                assert torch.equal(found[bounds[-1] :], torch.zeros(m - bounds[-1], n, dtype=dtype))
                for e in range(4):
                    rows = slice(bounds[e], bounds[e + 1])
                    one = expert_weight(w, e)
                    a, b = operands(x[rows], one)
                    assert torch.equal(b, real_weight(one))
                    within(found[rows], a @ b.T, a.abs() @ b.abs().T, k)
