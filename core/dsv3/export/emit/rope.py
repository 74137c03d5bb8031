"""Rotary position embedding."""

from __future__ import annotations

from dsv3.export.builder import Graph, Value


def apply_rope(g: Graph, x: Value, positions: Value, cos_sin: Value, interleaved: bool = True) -> Value:
    v = g.work(x)
    angles = g.unsqueeze(g.gather(cos_sin, positions).to(v.dtype), 1)
    cos, sin = g.halves(angles)
    if not interleaved:
        a, b = g.halves(v)
        return g.concat([a * cos - b * sin, a * sin + b * cos], -1).to(x.dtype)
    far = (1 << 63) - 1
    a, b = (g.slice(v, 2, first, far, 2) for first in (0, 1))
    pairs = [g.unsqueeze(half, -1) for half in (a * cos - b * sin, a * sin + b * cos)]
    return g.op("Reshape", g.concat(pairs, -1), g.op("Shape", v, dtype="int64")).to(x.dtype)
