"""The feed-forward half of a block: a dense MLP, or a mixture of experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from dsv3.graph.config import ModelConfig
from dsv3.graph.weights import MlpWeights, MoeWeights


class Mlp:
    """down(silu(gate(x)) * up(x)), gate and up as one weight."""

    def __init__(self, w: MlpWeights, sites: Any, where: str) -> None:
        self.w = w
        self.up = sites("quant_linear", f"{where}.gate_up_proj")
        self.act = sites("silu_mul", where)
        self.down = sites("quant_linear", f"{where}.down_proj")

    def __call__(self, x: Tensor, bucket: int) -> Tensor:
        return self.down[bucket](x=self.act[bucket](x=self.up[bucket](x=x, w=self.w.w13)), w=self.w.w2)


def routing(c: ModelConfig) -> dict[str, Any]:
    """The router's scalar arguments; "greedy" knows no groups."""
    grouped = c.topk_method != "greedy"
    return {
        "n_group": c.n_group if grouped else 1,
        "topk_group": c.topk_group if grouped else 1,
        "topk": c.num_experts_per_tok,
        "score": c.scoring_func,
        "group_score": c.group_score,
        "renormalize": c.norm_topk_prob,
        "scale": c.routed_scaling_factor,
    }


class Moe:
    """DeepSeekMoE. `expert_map` i32 [E]: global expert to this rank's, -1 elsewhere; None where all are here."""

    def __init__(self, c: ModelConfig, w: MoeWeights, sites: Any, where: str, expert_map: Tensor | None = None) -> None:
        self.w = w
        self.expert_map = expert_map
        self.routing = routing(c)
        self.moe = sites("moe", where)
        self.watch: Callable[[Tensor], None] | None = None  # told what the layer is given

    def __call__(self, x: Tensor, bucket: int) -> Tensor:
        w = self.w
        if self.watch is not None:
            self.watch(x)
        return self.moe[bucket](
            x=x,
            gate=w.gate,
            bias=w.bias,
            w13=w.w13,
            w2=w.w2,
            shared13=w.shared13,
            shared2=w.shared2,
            expert_map=self.expert_map,
            **self.routing,
        )
