"""Number formats inside kernels: FP8 by integer arithmetic, and the exponential.

Integers behave alike on every device and in the interpreter, so what is proven here bit for bit holds everywhere; and devices
without FP8 units need nothing else. FNUZ: the encoding of gfx942 (bias 8, NaN at 0x80, no -0), whose codes mean half of what
the same e4m3fn bits mean.
"""

from __future__ import annotations

import triton
import triton.language as tl

_MAX_BITS: tl.constexpr = tl.constexpr(0x43E00000)  # 448.0
_INF_BITS: tl.constexpr = tl.constexpr(0x7F800000)
_SMALLEST_NORMAL: tl.constexpr = tl.constexpr(0x3C800000)  # 2^-6
_LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
# ln 2 in two parts; the first has 9 bits, so that its product with a whole number is exact.
_LN2_HIGH: tl.constexpr = tl.constexpr(0.693359375)
_LN2_LOW: tl.constexpr = tl.constexpr(-2.12194440e-4)


@triton.jit
def encode_fp8(x, FNUZ: tl.constexpr):
    """float32 -> FP8 code as uint8: to nearest, ties to even, saturated at 448 (FNUZ: 224), NaN to NaN.

    Normal numbers keep 3 bits of the significand; below 2^-6 codes are multiples of 2^-9, to which adding 2^14 rounds.
    """
    if FNUZ:
        x = x * 2.0
    bits = x.to(tl.int32, bitcast=True)
    sign = (bits >> 24) & 0x80
    size = bits & 0x7FFFFFFF
    capped = tl.minimum(size, _MAX_BITS)
    normal = ((capped + 0x7FFFF + ((capped >> 20) & 1)) >> 20) - 960
    subnormal = (capped.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    code = tl.where(capped < _SMALLEST_NORMAL, subnormal, normal)
    if FNUZ:
        code = tl.where(code == 0, 0, code | sign)
        code = tl.where(size > _INF_BITS, 0x80, code)
    else:
        code = tl.where(size > _INF_BITS, 0x7F, code) | sign
    return code.to(tl.uint8)


@triton.jit
def decode_fp8(codes, FNUZ: tl.constexpr):
    """FP8 code as uint8 -> float32, exact for all codes that are numbers. NaN codes become numbers, too: weights that hold any
    are refused, and what was quantised from NaN has NaN in its scale.

    The bits of an e4m3 number, moved to those of a half, are 2^-8 times it, subnormals included.
    """
    wide = codes.to(tl.int16)
    half = (((wide & 0x80) << 8) | ((wide & 0x7F) << 7)).to(tl.float16, bitcast=True)
    if FNUZ:
        return half.to(tl.float32) * 128.0
    else:
        return half.to(tl.float32) * 256.0


@triton.jit
def is_nan_fp8(codes, FNUZ: tl.constexpr):
    """Which codes are NaN."""
    if FNUZ:
        return codes == 0x80
    else:
        return (codes & 0x7F) == 0x7F


@triton.jit
def power_of_two_at_least(x):
    """The smallest power of two >= x, exactly, for finite positive normal x; NaN stays NaN."""
    bits = x.to(tl.int32, bitcast=True)
    up = ((bits + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)
    return tl.where(x == x, up, x)


@triton.jit
def exp_accurate(x):
    """exp(x) in float32 to a few ulp for any x. tl.exp multiplies by log2(e) in float32, which loses |x| ulp. Source: Cody and
    Waite 1980, chapter 6."""
    n = tl.floor(tl.minimum(tl.maximum(x, -120.0), 120.0) * _LOG2E + 0.5)
    r = (x - n * _LN2_HIGH) - n * _LN2_LOW
    half = tl.floor(n * 0.5)  # 2^n may be subnormal, or too large, where the product is not
    return tl.exp2(r * _LOG2E) * tl.exp2(half) * tl.exp2(n - half)
