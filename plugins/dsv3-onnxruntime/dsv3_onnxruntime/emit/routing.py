"""Which experts a token goes to."""

from __future__ import annotations

import numpy as np

from dsv3_onnxruntime.emit.elementwise import sigmoid
from dsv3_onnxruntime.graph import Graph


def grouped_topk(
    g: Graph,
    logits: str,
    bias: str | None,
    n_group: int,
    topk_group: int,
    topk: int,
    score: str,
    group_score: str,
    renormalize: bool,
    scale: float,
) -> tuple[str, str]:
    """logits [T, E] -> weights [T, topk], ids i64 [T, topk]. TopK gives ties to the lower index, as the contract asks."""
    last = g.ints(-1)
    if score == "sigmoid":
        scores = sigmoid(g, logits)
    else:
        p = g.op("Exp", g.op("Sub", logits, g.op("ReduceMax", logits, last, keepdims=1)))
        scores = g.op("Div", p, g.op("ReduceSum", p, last, keepdims=1))
    choice = scores if bias is None else g.op("Add", scores, bias)
    if n_group > 1:
        choice = _masked(g, choice, n_group, topk_group, group_score)
    _, ids = g.ops("TopK", 2, choice, g.ints(topk), axis=-1)
    weights = g.op("GatherElements", scores, ids, axis=-1)
    if renormalize:
        total = g.op("ReduceSum", weights, last, keepdims=1)
        weights = g.op("Div", weights, g.op("Add", total, g.const(1e-20)))
    return g.op("Mul", weights, g.const(scale)), ids


def _masked(g: Graph, choice: str, n_group: int, topk_group: int, group_score: str) -> str:
    """-inf wherever the group is not among the best topk_group."""
    by_group = g.op("Reshape", choice, g.ints(0, n_group, -1))
    last = g.ints(-1)
    if group_score == "max":
        best = g.op("ReduceMax", by_group, last, keepdims=0)
    else:
        two, _ = g.ops("TopK", 2, by_group, g.ints(2), axis=-1)
        best = g.op("ReduceSum", two, last, keepdims=0)
    _, kept = g.ops("TopK", 2, best, g.ints(topk_group), axis=-1)
    hits = g.op("OneHot", kept, g.const(n_group, np.int64), g.const([0.0, 1.0]), axis=-1)
    inside = g.op("Greater", g.op("ReduceMax", hits, g.ints(1), keepdims=0), g.const(0.0))
    masked = g.op("Where", g.op("Unsqueeze", inside, last), by_group, g.const(-np.inf))
    return g.op("Reshape", masked, g.shape(choice))
