"""Norms, the gated activation, rotary embedding."""

from __future__ import annotations

from dsv3_onnxruntime.graph import Graph


def rms_norm(g: Graph, x: str, weight: str, eps: float) -> str:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis."""
    mean = g.op("ReduceMean", g.op("Mul", x, x), g.ints(-1), keepdims=1)
    root = g.op("Sqrt", g.op("Add", mean, g.const(eps)))
    return g.op("Mul", g.op("Div", x, root), weight)


def sigmoid(g: Graph, x: str) -> str:
    """1 / (1 + exp(-x)): ONNX Runtime's own Sigmoid has an absolute error only, and is wrong from -18 down."""
    one = g.const(1.0)
    return g.op("Div", one, g.op("Add", one, g.op("Exp", g.op("Neg", x))))


def silu_mul(g: Graph, x: str) -> str:
    """silu(gate) * up of [gate | up] on the last axis; exp overflowing to infinity gives -0, as it should."""
    gate, up = g.ops("Split", 2, x, axis=-1, num_outputs=2)
    below = g.op("Add", g.const(1.0), g.op("Exp", g.op("Neg", gate)))
    return g.op("Mul", g.op("Div", gate, below), up)


def rope(g: Graph, x: str, positions: str, cos_sin: str, interleaved: bool) -> str:
    """Rotate the pairs of x [T, N, P] by row `positions` of cos_sin [L, P]: cosines, then sines."""
    table = g.op("Unsqueeze", g.op("Gather", cos_sin, positions, axis=0), g.ints(1))
    cos, sin = g.ops("Split", 2, table, axis=-1, num_outputs=2)
    last = g.ints(-1)
    if interleaved:
        pairs = g.op("Reshape", x, g.ints(0, 0, -1, 2))
        a, b = (g.op("Squeeze", half, last) for half in g.ops("Split", 2, pairs, axis=-1, num_outputs=2))
    else:
        a, b = g.ops("Split", 2, x, axis=-1, num_outputs=2)
    first = g.op("Sub", g.op("Mul", a, cos), g.op("Mul", b, sin))
    second = g.op("Add", g.op("Mul", a, sin), g.op("Mul", b, cos))
    if not interleaved:
        return g.op("Concat", first, second, axis=-1)
    both = g.op("Concat", g.op("Unsqueeze", first, last), g.op("Unsqueeze", second, last), axis=-1)
    return g.op("Reshape", both, g.shape(x))
