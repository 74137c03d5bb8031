"""The mixture of experts: sort pairs by expert, one product per row with its expert's weight, weighted sum per token.

A row gathers the weight of its expert: the plainest form that has no shape depending on values. It is meant for tests;
`network_moe` has what exported models run.
"""

from __future__ import annotations

from dsv3.export.builder import Graph, Value, work_dtype
from dsv3.export.emit.activation import silu_mul
from dsv3.export.emit.arguments import Weight
from dsv3.export.emit.linear import int8_rescaled, quant_linear, scaled
from dsv3.export.emit.quantize import act_quant, dequant_block, dequantize, quant_int8
from dsv3.export.emit.routing import route, top
from dsv3.quant import SCHEMES
from dsv3.quant.fp8 import BLOCK


def moe_permute(g: Graph, ids: Value, n_experts: int) -> tuple[Value, Value]:
    """Sorted by the key expert * M + index: stable, and one TopK of integers."""
    flat = g.reshape(ids.to("int64"), -1)
    key = g.where((flat < 0) | (flat >= n_experts), n_experts, flat)
    m = g.size(flat, 0)
    ordered, _ = top(g, key * m + g.arange(m), m, largest=False)
    rows = g.op("Max", m, g.ints(1))
    order, valid = ordered % rows, (ordered / rows) < n_experts
    before = g.unsqueeze(key, 0) < g.unsqueeze(g.arange(n_experts + 1), 1)
    return g.where(valid, order, -1).to("int32"), g.count(before, 1).to("int32")


def moe_combine(g: Graph, y: Value, perm: Value, weights: Value, topk: int | None = None) -> Value:
    """topk: k, where weights are no input of the model. Row M collects what belongs nowhere and is cut off again."""
    k = topk if topk is not None else weights.shape[1] if weights.shape else None
    if k is None:
        raise AssertionError("the number of experts per token is known")
    work, m, width = work_dtype(y.dtype), g.size(y, 0), g.size(y, 1)
    valid = perm.to("int64") >= 0
    place = g.unsqueeze(g.where(valid, perm.to("int64"), m), 1)
    values = g.where(g.unsqueeze(valid, 1), y.to(work), 0.0)
    rows = g.op("ScatterND", g.zeros(work, m + 1, width), place, values)
    ones = g.expand(g.const(1, "int64"), m)
    present = g.op("ScatterND", g.zeros("int64", m + 1), place, ones)
    used = g.reshape(g.slice(present, 0, 0, m), -1, k) > 0
    w = g.where(used, weights.to(work), 0.0)
    terms = g.op("Reshape", g.slice(rows, 0, 0, m), g.shape(g.size(w, 0), k, width), allowzero=1)
    total = None
    for j in range(k):  # in the order of j, as the contract sums
        term = g.slice(w, 1, j, j + 1) * g.squeeze(g.slice(terms, 1, j, j + 1), 1)
        total = term if total is None else total + term
    assert total is not None
    return total.to(y.dtype)


def grouped_linear(g: Graph, x: Value, w: Weight, offsets: Value) -> Value:
    experts = w.shape[0]
    row = g.unsqueeze(g.arange(g.size(x, 0)), 1)
    ends = g.unsqueeze(g.slice(offsets.to("int64"), 0, 1, experts + 1), 0)
    owner = g.count(ends <= row, 1)
    here = owner < experts
    expert = g.where(here, owner, 0)
    y = _per_row(g, x, w, expert)
    return g.where(g.unsqueeze(here, 1), g.work(y), 0.0).to(x.dtype)


def _per_row(g: Graph, x: Value, w: Weight, expert: Value) -> Value:
    """quant_linear of every row with the weight [N, K] of its own expert."""
    activations, work = SCHEMES[w.quant].activations, work_dtype(x.dtype)
    if activations == "int8":
        q, scale = quant_int8(g, x)
        total = _rows_times(g, q.to("float64"), g.gather(w.weight.to("float32"), expert).to("float64"))
        return int8_rescaled(g, total, scale, g.squeeze(g.gather(w.scales(), expert), 2), x.dtype)
    if activations == "fp8":
        q, scale = act_quant(g, x, BLOCK, w.weight.dtype, w.scale_fmt, width=w.shape[-1])
        rows, real = scaled(g, q, scale, w.shape[-1], work), dequant_block(g, w.weight, w.scales(), work)
    else:
        rows, real = x.to(work), dequantize(g, w, x.dtype).to(work)
    return _rows_times(g, rows, g.gather(real, expert)).to(x.dtype)


def _rows_times(g: Graph, rows: Value, weights: Value) -> Value:
    """[M, K] and [M, N, K] -> [M, N]."""
    return g.squeeze(g.matmul(weights, g.unsqueeze(rows, 2)), 2)


def fused_experts(g: Graph, x: Value, weights: Value, ids: Value, w13: Weight, w2: Weight, topk: int | None = None) -> Value:
    k = topk if topk is not None else ids.shape[1] if ids.shape else None
    if k is None:
        raise AssertionError("the number of experts per token is known")
    perm, offsets = moe_permute(g, ids, w13.shape[0])
    pair = perm.to("int64")
    rows = g.gather(x, g.where(pair < 0, 0, pair) / k)
    h = silu_mul(g, grouped_linear(g, rows, w13, offsets))
    return moe_combine(g, grouped_linear(g, h, w2, offsets), perm, weights, k)


def moe(
    g: Graph,
    x: Value,
    gate: Value,
    bias: Value | None,
    w13: Weight,
    w2: Weight,
    shared13: Weight | None,
    shared2: Weight | None,
    n_group: int,
    topk_group: int,
    topk: int,
    score: str,
    group_score: str,
    renormalize: bool,
    scale: float,
    expert_map: Value | None = None,
) -> Value:
    weights, ids = route(g, x, gate, bias, n_group, topk_group, topk, score, group_score, renormalize, scale)
    if expert_map is not None:
        ids = g.gather(expert_map, ids)
    y = fused_experts(g, x, weights, ids, w13, w2, topk)
    if shared13 is None or shared2 is None:
        return y
    shared = quant_linear(g, silu_mul(g, quant_linear(g, x, shared13)), shared2)
    return (g.work(y) + g.work(shared)).to(x.dtype)
