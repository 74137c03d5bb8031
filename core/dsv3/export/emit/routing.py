"""Which experts a token goes to. TopK gives equal values in the order of their index, as the contract wants ties."""

from __future__ import annotations

from dsv3.export.builder import Graph, Value
from dsv3.export.emit.activation import sigmoid
from dsv3.export.emit.linear import router_gemm
from dsv3.export.emit.quantize import last


def grouped_topk(
    g: Graph,
    logits: Value,
    bias: Value | None,
    n_group: int,
    topk_group: int,
    topk: int,
    score: str = "sigmoid",
    group_score: str = "top2_sum",
    renormalize: bool = True,
    scale: float = 1.0,
    experts: int | None = None,
) -> tuple[Value, Value]:
    """experts: E, where logits are no input of the model."""
    e = last(logits) if experts is None else experts
    work = g.work(logits)
    scores = sigmoid(g, work) if score == "sigmoid" else g.op("Softmax", work, axis=-1)
    choice = scores if bias is None else scores + bias.to(scores.dtype)
    if n_group > 1:
        choice = _kept_groups(g, choice, e, n_group, topk_group, group_score)
    _, ids = top(g, choice, topk)
    # GatherElements of onnx.reference fails for more than 32 experts.
    first = g.unsqueeze(g.arange(g.size(ids, 0)), 1) * e
    weights = g.gather(g.reshape(scores, -1), ids + first)
    if renormalize:
        weights = weights / (g.reduce("Sum", weights, 1) + 1e-20)
    return weights * scale, ids.to("int32")


def top(g: Graph, x: Value, k: int | Value, largest: bool = True) -> tuple[Value, Value]:
    """The k largest or smallest of the last axis, in order, with their indices."""
    k = k if isinstance(k, Value) else g.ints(k)
    values, ids = g.ops("TopK", x, k, dtypes=(x.dtype, "int64"), axis=-1, largest=int(largest), sorted=1)
    return values, ids


def _kept_groups(g: Graph, choice: Value, e: int, n_group: int, topk_group: int, group_score: str) -> Value:
    """-inf in all but the best groups."""
    grouped = g.reshape(choice, -1, n_group, e // n_group)
    if group_score == "max":
        merit = g.reduce("Max", grouped, 2, keep=False)
    else:
        merit = g.reduce("Sum", top(g, grouped, 2)[0], 2, keep=False)
    _, kept = top(g, merit, topk_group)
    mine = g.arange(n_group)
    chosen = g.count(g.unsqueeze(kept, 2).equal(g.op("Reshape", mine, g.ints(1, 1, n_group))), 1) > 0
    masked = g.where(g.unsqueeze(chosen, 2), grouped, float("-inf"))
    return g.reshape(masked, -1, e)


def route(
    g: Graph,
    x: Value,
    gate: Value,
    bias: Value | None,
    n_group: int,
    topk_group: int,
    topk: int,
    score: str,
    group_score: str,
    renormalize: bool,
    scale: float,
) -> tuple[Value, Value]:
    if gate.shape is None:
        raise AssertionError("gate is an input of the model")
    logits = router_gemm(g, x, gate)
    return grouped_topk(
        g, logits, bias, n_group, topk_group, topk, score, group_score, renormalize, scale, experts=gate.shape[0]
    )
