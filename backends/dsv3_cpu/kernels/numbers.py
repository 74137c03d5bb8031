"""Number formats inside kernels: bfloat16 and FP8 bits to float32 and back, and an exponential that vectorises."""

from __future__ import annotations

import operator

import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from dsv3_cpu.compile import strict


@intrinsic
def float_of(typing, bits):
    """uint32 bits as float32."""

    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.uint32), generate


@intrinsic
def bits_of(typing, value):
    """float32 as its uint32 bits."""

    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.uint32(types.float32), generate


@intrinsic
def half_of(typing, bits):
    """float16 bits, an int16, as float32: one instruction, at full speed for subnormals too."""

    def generate(context, builder, signature, arguments):
        return builder.fpext(builder.bitcast(arguments[0], ir.HalfType()), ir.FloatType())

    return types.float32(types.int16), generate


@strict
def fp8(code):
    """An e4m3fn code (int8) that is a number, times 2^-8, exactly: its bits moved to where float16 has its own."""
    return half_of(np.int16((np.int16(code) << 7) & -0x4080))


@strict
def to_fp8(value):
    """float32 within +-448, or NaN, to an e4m3fn code as int8, to nearest even."""
    bits = bits_of(value)
    sign = (bits >> np.uint32(24)) & np.uint32(0x80)
    size = bits & np.uint32(0x7FFFFFFF)
    if value != value:
        return np.int8(np.uint8(sign | np.uint32(0x7F)))
    if size < np.uint32(0x3C800000):  # below 2^-6 codes are multiples of 2^-9
        return np.int8(np.uint8(sign | np.uint32(np.rint(float_of(size) * np.float32(512)))))
    size += np.uint32(0x7FFFF) + ((size >> np.uint32(20)) & np.uint32(1))
    return np.int8(np.uint8(sign | ((size >> np.uint32(20)) - np.uint32(120 << 3))))


@strict
def exp(x):
    """e^x in float32 within 2 ulp, without a branch, so that loops over it vectorise; below -87 it stays at e^-87.

    Range reduction by ln 2 in two parts and a polynomial of degree 5 (Cody and Waite 1980; Moshier's coefficients).
    """
    x = np.float32(88) if x > np.float32(88) else x
    x = np.float32(-87) if x < np.float32(-87) else x
    n = np.floor(x * np.float32(1.44269504088896341) + np.float32(0.5))
    r = (x - n * np.float32(0.693359375)) + n * np.float32(2.12194440e-4)
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    p = (p * r) * r + r + np.float32(1)
    return p * float_of(np.uint32((np.int32(n) + np.int32(127)) << np.int32(23)))


@strict
def sigmoid(x):
    """1 / (1 + e^-x)."""
    return np.float32(1) / (np.float32(1) + exp(-x))


def _bf16(builder, value):
    """float32 to the bits of bfloat16, to nearest even; NaN stays NaN."""
    word, short = ir.IntType(32), ir.IntType(16)
    bits = builder.bitcast(value, word)
    high = builder.lshr(bits, ir.Constant(word, 16))
    up = builder.add(ir.Constant(word, 0x7FFF), builder.and_(high, ir.Constant(word, 1)))
    rounded = builder.lshr(builder.add(bits, up), ir.Constant(word, 16))
    quiet = builder.or_(high, ir.Constant(word, 0x40))
    return builder.trunc(builder.select(builder.fcmp_unordered("uno", value, value), quiet, rounded), short)


@intrinsic
def widen(typing, value):
    """A stored number as float32: bfloat16 is uint16."""

    def generate(context, builder, signature, arguments):
        if value != types.uint16:
            return context.cast(builder, arguments[0], value, types.float32)
        word = builder.zext(arguments[0], ir.IntType(32))
        return builder.bitcast(builder.shl(word, ir.Constant(ir.IntType(32), 16)), ir.FloatType())

    return types.float32(value), generate


@intrinsic
def put(typing, out, index, value):
    """out[index] = value, rounded to what out holds."""
    setter = typing.resolve_function_type(operator.setitem, (out, index, out.dtype), {})

    def generate(context, builder, signature, arguments):
        array, at, number = arguments
        stored = (
            _bf16(builder, number) if out.dtype == types.uint16 else context.cast(builder, number, types.float32, out.dtype)
        )
        store = context.get_function(operator.setitem, setter)
        store(
            builder,
            (context.cast(builder, array, out, setter.args[0]), context.cast(builder, at, index, setter.args[1]), stored),
        )
        return context.get_dummy_value()

    return types.void(out, index, types.float32), generate


@intrinsic
def power_of(typing, exponent):
    """2^exponent in float64, for exponents of normal numbers."""

    def generate(context, builder, signature, arguments):
        word = ir.IntType(64)
        biased = builder.add(context.cast(builder, arguments[0], exponent, types.int64), ir.Constant(word, 1023))
        return builder.bitcast(builder.shl(biased, ir.Constant(word, 52)), ir.DoubleType())

    return types.float64(exponent), generate
