"""The mixture of experts as one Scan over experts. Scan hands each expert's weights to its body without copying them, and an If
passes over the experts that no row asks for, so that a decode step pays for its own experts only."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from dsv3_onnxruntime.emit.elementwise import silu_mul
from dsv3_onnxruntime.emit.weights import Weight, product
from dsv3_onnxruntime.graph import BOOL, FLOAT, INT64, Graph

Step = Callable[[Graph, str, dict[str, str], str], str]


def fused_experts(g: Graph, w13: Weight, w2: Weight) -> None:
    """Inputs x [T, H], weights [T, k], ids [T, k], w13 and w2 (codes and scales) -> y [T, H].

    Each token's experts are added in the order of their ids. Ids outside [0, E), and what belongs to them, are never read.
    """
    x, weights, ids = g.real("x"), g.real("weights"), g.cast("ids", INT64)
    experts = _count(g, "w13")
    flat = g.op("Reshape", ids, g.ints(-1))
    valid = g.op("And", g.op("GreaterOrEqual", flat, g.const(0, np.int64)), g.op("Less", flat, experts))
    one_more = g.op("Add", experts, g.ints(1))
    none = g.op("ConstantOfShape", one_more)
    ones = g.op("Expand", g.const(1.0), g.shape(flat))
    asked = g.op("ScatterElements", none, g.op("Where", valid, flat, experts), ones, axis=0)
    asked = g.cast(g.op("Slice", asked, g.ints(0), experts, g.ints(0)), BOOL)
    zeros = g.op("Expand", g.const(0.0), g.shape(x))

    def one(b: Graph, expert: str, inner: dict[str, str], total: str) -> str:
        match = b.op("Equal", ids, expert)
        share = b.op("ReduceSum", b.op("Where", match, weights, b.const(0.0)), b.ints(1), keepdims=0)
        here = b.op("ReduceMax", b.cast(match, FLOAT), b.ints(1), keepdims=0)
        rows = b.op("Squeeze", b.op("NonZero", here), b.ints(0))
        h = _product(b, g, b.op("Gather", x, rows, axis=0), w13, "w13", inner)
        y = _product(b, g, silu_mul(b, h), w2, "w2", inner)
        y = b.op("Mul", y, b.op("Unsqueeze", b.op("Gather", share, rows, axis=0), b.ints(1)))
        y = b.op("Add", b.op("Gather", total, rows, axis=0), y)
        return b.op("ScatterND", total, b.op("Unsqueeze", rows, b.ints(1)), y)

    g.give("y", _over_experts(g, ("w13", "w2"), asked, zeros, one))


def grouped_linear(g: Graph, w: Weight) -> None:
    """Inputs x [M, K] sorted by expert, w (codes and scale), offsets [E + 1], n i64 [1] = N -> y [M, N].

    Rows past offsets[E] are 0, and never read.
    """
    x, offsets = g.real("x"), g.cast("offsets", INT64)
    experts = _count(g, "w")
    starts = g.op("Slice", offsets, g.ints(0), experts, g.ints(0))
    ends = g.op("Slice", offsets, g.ints(1), g.op("Add", experts, g.ints(1)), g.ints(0))
    asked = g.op("Greater", ends, starts)
    zeros = g.op("Expand", g.const(0.0), g.op("Concat", g.size("x", 0), "n", axis=0))

    def one(b: Graph, expert: str, inner: dict[str, str], total: str) -> str:
        start = b.op("Gather", starts, b.op("Unsqueeze", expert, b.ints(0)), axis=0)
        end = b.op("Gather", ends, b.op("Unsqueeze", expert, b.ints(0)), axis=0)
        y = _product(b, g, b.op("Slice", x, start, end, b.ints(0)), w, "w", inner)
        rows = b.op("Range", b.op("Squeeze", start), b.op("Squeeze", end), b.const(1, np.int64))
        return b.op("ScatterND", total, b.op("Unsqueeze", rows, b.ints(1)), y)

    g.give("y", _over_experts(g, ("w",), asked, zeros, one))


def _count(g: Graph, w: str) -> str:
    """Number of experts; ONNX Runtime has no Shape of float8, so the scales are asked where there are some."""
    return g.size(f"{w}_scale" if g.has(f"{w}_scale") else w, 0)


def _product(b: Graph, g: Graph, x: str, w: Weight, name: str, inner: dict[str, str]) -> str:
    return product(b, x, w, inner[name], inner.get(f"{name}_scale"), g.types[name][0])


def _over_experts(g: Graph, weights: tuple[str, ...], asked: str, start: str, one: Step) -> str:
    """`start`, changed by `one` for every expert that is asked for, in order."""
    sliced = [n for w in weights for n in (w, f"{w}_scale") if g.has(n)]
    index = g.op("Range", g.const(0, np.int64), g.op("Squeeze", _count(g, weights[0])), g.const(1, np.int64))
    body, then, otherwise = Graph(inside=g), Graph(inside=g), Graph(inside=g)
    total, expert, hit = g.fresh(), g.fresh(), g.fresh()
    inner = {name: g.fresh() for name in sliced}
    changed = one(then, expert, inner, total)
    kept = otherwise.op("Identity", total)
    after = body.op(
        "If",
        hit,
        then_branch=then.body("asked", [], [(changed, FLOAT)]),
        else_branch=otherwise.body("not_asked", [], [(kept, FLOAT)]),
    )
    taken = [(total, FLOAT), (expert, INT64), (hit, BOOL), *((inner[n], g.types[n][0]) for n in sliced)]
    scanned = body.body("expert", taken, [(after, FLOAT)])
    return g.op("Scan", start, index, asked, *sliced, body=scanned, num_scan_inputs=2 + len(sliced))
