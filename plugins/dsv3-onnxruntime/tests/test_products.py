"""The linear family against float64, within the bounds of float32 accumulation."""

import pytest
import torch
from budgets import DTYPES, KINDS, SCHEMES, draw, prepared, real_weight, within
from dsv3_onnxruntime import kernels
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3 import ops
from dsv3.plugin import Prepared
from dsv3.quant import SCHEMES as FACTS


def operands(x: torch.Tensor, w: Prepared) -> tuple[torch.Tensor, torch.Tensor]:
    """What meets in the product, in float64."""
    a = x.double()
    if FACTS[w.quant].activations == "fp8":
        q, s = ops.act_quant(x, dtype=str(w.tensors["weight"].dtype).removeprefix("torch."), scale_fmt=w.scale_fmt)
        a = q.double() * s.double().repeat_interleave(128, dim=-1)[:, : x.shape[1]]
    elif FACTS[w.quant].activations == "int8":
        q, s = ops.quant_int8(x)
        a = q.double() * s.double()
    return a, real_weight(w)


def check(x: torch.Tensor, w: Prepared) -> float:
    before = x.clone()
    found = kernels.quant_linear(x=x, w=w)
    assert found.dtype == x.dtype and torch.equal(before, x)
    a, b = operands(x, w)
    return within(found, a @ b.T, a.abs() @ b.abs().T, x.shape[1])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("quant", SCHEMES)
def test_every_scheme_on_every_distribution(quant: str, kind: str) -> None:
    for dtype in DTYPES:
        for n, k in ((576, 256), (100, 129)):
            check(draw(kind, 5, k).to(dtype), prepared(quant, (n, k), dtype=dtype))


@given(st.sampled_from(SCHEMES), st.sampled_from((0, 1, 2, 63, 65)), st.integers(1, 300), st.integers(1, 300), st.booleans())
@settings(max_examples=40, deadline=None, derandomize=True)
def test_any_shape(quant: str, t: int, n: int, k: int, single: bool) -> None:
    check(draw("normal", t, k).to(DTYPES[single]), prepared(quant, (n, k)))


@pytest.mark.parametrize("quant", SCHEMES)
def test_long_sums_stay_within_float32(quant: str) -> None:
    check(draw("positive", 2, 7168), prepared(quant, (3, 7168)))


def test_rows_may_be_strided_and_scales_powers_of_two() -> None:
    x = draw("normal", 6, 256).to(torch.bfloat16)
    w = prepared("fp8-w8a8", (64, 128))
    check(x[:, 128:], w)
    check(x[::2, :128], w)
    check(x[:, :128], Prepared(w.layout, w.quant, w.shape, w.tensors, "ue8m0"))


def test_int8_sums_are_exact() -> None:
    k = 8192
    codes = torch.full((2, k), 127, dtype=torch.int8)
    codes[1, 1:] = -127
    w = Prepared("canonical", "int8-w8a8", (2, k), {"weight": codes, "scale": torch.ones(2, 1)})
    found = kernels.quant_linear(x=torch.full((1, k), 127.0), w=w)
    exact = codes.double().sum(dim=1) * 127
    assert torch.equal(found[0], exact.float())


def test_linear_adds_its_bias_and_takes_other_weight_types() -> None:
    for dtype in DTYPES:
        x, weight, bias = draw("normal", 3, 100).to(dtype), draw("normal", 129, 100, seed=1), draw("normal", 129).to(dtype)
        for w in (weight.to(dtype), weight):
            wanted = x.double() @ w.double().T + bias.double()
            size = x.double().abs() @ w.double().abs().T + bias.double().abs()
            within(kernels.linear(x=x, weight=w, bias=bias), wanted, size, 101)
        assert kernels.linear(x=x[:0], weight=weight).shape == (0, 129)


def test_router_logits_are_float32() -> None:
    x, gate = draw("outliers", 4, 256).to(torch.bfloat16), draw("normal", 17, 256)
    found = kernels.router_gemm(x=x, weight=gate)
    assert found.dtype == torch.float32
    within(found, x.double() @ gate.double().T, x.double().abs() @ gate.double().abs().T, 256)


@pytest.mark.parametrize("dtype", DTYPES)
def test_absorbed_products_take_strided_views(dtype: torch.dtype) -> None:
    kv_b = draw("normal", 3, 24 + 16, 40).to(dtype)
    w_uk, w_uv = kv_b[:, :24], kv_b[:, 24:].transpose(1, 2)
    q = draw("outliers", 5, 3, 64).to(dtype)
    for x, w in ((q[..., :24], w_uk), (q[..., 24:], w_uv)):
        wanted = torch.einsum("tha,hac->thc", x.double(), w.double())
        size = torch.einsum("tha,hac->thc", x.double().abs(), w.double().abs())
        within(kernels.bmm(x=x, weight=w), wanted, size, x.shape[2])
        assert kernels.bmm(x=x[:0], weight=w).shape == (0, *wanted.shape[1:])


@pytest.mark.parametrize("dtype", DTYPES)
def test_mtp_combine_puts_the_embedding_first(dtype: torch.dtype) -> None:
    d = 96
    e, h = draw("normal", 4, d).to(dtype), draw("outliers", 4, d, seed=1).to(dtype)
    enorm, hnorm, proj = (draw("normal", *s, seed=i).to(dtype) for i, s in enumerate(((d,), (d,), (d, 2 * d))))
    both = torch.cat([ops.rms_norm(e.double(), enorm.double(), 1e-6), ops.rms_norm(h.double(), hnorm.double(), 1e-6)], 1)
    found = kernels.mtp_combine(embedding=e, hidden=h, enorm=enorm, hnorm=hnorm, eh_proj=proj, eps=1e-6)
    within(found, both @ proj.double().T, both.abs() @ proj.double().abs().T, 2 * d)
