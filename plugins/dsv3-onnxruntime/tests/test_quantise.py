"""Codes and scales must be those of the reference, bit for bit."""

import pytest
import torch
from budgets import DTYPES, KINDS, draw, prepared, within
from dsv3_onnxruntime import kernels
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3 import ops

ENCODINGS = ("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2")


def same(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert found.dtype == wanted.dtype and found.shape == wanted.shape
    if found.dtype.is_floating_point:
        numbers = ~wanted.float().isnan()
        assert torch.equal(found.float().isnan(), ~numbers)
        found, wanted = found.float()[numbers], wanted.float()[numbers]
        assert torch.equal(torch.signbit(found), torch.signbit(wanted))
    assert torch.equal(found, wanted)


def check(x: torch.Tensor, **how: object) -> None:
    for found, wanted in zip(kernels.act_quant(x=x, **how), ops.act_quant(x, **how), strict=True):
        same(found, wanted)


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("scale_fmt", ["float32", "ue8m0"])
@pytest.mark.parametrize("kind", KINDS)
def test_act_quant(kind: str, scale_fmt: str, encoding: str) -> None:
    for dtype in DTYPES:
        for t, k, group in ((0, 128, 128), (1, 256, 128), (4, 129, 128), (3, 100, 32)):
            check(draw(kind, t, k).to(dtype), group=group, dtype=encoding, scale_fmt=scale_fmt)


def test_ties_saturation_and_floors() -> None:
    codes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    ties = torch.cat([(codes[:-1] + codes[1:]) / 2, torch.tensor([448.0])])
    check(torch.stack([ties, -ties]))
    check(torch.zeros(2, 128), amax_floor=0.0)
    check(torch.zeros(2, 128), amax_floor=0.0, scale_fmt="ue8m0")
    powers = 2.0 ** torch.arange(-12, 16).float()
    check(448 * powers[:, None] * torch.ones(1, 4), scale_fmt="ue8m0")
    check(448 * powers[:, None] * torch.full((1, 4), 1 + 2.0**-23), scale_fmt="ue8m0")
    check(448 * powers[:, None] * torch.full((1, 4), 1 - 2.0**-24), scale_fmt="ue8m0")


def test_a_nan_stays_in_its_group() -> None:
    x = draw("normal", 3, 300)
    x[1, 130] = float("nan")
    check(x)
    q, _ = kernels.act_quant(x=x)
    assert int(q.float().isnan().sum()) == 128


@given(st.integers(1, 4), st.integers(1, 200), st.sampled_from((1e-30, 1e-4, 1.0, 1e30)), st.integers(0, 9))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_quant_int8(t: int, k: int, size: float, seed: int) -> None:
    x = draw("normal", t, k, seed=seed) * size
    for found, wanted in zip(kernels.quant_int8(x=x), ops.quant_int8(x), strict=True):
        same(found, wanted)


def test_quant_int8_rounds_half_to_even_and_never_gives_minus_128() -> None:
    x = torch.cat([torch.arange(-127, 127) + 0.5, torch.tensor([127.0, -127.0])])[None]
    for found, wanted in zip(kernels.quant_int8(x=x), ops.quant_int8(x), strict=True):
        same(found, wanted)
    for found, wanted in zip(kernels.quant_int8(x=x * 0), ops.quant_int8(x * 0), strict=True):
        same(found, wanted)


@pytest.mark.parametrize("shape", [(128, 256), (576, 128), (100, 129), (129, 300)])
def test_dequant_block_and_scaled_products(shape: tuple[int, int]) -> None:
    w = prepared("fp8-w8a8", shape).tensors
    for name in ("float32", "bfloat16"):
        same(kernels.dequant_block(**w, dtype=name), ops.dequant_block(**w, dtype=name))
        q, s = ops.act_quant(draw("outliers", 5, shape[1]))
        found = kernels.block_scaled_mm(a=q, a_scale=s, b=w["weight"], b_scale=w["scale"], out_dtype=name)
        a = q.double() * s.double().repeat_interleave(128, 1)[:, : shape[1]]
        b = ops.dequant_block(**w, dtype="float64")
        within(found, a @ b.T, a.abs() @ b.abs().T, shape[1])
        i = prepared("int8-w8a8", shape).tensors
        q, s = ops.quant_int8(draw("outliers", 5, shape[1]))
        found = kernels.int8_scaled_mm(a=q, a_scale=s, b=i["weight"], b_scale=i["scale"], out_dtype=name)
        same(found, ops.int8_scaled_mm(q, s, i["weight"], i["scale"], name))


def test_every_fp8_code_is_decoded_exactly() -> None:
    for encoding in ENCODINGS:
        codes = torch.arange(256, dtype=torch.uint8).view(getattr(torch, encoding)).view(2, 128)
        scale = torch.tensor([[0.75]])
        same(kernels.dequant_block(weight=codes, scale=scale, dtype="float32"), codes.float() * 0.75)
