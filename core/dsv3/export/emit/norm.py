"""RMS normalisation, in float32 with one rounding at the end."""

from __future__ import annotations

from dsv3.export.builder import Graph, Value
from dsv3.export.emit.quantize import act_quant, last


def rms_norm(g: Graph, x: Value, weight: Value, eps: float) -> Value:
    v = g.work(x)
    scale = g.op("Sqrt", g.reduce("Mean", v * v, -1) + eps)
    return (v / scale * weight.to(v.dtype)).to(x.dtype)


def add_rms_norm(g: Graph, x: Value, residual: Value, weight: Value, eps: float) -> tuple[Value, Value]:
    total = (g.work(x) + residual.to(g.work(x).dtype)).to(x.dtype)
    return rms_norm(g, total, weight, eps), total


def rms_norm_quant(
    g: Graph, x: Value, weight: Value, eps: float, group: int, dtype: str, scale_fmt: str
) -> tuple[Value, Value]:
    return act_quant(g, rms_norm(g, x, weight, eps), group, dtype, scale_fmt, width=last(x))
