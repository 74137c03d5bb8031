"""Quantisation and dequantisation. Codes are exact: divisions and casts only, no approximation in between."""

from __future__ import annotations

import numpy as np

from dsv3.export.builder import Graph, Value
from dsv3.export.emit.arguments import Weight
from dsv3.ops.quantize import FP8_MAX
from dsv3.quant import SCHEMES
from dsv3.quant.fp8 import BLOCK
from dsv3.quant.int4 import GROUP


def last(x: Value) -> int:
    """The last size of an input."""
    if x.shape is None or x.shape[-1] is None:
        raise AssertionError(f"{x.name}: the last size of an input is known")
    return x.shape[-1]


def act_quant(
    g: Graph,
    x: Value,
    group: int = BLOCK,
    dtype: str = "float8_e4m3fn",
    scale_fmt: str = "float32",
    amax_floor: float = 1e-4,
    width: int | None = None,
) -> tuple[Value, Value]:
    """width: K, where x is no input of the model."""
    k = last(x) if width is None else width
    groups, largest = -(-k // group), FP8_MAX[dtype]
    padded = g.op("Pad", x.to("float32"), g.ints(0, 0, 0, groups * group - k))
    work = g.reshape(padded, 0, groups, group)
    scale = _at_least(g, _largest_magnitude(g, work), amax_floor) / largest
    if scale_fmt == "ue8m0":
        scale = _power_of_two_at_least(g, scale)
    codes = g.reshape(_clamped(g, work / _divisor(g, scale), largest), 0, groups * group)
    return g.slice(codes, 1, 0, k).to(dtype), g.squeeze(scale, -1)


def quant_int8(g: Graph, x: Value, amax_floor: float = 1e-10) -> tuple[Value, Value]:
    work = x.to("float32")
    scale = _at_least(g, _largest_magnitude(g, work), amax_floor) / 127.0
    return _clamped(g, g.op("Round", work / _divisor(g, scale)), 127.0).to("int8"), scale


def _largest_magnitude(g: Graph, x: Value) -> Value:
    """max |x| over the last axis, kept, at least 0; NaN if there is one. ReduceMax of ONNX Runtime may drop NaN."""
    nan = g.is_nan(x)
    magnitude = g.where(nan, 0.0, g.op("Abs", x))
    found = g.reduce("Max", nan.to("float32"), -1) > 0.0
    return g.where(found, float("nan"), g.reduce("Max", magnitude, -1))


def _at_least(g: Graph, x: Value, floor: float) -> Value:
    """max(x, floor), NaN kept."""
    return g.where(x < floor, floor, x)


def _clamped(g: Graph, x: Value, largest: float) -> Value:
    """x in [-largest, largest], NaN kept."""
    return g.where(x > largest, largest, g.where(x < -largest, -largest, x))


def _divisor(g: Graph, scale: Value) -> Value:
    return g.where(scale.equal(0.0), 1.0, scale)


def _power_of_two_at_least(g: Graph, x: Value) -> Value:
    """The smallest power of two >= x, exactly: as many of all float32 powers are below x as its place in their table.
    Infinity and NaN are kept."""
    with np.errstate(over="ignore"):
        table = np.append(np.ldexp(np.float32(1), np.arange(-149, 128)), np.float32(np.inf)).astype(np.float32)
    below = g.count(g.const(table, "float32") < g.unsqueeze(x, -1), -1)
    place = g.where(below > len(table) - 1, len(table) - 1, below)
    return g.where(g.is_nan(x), x, g.gather(g.const(table, "float32"), place))


def dequant_block(g: Graph, weight: Value, scale: Value, dtype: str = "bfloat16") -> Value:
    """Of [.., N, K] inputs; an expert's scales have its leading axis."""
    if weight.shape is None:
        raise AssertionError("a weight is an input of the model")
    n, k = weight.shape[-2:]
    assert n is not None and k is not None
    work = "float64" if dtype == "float64" else "float32"
    axis = len(weight.shape) - 2
    tall = g.gather(scale.to(work), g.const(np.arange(n) // BLOCK, "int64"), axis)
    return (weight.to("float32").to(work) * repeat(g, tall, k, BLOCK)).to(dtype)


def repeat(g: Graph, scale: Value, k: int, group: int) -> Value:
    """Every scale of the last axis `group` times, cut off at k."""
    return g.gather(scale, g.const(np.arange(k) // group, "int64"), -1)


def fn_to_fnuz(g: Graph, weight: Value, scale: Value) -> tuple[Value, Value]:
    """Equal bits mean half the value in e4m3fnuz, which has no -0."""
    half = weight.to("float32") / 2.0
    return g.where(half.equal(0.0), 0.0, half).to("float8_e4m3fnuz"), (scale.to("float32") * 2.0)


def dequantize(g: Graph, w: Weight, dtype: str) -> Value:
    """The real weight [.., N, K] in dtype."""
    kind = SCHEMES[w.quant].weights
    if kind == "none":
        return w.weight.to(dtype)
    if kind == "fp8":
        return dequant_block(g, w.weight, w.scales(), dtype)
    work = "float64" if dtype == "float64" else "float32"
    if kind == "int8":
        return (w.weight.to(work) * w.scales().to(work)).to(dtype)
    k = w.shape[-1]
    return (_unpack_int4(g, w, work) * repeat(g, w.scales().to(work), k, GROUP)).to(dtype)


def _unpack_int4(g: Graph, w: Weight, work: str) -> Value:
    """Low nibble first; nibble = q + 8."""
    byte = w.weight.to("int32")
    high = byte / 16
    pairs = g.concat([g.unsqueeze(byte - high * 16, -1), g.unsqueeze(high, -1)], -1)
    *lead, k = w.shape
    flat = g.reshape(pairs, *lead, -1)
    return g.slice(flat, len(lead), 0, k).to(work) - 8.0
