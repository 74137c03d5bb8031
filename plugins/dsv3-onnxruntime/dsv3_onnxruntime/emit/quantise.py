"""Rounding of activations to FP8 and INT8, as the contract has it, in float32."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from onnx import TensorProto

from dsv3_onnxruntime.graph import BOOL, FLOAT, Graph

BLOCK = 128
# Largest magnitude by encoding: the contract's, not always the encoding's own.
LARGEST: Mapping[int, float] = {
    TensorProto.FLOAT8E4M3FN: 448.0,
    TensorProto.FLOAT8E4M3FNUZ: 224.0,
    TensorProto.FLOAT8E5M2: 57344.0,
}


def grouped(g: Graph, x: str, group: int, padding: int) -> str:
    """[T, K] as [T, groups, group], the last group filled up with `padding` zeros."""
    if padding:
        x = g.op("Pad", x, g.ints(0, 0, 0, padding), g.const(0.0))
    return g.op("Reshape", x, g.ints(0, -1, group))


def fp8(g: Graph, x: str, encoding: int, group: int, padding: int, scale_fmt: str, floor: float) -> tuple[str, str]:
    """x [T, K] -> codes of type `encoding` [T, K], scales [T, groups]. padding: (-K) mod group.

    A NaN makes its group NaN: ReduceMax overlooks it, so it is looked for by itself.
    """
    work = grouped(g, x, group, padding)
    largest = g.const(LARGEST[encoding])
    last = g.ints(-1)
    amax = g.op("ReduceMax", g.op("Abs", work), last, keepdims=1)
    nan = g.op("ReduceMax", g.cast(g.op("IsNaN", work), FLOAT), last, keepdims=1)
    scale = g.op("Div", g.op("Max", amax, g.const(floor)), largest)
    if scale_fmt == "ue8m0":
        scale = power_of_two_at_least(g, scale)
    scale = g.op("Where", g.cast(nan, BOOL), g.const(np.nan), scale)
    divisor = g.op("Where", g.op("Equal", scale, g.const(0.0)), g.const(1.0), scale)
    q = g.op("Div", work, divisor)
    # Clip hands on a NaN; Min and Max need not.
    q = g.op("Clip", q, g.op("Neg", largest), largest)
    if padding:
        q = g.op("Slice", g.op("Reshape", q, g.ints(0, -1)), g.ints(0), g.size(x, 1), g.ints(1))
    else:
        q = g.op("Reshape", q, g.shape(x))
    return g.cast(q, encoding), g.op("Squeeze", scale, last)


def power_of_two_at_least(g: Graph, x: str) -> str:
    """The smallest power of two >= x, exactly. A logarithm comes within one of the exponent; doubling and halving,
    which are exact, do the rest. 0 becomes 1, NaN and infinity stay."""
    low, high = -149, 127
    table = g.const([2.0**e for e in range(low, high + 1)])
    zero, two, half = g.const(0.0), g.const(2.0), g.const(0.5)
    finite = g.op("And", g.op("Greater", x, zero), g.op("LessOrEqual", x, g.const(float(np.finfo(np.float32).max))))
    safe = g.op("Where", finite, x, g.const(1.0))
    exponent = g.op("Floor", g.op("Mul", g.op("Log", safe), g.const(1 / np.log(2))))
    exponent = g.op("Clip", exponent, g.const(float(low)), g.const(float(high)))
    index = g.cast(g.op("Sub", exponent, g.const(float(low))), TensorProto.INT64)
    power = g.op("Gather", table, index, axis=0)
    for _ in range(2):
        power = g.op("Where", g.op("Less", power, safe), g.op("Mul", power, two), power)
    for _ in range(2):
        smaller = g.op("Mul", power, half)
        power = g.op("Where", g.op("GreaterOrEqual", smaller, safe), smaller, power)
    kept = g.op("Where", g.op("Equal", x, zero), g.const(1.0), x)
    return g.op("Where", finite, power, kept)


def int8(g: Graph, x: str, floor: float) -> tuple[str, str]:
    """x [T, K] -> codes i8 [T, K] in [-127, 127], scales [T, 1]; Round is half to even."""
    amax = g.op("ReduceMax", g.op("Abs", x), g.ints(-1), keepdims=1)
    scale = g.op("Div", g.op("Max", amax, g.const(floor)), g.const(127.0))
    divisor = g.op("Where", g.op("Equal", scale, g.const(0.0)), g.const(1.0), scale)
    q = g.op("Clip", g.op("Round", g.op("Div", x, divisor)), g.const(-127.0), g.const(127.0))
    return g.cast(q, TensorProto.INT8), scale
