"""One layer's feed-forward half over the text: a dense MLP, or the experts one by one."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv3 import ops
from dsv3.checkpoint.calibrate.source import Source, mlp
from dsv3.checkpoint.calibrate.taps import Taps
from dsv3.checkpoint.calibrate.visitor import Feed, Visitor, identity
from dsv3.graph.mlp import Mlp, routing

# An expert that few tokens choose is fitted to some of the others too, which weigh little.
_FEW, _LITTLE = 256, 0.02


def feed_forward(source: Source, visitor: Visitor, x: Tensor, layer: int) -> Tensor:
    """x [T, H] after the norm -> what the layer adds, with the linears that the visitor gives."""
    c, prefix = source.config, f"model.layers.{layer}"
    norm = {f"{prefix}.post_attention_layernorm.weight": None}
    if not c.is_moe(layer):
        visitor.feed(Feed(x, _entries(f"{prefix}.mlp"), norm))
        return _one(source, visitor, f"{prefix}.mlp", x, None)
    experts = [f"{prefix}.mlp.experts.{e}" for e in range(c.n_routed_experts or 0)]
    shared = [f"{prefix}.mlp.shared_experts"] if c.n_shared_experts else []
    names = [name for one in (*shared, *experts) for name in _entries(one)]
    visitor.feed(Feed(x, names, norm, [f"{prefix}.mlp.gate.weight"]))
    made = _one(source, visitor, shared[0], x, None) if shared else torch.zeros_like(x)
    weights, ids = _route(source, f"{prefix}.mlp.gate", x)
    for e, name in enumerate(experts):
        rows, places = (ids == e).nonzero(as_tuple=True)
        # Tokens spread over the text, in case too few choose the expert; they are computed and thrown away.
        others = torch.arange(0, x.shape[0], max(1, x.shape[0] // _FEW)) if len(rows) < _FEW else rows[:0]
        counts = torch.cat([torch.ones(len(rows)), torch.full((len(others),), _LITTLE)])
        y = _one(source, visitor, name, x[torch.cat([rows, others])], counts)
        made.index_add_(0, rows, y[: len(rows)] * weights[rows, places][:, None])
    return made


def _entries(prefix: str) -> list[str]:
    return [f"{prefix}.gate_proj.weight", f"{prefix}.up_proj.weight"]


def _route(source: Source, prefix: str, x: Tensor) -> tuple[Tensor, Tensor]:
    bias = f"{prefix}.e_score_correction_bias"
    given = source.real(bias) if source.config.has_router_bias else None
    weights, ids = ops.route(x=x, gate=source.real(f"{prefix}.weight"), bias=given, **routing(source.config))
    return weights, ids


def _one(source: Source, visitor: Visitor, prefix: str, x: Tensor, counts: Tensor | None) -> Tensor:
    """A dense MLP or one expert, its linears rounded in the order in which they work."""
    entries = {name: source.real(name) for name in _entries(prefix)}
    gate, up = visitor.round(entries, x, counts).values()
    down_name = f"{prefix}.down_proj.weight"
    down = source.real(down_name)
    taps = Taps()
    y: Tensor = Mlp(mlp(gate, up, down), taps, prefix)(x, 0)
    (inner,) = taps.inputs["down_proj"]
    visitor.feed(Feed(inner, [down_name], {f"{prefix}.up_proj.weight": identity(inner.shape[1])}))
    rounded = visitor.round({down_name: down}, inner, counts)[down_name]
    return y if rounded is down else inner @ rounded.T
