"""Attention over packed sequences against float64."""

import pytest
import torch
from budgets import DTYPES, UNIT, draw
from dsv3_onnxruntime import kernels
from dsv3_onnxruntime.kernels import attention
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3 import ops

NAN = float("nan")


def packed(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *torch.tensor(lengths, dtype=torch.int64).cumsum(0).tolist()], dtype=torch.int32)


def check(q, k, v, nq, nk, causal: bool, scale: float = 0.2) -> None:  # type: ignore[no-untyped-def]
    cu_q, cu_k = packed(nq), packed(nk)
    common = {"cu_q": cu_q, "cu_k": cu_k, "max_q": max(nq), "max_k": max(nk), "scale": scale, "causal": causal}
    o, lse = kernels.mla_prefill(q=q, k=k, v=v, **common)
    assert o.dtype == q.dtype and lse.dtype == torch.float32
    wanted, wanted_lse = ops.mla_prefill(q=q.double(), k=k.double(), v=v.double(), **common)
    rows = int(cu_q[-1])
    size, _ = ops.mla_prefill(q=q.double(), k=k.double(), v=v.double().abs(), **common)
    products = torch.einsum("qhd,khd->hqk", q[:rows].double().abs(), k.double().nan_to_num().abs()) * scale
    biggest = float(products.max()) if products.numel() else 0.0
    # an error of the scores, themselves sums over D, is an error of every probability
    spread = 2.0**-24 * (8 + 4 * biggest)
    seen = ~wanted[:rows].isnan()
    assert torch.equal(~o[:rows].isnan(), seen)
    error = ((o[:rows].double() - wanted[:rows]).abs() - UNIT[q.dtype] * wanted[:rows].abs() - spread * size[:rows])[seen]
    assert not error.numel() or float(error.max()) <= 1e-35
    torch.testing.assert_close(lse[:, :rows].double(), wanted_lse[:, :rows], rtol=4 * 2.0**-24, atol=spread, equal_nan=True)


def tensors(nq: list[int], nk: list[int], dtype: torch.dtype, kind: str = "normal", heads: int = 2):  # type: ignore[no-untyped-def]
    q, k = draw(kind, sum(nq), heads, 24).to(dtype), draw(kind, sum(nk), heads, 24, seed=1).to(dtype)
    return q, k, draw("normal", sum(nk), heads, 30).to(dtype)[..., 14:]


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=4), st.booleans(), st.booleans())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_any_lengths(lengths: list[tuple[int, int]], causal: bool, single: bool) -> None:
    nq, nk = [a for a, _ in lengths], [b for _, b in lengths]
    check(*tensors(nq, nk, DTYPES[single]), nq, nk, causal)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_long_sequences_and_large_scores(dtype: torch.dtype, causal: bool) -> None:
    nq, nk = [130, 1, 7], [130, 257, 70]
    check(*tensors(nq, nk, dtype), nq, nk, causal)
    check(*tensors(nq, nk, dtype, "outliers"), nq, nk, causal, scale=1.0)
    check(*tensors(nq, nk, dtype, "zeros"), nq, nk, causal)


@pytest.mark.parametrize("causal", [True, False])
def test_slices_of_queries_are_the_same_attention(monkeypatch: pytest.MonkeyPatch, causal: bool) -> None:
    monkeypatch.setattr(attention, "MOST_SCORES", 2 * 3 * 40)
    for nq, nk in (([40, 5], [40, 9]), ([12], [40]), ([12, 3], [4, 0])):
        check(*tensors(nq, nk, torch.float32), nq, nk, causal)


def test_what_a_query_must_not_see_may_be_nan() -> None:
    nq, nk = [4, 3], [6, 3]
    for which in (1, 2):
        parts = list(tensors(nq, nk, torch.float32))
        parts[which] = parts[which].clone()
        parts[which][4] = NAN  # seen by the last two queries of the first sequence
        check(*parts, nq, nk, True)


def test_rows_beyond_the_last_sequence_are_not_read() -> None:
    q, k, v = (draw("normal", 9, 2, 8) for _ in range(3))
    for t in (q, k, v):
        t[5:] = NAN
    check(q, k, v, [2, 3], [1, 4], True)
    check(q, k, v, [2, 3], [1, 4], False)
