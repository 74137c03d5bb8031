"""Attention of one sequence, or of a run of its queries: over expanded keys and values, or over latents."""

from __future__ import annotations

import numpy as np

from dsv3_onnxruntime.emit.weights import columns
from dsv3_onnxruntime.graph import Graph


def attend(g: Graph, scores: str, values: str, masked: bool) -> tuple[str, str]:
    """scores [Nh, n, m], values [Nh, m, D] or [m, D] -> o [Nh, n, D], lse [Nh, n].

    With `masked`, input `offset` says that query j sees keys 0 to j + offset. A row that sees none has o = 0, lse = -inf.
    """
    zero, last = g.const(0.0), g.ints(-1)
    if masked:
        one, none = g.const(1, np.int64), g.const(0, np.int64)
        limit = g.op("Add", g.op("Range", none, g.op("Squeeze", g.size(scores, 1)), one), "offset")
        key = g.op("Range", none, g.op("Squeeze", g.size(scores, 2)), one)
        visible = g.op("LessOrEqual", key, g.op("Unsqueeze", limit, g.ints(1)))
        scores = g.op("Where", visible, scores, g.const(-np.inf))
    top = g.op("ReduceMax", scores, last, keepdims=1)
    shift = g.op("Where", g.op("IsInf", top), zero, top)
    p = g.op("Exp", g.op("Sub", scores, shift))
    total = g.op("ReduceSum", p, last, keepdims=1)
    empty = g.op("Equal", total, zero)
    safe = g.op("Where", empty, g.const(1.0), total)
    o = g.op("Div", g.op("MatMul", p, values), safe)
    lse = g.op("Where", empty, g.const(-np.inf), g.op("Add", shift, g.op("Log", safe)))
    return o, g.op("Squeeze", lse, last)


def prefill(g: Graph, scale: float, masked: bool) -> None:
    """Inputs q [n, Nh, D], k [m, Nh, D], v [m, Nh, Dv] -> o [n, Nh, Dv], lse [Nh, n]."""
    q = g.op("Transpose", g.real("q"), perm=[1, 0, 2])
    k = g.op("Transpose", g.real("k"), perm=[1, 2, 0])
    v = g.op("Transpose", g.real("v"), perm=[1, 0, 2])
    o, lse = attend(g, g.op("Mul", g.op("MatMul", q, k), g.const(scale)), v, masked)
    g.give("o", g.op("Transpose", o, perm=[1, 0, 2]))
    g.give("lse", lse)


def decode(g: Graph, scale: float, masked: bool, padding: int) -> None:
    """Inputs q_c [n, Nh, R], q_pe [n, Nh, P], ckv [m, R] (with ckv_scale [m, ceil(R/128)] if it is FP8), kpe [m, P] ->
    o [n, Nh, R], lse [Nh, n]. All heads share one key, [latent | rope], and one value, the latent. padding: (-R) mod 128."""
    latent = g.real("ckv")
    if g.has("ckv_scale"):
        latent = columns(g, latent, g.real("ckv_scale"), padding)
    keys = g.op("Transpose", g.op("Concat", latent, g.real("kpe"), axis=1), perm=[1, 0])
    queries = g.op("Concat", g.real("q_c"), g.real("q_pe"), axis=2)
    scores = g.op("MatMul", g.op("Transpose", queries, perm=[1, 0, 2]), keys)
    o, lse = attend(g, g.op("Mul", scores, g.const(scale)), latent, masked)
    g.give("o", g.op("Transpose", o, perm=[1, 0, 2]))
    g.give("lse", lse)
