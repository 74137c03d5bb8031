"""The gated activation."""

from __future__ import annotations

from dsv3.export.builder import Graph, Value
from dsv3.export.emit.quantize import act_quant, last


def sigmoid(g: Graph, x: Value) -> Value:
    """1 / (1 + exp(-x)), spelt out: ONNX Runtime's Sigmoid is a sixth too large at -15, and 0 from -18 on."""
    return 1.0 / (g.op("Exp", -x) + 1.0)


def silu_mul(g: Graph, x: Value) -> Value:
    gate, up = g.halves(g.work(x))
    return (gate * sigmoid(g, gate) * up).to(x.dtype)


def silu_mul_quant(g: Graph, x: Value, group: int, dtype: str, scale_fmt: str) -> tuple[Value, Value]:
    return act_quant(g, silu_mul(g, x), group, dtype, scale_fmt, width=last(x) // 2)
