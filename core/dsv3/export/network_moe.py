"""The feed-forward half of a layer in an exported model: dense, or a mixture of experts in one of two forms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dsv3.export.builder import Graph, Value, work_dtype
from dsv3.export.dtypes import code
from dsv3.export.emit.activation import silu_mul
from dsv3.export.emit.experts import moe_combine, moe_permute
from dsv3.export.emit.linear import linear
from dsv3.export.emit.routing import route
from dsv3.export.packages import onnx
from dsv3.graph.config import ModelConfig
from dsv3.graph.mlp import routing


def mlp(g: Graph, x: Value, w13: Value, w2: Value) -> Value:
    """down(silu(gate(x)) * up(x))."""
    return linear(g, silu_mul(g, linear(g, x, w13)), w2)


def moe(g: Graph, x: Value, weights: Mapping[str, Value], where: str, c: ModelConfig, gather: bool) -> Value:
    """DeepSeekMoE. gather: copy the weights of each token's experts, for few tokens; else one product per expert."""
    chosen, ids = route(g, x, weights[f"{where}.gate"], weights.get(f"{where}.bias"), **routing(c))
    w13, w2 = weights[f"{where}.w13"], weights[f"{where}.w2"]
    y = _gathered(g, x, chosen, ids, w13, w2) if gather else _by_expert(g, x, chosen, ids, w13, w2, c.num_experts_per_tok)
    if f"{where}.shared13" not in weights:
        return y
    shared = mlp(g, x, weights[f"{where}.shared13"], weights[f"{where}.shared2"])
    return (g.work(y) + g.work(shared)).to(x.dtype)


def _gathered(g: Graph, x: Value, chosen: Value, ids: Value, w13: Value, w2: Value) -> Value:
    """x [T, H], chosen f32 [T, k], ids [T, k], w13 [E, 2I, H], w2 [E, H, I] -> [T, H]."""
    column = g.unsqueeze(g.unsqueeze(g.work(x), 1), 3)
    h = g.squeeze(g.matmul(g.work(g.gather(w13, ids)), column), 3).to(x.dtype)
    h = g.unsqueeze(g.work(silu_mul(g, h)), 3)
    y = g.squeeze(g.matmul(g.work(g.gather(w2, ids)), h), 3).to(x.dtype)
    total = g.matmul(g.unsqueeze(chosen, 1), g.work(y))
    return g.squeeze(total, 1).to(x.dtype)


def _by_expert(g: Graph, x: Value, chosen: Value, ids: Value, w13: Value, w2: Value, k: int) -> Value:
    """The same, with the pairs sorted by expert and a loop over the experts: each reads its weights once, whatever T is, and
    the graph does not grow with E."""
    assert w13.shape is not None and w13.shape[0] is not None
    experts = w13.shape[0]
    perm, offsets = moe_permute(g, ids, experts)
    rows = g.gather(x, perm.to("int64") / k)
    work = work_dtype(x.dtype)  # sequences of bfloat16 do not exist
    (parts,) = g.ops("SequenceEmpty", dtypes=(work,), dtype=code(work))
    body = _expert_body(g, rows, offsets.to("int64"), w13, w2)
    # A condition that is left out means true to ONNX Runtime and the standard, but false to onnx.reference.
    parts = g.op("Loop", g.const(experts, "int64"), g.const(True, "bool"), parts, dtype=work, body=body)
    y = g.op("ConcatFromSequence", parts, axis=0).to(x.dtype)
    return moe_combine(g, y, perm, chosen, k)


def _expert_body(outer: Graph, rows: Value, offsets: Value, w13: Value, w2: Value) -> Any:
    """Appends one expert's rows [n, H] to the sequence. It reads the values of the graph around it."""
    g = outer.inside()
    expert, parts = Value(g, f"{g.scope}expert", "int64"), Value(g, f"{g.scope}parts", work_dtype(rows.dtype))
    first, last = (g.gather(offsets, g.unsqueeze(expert + n, 0)) for n in (0, 1))
    y = mlp(g, g.slice(rows, 0, first, last), g.gather(w13, expert), g.gather(w2, expert))
    more = g.op("SequenceInsert", parts, g.work(y))
    go = f"{g.scope}go"
    keep = g.identity(Value(g, go, "bool"))
    helper, kind = onnx().helper, onnx().TensorProto
    sequence = helper.make_tensor_sequence_value_info
    return helper.make_graph(
        g.nodes,
        "expert",
        [
            helper.make_tensor_value_info(expert.name, kind.INT64, []),
            helper.make_tensor_value_info(go, kind.BOOL, []),
            sequence(parts.name, code(parts.dtype), None),
        ],
        [helper.make_tensor_value_info(keep.name, kind.BOOL, []), sequence(more.name, code(parts.dtype), None)],
    )
