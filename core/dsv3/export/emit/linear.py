"""Matrix products. Sums are in float32 (float64 for float64), rounded once."""

from __future__ import annotations

from dsv3.export.builder import Graph, Value, work_dtype
from dsv3.export.emit.arguments import Weight
from dsv3.export.emit.quantize import act_quant, dequant_block, dequantize, quant_int8, repeat
from dsv3.quant import SCHEMES
from dsv3.quant.fp8 import BLOCK


def linear(g: Graph, x: Value, weight: Value, bias: Value | None = None) -> Value:
    work = work_dtype(x.dtype)
    inputs = [x.to(work), weight.to(x.dtype).to(work)]
    if bias is not None:
        inputs.append(bias.to(x.dtype).to(work))
    return g.op("Gemm", *inputs, transB=1).to(x.dtype)


def bmm(g: Graph, x: Value, weight: Value) -> Value:
    work = work_dtype(x.dtype)
    heads = g.matmul(g.transpose(x.to(work), 1, 0, 2), weight.to(x.dtype).to(work))
    return g.transpose(heads, 1, 0, 2).to(x.dtype)


def router_gemm(g: Graph, x: Value, weight: Value) -> Value:
    work = work_dtype(x.dtype)
    return g.op("Gemm", x.to(work), weight.to(work), transB=1)


def block_scaled_mm(g: Graph, a: Value, a_scale: Value, b: Value, b_scale: Value, out_dtype: str) -> Value:
    if a.shape is None or (k := a.shape[-1]) is None:
        raise AssertionError("a is an input of the model")
    work = work_dtype(out_dtype)
    x = scaled(g, a, a_scale, k, work)
    return linear(g, x, dequant_block(g, b, b_scale, work)).to(out_dtype)


def scaled(g: Graph, codes: Value, scale: Value, k: int, work: str) -> Value:
    """FP8 activations [.., K] times their scales."""
    return codes.to("float32").to(work) * repeat(g, scale.to(work), k, BLOCK)


def int8_scaled_mm(g: Graph, a: Value, a_scale: Value, b: Value, b_scale: Value, out_dtype: str) -> Value:
    """float64 holds every sum of INT8 products exactly."""
    total = g.op("Gemm", a.to("float64"), b.to("float64"), transB=1)
    return int8_rescaled(g, total, a_scale, g.transpose(b_scale, 1, 0), out_dtype)


def int8_rescaled(g: Graph, total: Value, a_scale: Value, b_scale: Value, out_dtype: str) -> Value:
    """An exact sum, rounded once to float32 as from int32, times both scales."""
    work = work_dtype(out_dtype)
    return (total.to(work) * a_scale.to(work) * b_scale.to(work)).to(out_dtype)


def quant_linear(g: Graph, x: Value, w: Weight) -> Value:
    activations = SCHEMES[w.quant].activations
    if activations == "int8":
        q, scale = quant_int8(g, x)
        return int8_scaled_mm(g, q, scale, w.weight, w.scales(), x.dtype)
    if activations == "fp8":
        work = work_dtype(x.dtype)
        q, scale = act_quant(g, x, BLOCK, w.weight.dtype, w.scale_fmt, width=w.shape[-1])
        rows = scaled(g, q, scale, w.shape[-1], work)
        return linear(g, rows, dequant_block(g, w.weight, w.scales(), work)).to(x.dtype)
    return linear(g, x, dequantize(g, w, x.dtype))
