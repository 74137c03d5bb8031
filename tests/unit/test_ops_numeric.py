"""Number formats: FP8 against ml_dtypes, INT8 and INT4 exactly, over codes, ties and saturation."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3 import ops
from dsv3.errors import OperatorError
from dsv3.plugin import Prepared
from dsv3.quant import SCHEMES, canonical, dequantize, quantize
from dsv3.quant.fp8 import decode, power_of_two_at_least, quantize_block
from dsv3.quant.int4 import pack, unpack

FORMATS = {"float8_e4m3fn": (ml_dtypes.float8_e4m3fn, 448.0), "float8_e4m3fnuz": (ml_dtypes.float8_e4m3fnuz, 224.0)}


def _codes(dtype: str) -> torch.Tensor:
    return torch.arange(256, dtype=torch.uint8).view(getattr(torch, dtype))


@pytest.mark.parametrize("dtype", FORMATS)
def test_every_code_decodes_as_in_ml_dtypes(dtype: str) -> None:
    wanted = np.arange(256, dtype=np.uint8).view(FORMATS[dtype][0]).astype(np.float32)
    for repeat in (1, 100):  # below and above the size where a table is used
        found = decode(_codes(dtype).repeat(repeat), torch.float32).numpy()
        np.testing.assert_array_equal(found, np.tile(wanted, repeat))


def _act_quant_numpy(x: np.ndarray, group: int, dtype: str, ue8m0: bool, floor: float) -> tuple[np.ndarray, np.ndarray]:
    """The contract's formula in numpy."""
    format_, largest = FORMATS[dtype]
    t, k = x.shape
    q, scales = np.zeros((t, k), np.float32), np.zeros((t, -(-k // group)), np.float32)
    for g in range(scales.shape[1]):
        part = x[:, g * group : (g + 1) * group]
        scale = np.maximum(np.abs(part).max(1), np.float32(floor)) / np.float32(largest)
        if ue8m0:
            scale = np.exp2(np.ceil(np.log2(scale.astype(np.float64)))).astype(np.float32)
        scales[:, g] = scale
        ratio = np.clip(part / scale[:, None], -largest, largest)
        q[:, g * group : (g + 1) * group] = ratio.astype(format_).astype(np.float32)
    return q, scales


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 5), st.integers(1, 300), st.sampled_from([32, 128]), st.sampled_from(sorted(FORMATS)), st.booleans(),
    st.sampled_from([1e-6, 1.0, 1e4]), st.integers(0, 2**31),
)  # fmt: skip
def test_act_quant_is_the_formula(t: int, k: int, group: int, dtype: str, ue8m0: bool, size: float, seed: int) -> None:
    x = (np.random.default_rng(seed).standard_normal((t, k)) * size).astype(np.float32)
    q, scale = ops.act_quant(torch.from_numpy(x), group, dtype, "ue8m0" if ue8m0 else "float32")
    wanted_q, wanted_scale = _act_quant_numpy(x, group, dtype, ue8m0, 1e-4)
    np.testing.assert_array_equal(scale.numpy(), wanted_scale)
    np.testing.assert_array_equal(q.float().numpy(), wanted_q)


@pytest.mark.parametrize("dtype", FORMATS)
def test_act_quant_rounds_ties_to_even(dtype: str) -> None:
    """With scale 1, every midpoint between neighbouring codes."""
    largest = FORMATS[dtype][1]
    values = _codes(dtype).float()
    values = values[values.isfinite() & (values.abs() <= largest)].unique()
    middles = (values[1:] + values[:-1]) / 2
    x = torch.cat((torch.tensor([largest]), middles))[None]
    q, scale = ops.act_quant(x, group=x.shape[1], dtype=dtype)
    assert scale.item() == 1.0
    wanted = x.numpy().astype(FORMATS[dtype][0]).astype(np.float32)
    np.testing.assert_array_equal(q.float().numpy(), wanted)


def test_act_quant_edges() -> None:
    zero, scale = ops.act_quant(torch.zeros(2, 130))
    assert (zero.float() == 0).all()
    assert (scale > 0).all() and scale.isfinite().all()
    x = torch.ones(2, 256)
    x[0, 3] = float("nan")
    q, _ = ops.act_quant(x)
    assert q[0, :128].float().isnan().all()
    assert not q[0, 128:].float().isnan().any() and not q[1].float().isnan().any()
    for quantise in (ops.act_quant, ops.quant_int8):
        q, scale = quantise(torch.zeros(1, 4), amax_floor=0.0)
        assert (q.float() == 0).all() and (scale == 0).all()
    q, scale = ops.act_quant(torch.full((1, 4), 3.0), scale_fmt="ue8m0")
    assert scale.item() == 2.0**-7  # 3 / 448 = 0.0067, up to 0.0078
    for wrong in ({"dtype": "float16"}, {"scale_fmt": "e8"}, {"group": 0}, {"amax_floor": -1.0}):
        with pytest.raises(OperatorError):
            ops.act_quant(torch.ones(1, 4), **wrong)


@given(st.integers(-120, 120), st.booleans())
def test_power_of_two_rounds_up_exactly(exponent: int, above: bool) -> None:
    x = torch.tensor([2.0**exponent])
    if above:
        x = torch.nextafter(x, torch.tensor([float("inf")]))
    assert power_of_two_at_least(x).item() == 2.0 ** (exponent + above)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 300), st.integers(1, 300), st.integers(0, 2**31))
def test_dequant_block_is_the_formula_on_ragged_shapes(n: int, k: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 256, (n, k), dtype=np.uint8)
    codes[(codes & 0x7F) == 0x7F] = 0
    scale = rng.uniform(0.001, 3, (-(-n // 128), -(-k // 128))).astype(np.float32)
    weight = torch.from_numpy(codes).view(torch.float8_e4m3fn)
    rows, cols = np.indices((n, k))
    wanted = codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale[rows // 128, cols // 128]
    np.testing.assert_array_equal(ops.dequant_block(weight, torch.from_numpy(scale), "float32").numpy(), wanted)
    bf16 = ops.dequant_block(weight, torch.from_numpy(scale))
    np.testing.assert_array_equal(bf16.float().numpy(), wanted.astype(ml_dtypes.bfloat16).astype(np.float32))


def test_the_576_rows_of_kv_a_are_five_blocks_of_128() -> None:
    codes = torch.ones(576, 256).to(torch.float8_e4m3fn)
    scale = torch.arange(1.0, 11.0).view(5, 2)
    found = ops.dequant_block(codes, scale, "float32")
    assert found[511, 0] == 7 and found[512, 0] == 9 and found[575, 255] == 10


def test_fn_to_fnuz_is_exact_over_all_codes_and_refuses_nan() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    finite = codes[(codes & 0x7F) != 0x7F]
    weight = finite.view(torch.float8_e4m3fn)[None]
    converted, scale = ops.fn_to_fnuz(weight, torch.ones(1, 2))
    assert torch.equal(converted.float() * scale[0, 0], weight.float())
    assert (converted.view(torch.uint8) != 0x80).all()
    for shape in ((254,), (2, 127), (1, 2, 127)):
        turned, doubled = ops.fn_to_fnuz(weight.view(shape), torch.ones([1] * len(shape)))
        assert turned.shape == shape and (doubled == 2).all()
    for code in (0x7F, 0xFF):
        bad = torch.tensor([[code]], dtype=torch.uint8).view(torch.float8_e4m3fn)
        with pytest.raises(OperatorError, match="1 NaN codes"):
            ops.fn_to_fnuz(bad, torch.ones(1, 1))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 6), st.integers(1, 200), st.sampled_from([0.0, 1e-12, 1.0, 1e5]), st.integers(0, 2**31))
def test_quant_int8_is_symmetric_and_never_128(t: int, k: int, size: float, seed: int) -> None:
    x = (np.random.default_rng(seed).standard_normal((t, k)) * size).astype(np.float32)
    q, scale = ops.quant_int8(torch.from_numpy(x))
    wanted = np.maximum(np.abs(x).max(1, keepdims=True), np.float32(1e-10)) / np.float32(127)
    np.testing.assert_array_equal(scale.numpy(), wanted)
    np.testing.assert_array_equal(q.numpy(), np.clip(np.rint(x / wanted), -127, 127).astype(np.int8))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 5), st.integers(1, 5000), st.integers(1, 9), st.integers(0, 2**31))
def test_int8_scaled_mm_is_exact_in_integers(t: int, k: int, n: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = rng.integers(-127, 128, (t, k), dtype=np.int8), rng.integers(-127, 128, (n, k), dtype=np.int8)
    one = lambda rows: torch.ones(rows, 1)  # noqa: E731
    found = ops.int8_scaled_mm(torch.from_numpy(a), one(t), torch.from_numpy(b), one(n), "float64")
    np.testing.assert_array_equal(found.numpy(), (a.astype(np.int64) @ b.astype(np.int64).T).astype(np.float64))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 4), st.integers(1, 300), st.integers(0, 2**31))
def test_int4_packing_is_exact(n: int, k: int, seed: int) -> None:
    codes = torch.from_numpy(np.random.default_rng(seed).integers(-8, 8, (n, k), dtype=np.int8))
    packed = pack(codes)
    assert packed.shape == (n, -(-k // 2))
    assert torch.equal(unpack(packed, k), codes)
    assert int(packed[0, 0] & 0xF) == int(codes[0, 0]) + 8  # low nibble first


# Relative to the largest weight of a row's group or block: half a step of each format.
STEPS = {"fp8-w8a16": 2**-4, "int8-w8a16": 0.5 / 127, "int4-w4a16": 0.5 / 7, "none": 0.0}


@pytest.mark.parametrize("quant", STEPS)
@pytest.mark.parametrize("shape", [(1, 1), (130, 257), (64, 128)])
def test_schemes_round_within_half_a_step(quant: str, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    weight = torch.randn(shape)
    weight[0] = 0
    tensors = quantize(weight, quant)  # type: ignore[arg-type]
    wanted = canonical(quant, shape, torch.float32, "meta")  # type: ignore[arg-type]
    assert {k: (t.shape, t.dtype) for k, t in tensors.items()} == {k: (t.shape, t.dtype) for k, t in wanted.items()}
    back = dequantize(Prepared("canonical", quant, shape, tensors), torch.float32)  # type: ignore[arg-type]
    assert (back - weight).abs().max() <= STEPS[quant] * weight.abs().max() * 1.001
    assert (back[0] == 0).all()
    assert set(SCHEMES) >= set(STEPS)


def test_fp8_quantisation_is_stable_from_the_second_step_on() -> None:
    torch.manual_seed(0)
    weight = torch.randn(200, 300).bfloat16()
    for scale_fmt in ("float32", "ue8m0"):
        first = quantize_block(weight, scale_fmt)
        real = ops.dequant_block(*first)
        second = quantize_block(real, scale_fmt)
        again = ops.dequant_block(*second)
        third = quantize_block(again, scale_fmt)
        assert torch.equal(second[0].view(torch.uint8), third[0].view(torch.uint8)) and torch.equal(second[1], third[1])
        assert torch.equal(again, ops.dequant_block(*third))
