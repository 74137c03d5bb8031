"""FP8 in the kernels against ml_dtypes, over all codes, all ties, and what lies beside them."""

import ml_dtypes
import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from dsv3_triton.launch import launch  # noqa: E402
from dsv3_triton.numbers import (  # noqa: E402
    decode_fp8,
    encode_fp8,
    exp_accurate,
    is_nan_fp8,
    power_of_two_at_least,
)

ENCODINGS = {"e4m3fn": (ml_dtypes.float8_e4m3fn, 448.0), "e4m3fnuz": (ml_dtypes.float8_e4m3fnuz, 224.0)}


@triton.jit
def _encode(x_ptr, y_ptr, n, FNUZ: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + at, encode_fp8(tl.load(x_ptr + at, mask=at < n, other=0.0), FNUZ), mask=at < n)


@triton.jit
def _decode(x_ptr, y_ptr, nan_ptr, FNUZ: tl.constexpr):
    at = tl.arange(0, 256)
    codes = tl.load(x_ptr + at)
    tl.store(y_ptr + at, decode_fp8(codes, FNUZ))
    tl.store(nan_ptr + at, is_nan_fp8(codes, FNUZ).to(tl.uint8))


@triton.jit
def _exp(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + at, exp_accurate(tl.load(x_ptr + at, mask=at < n, other=0.0)), mask=at < n)


@triton.jit
def _power(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + at, power_of_two_at_least(tl.load(x_ptr + at, mask=at < n, other=1.0)), mask=at < n)


def _over(kernel, x, dtype=torch.float32, **constants):
    y = torch.empty(len(x), dtype=dtype)
    launch(kernel, (triton.cdiv(len(x), 4096),), x, y, len(x), BLOCK=4096, **constants)
    return y


@pytest.mark.parametrize("name", ENCODINGS)
def test_every_code_decodes_to_its_value(name):
    codes, values, nan = torch.arange(256, dtype=torch.uint8), torch.empty(256), torch.empty(256, dtype=torch.uint8)
    launch(_decode, (1,), codes, values, nan, FNUZ=name == "e4m3fnuz")
    expected = codes.numpy().view(ENCODINGS[name][0]).astype(np.float32)
    number = ~np.isnan(expected)
    assert np.array_equal(values.numpy()[number].view(np.uint32), expected[number].view(np.uint32))
    assert np.array_equal(nan.numpy().astype(bool), np.isnan(expected))


@pytest.mark.parametrize("name", ENCODINGS)
def test_encoding_rounds_ties_to_even_saturates_and_keeps_nan(name):
    encoding, largest = ENCODINGS[name]
    values = np.arange(256, dtype=np.uint8).view(encoding).astype(np.float32)
    values = np.unique(values[~np.isnan(values)])
    ties = (values[1:] + values[:-1]) / 2
    beside = [np.nextafter(ties, np.float32(s * np.inf), dtype=np.float32) for s in (1, -1)]
    special = np.array([500, -500, np.inf, -np.inf, np.nan, -np.nan, 1e-30, -1e-30, 0.0, -0.0, 3e38, 1e-42], dtype=np.float32)
    generator = np.random.default_rng(0)
    spread = (generator.standard_normal(20000) * np.exp2(generator.uniform(-14, 10, 20000))).astype(np.float32)
    x = np.concatenate([values, ties, *beside, special, spread])
    codes = _over(_encode, torch.from_numpy(x), torch.uint8, FNUZ=name == "e4m3fnuz").numpy()
    expected = np.clip(x, -largest, largest).astype(encoding).view(np.uint8)
    nan = np.isnan(x)
    assert np.array_equal(codes[~nan], expected[~nan])
    assert np.isnan(codes[nan].view(encoding).astype(np.float32)).all()


def test_exponential_is_accurate_far_from_zero():
    x = torch.linspace(-87, 88, 50001)
    expected = torch.exp(x.double())
    error = (_over(_exp, x).double() - expected).abs() / expected
    assert error.max() < 4 * 2**-24
    edge = _over(_exp, torch.tensor([-float("inf"), -200.0, 200.0, float("inf"), float("nan")]))
    assert edge[:2].tolist() == [0.0, 0.0] and torch.isinf(edge[2:4]).all() and torch.isnan(edge[4])


def test_scales_round_up_to_powers_of_two():
    x = torch.tensor([1.0, 1.0000001, 1.9999999, 2.0, 3e-5, 2.0**-100, float("nan")])
    y = _over(_power, x)
    assert y[:6].tolist() == [1.0, 2.0, 2.0, 2.0, 2.0**-15, 2.0**-100] and torch.isnan(y[6])
