"""A decoder block: attention and feed-forward, each after a norm and added to the residual stream."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dsv3.graph.config import ModelConfig
from dsv3.graph.mla import Attention
from dsv3.graph.mlp import Mlp, Moe
from dsv3.graph.step import Step
from dsv3.graph.weights import LayerWeights, MoeWeights
from dsv3.plugin import LatentCache


class Block:
    """x is what the previous block added and is not yet in the residual (None before the first): adding and normalising are one
    operator."""

    def __init__(self, c: ModelConfig, w: LayerWeights, sites: Any, where: str, group: Any = None) -> None:
        self.w, self.eps, self.group = w, c.rms_norm_eps, group
        self.first_norm = sites("rms_norm", f"{where}.input_layernorm")
        self.input_norm = sites("add_rms_norm", f"{where}.input_layernorm")
        self.post_norm = sites("add_rms_norm", f"{where}.post_attention_layernorm")
        self.attn = Attention(c, w.attn, sites, f"{where}.self_attn")
        self.mlp: Mlp | Moe = (
            Moe(c, w.mlp, sites, f"{where}.mlp") if isinstance(w.mlp, MoeWeights) else Mlp(w.mlp, sites, f"{where}.mlp")
        )
        self.reduce_attn = sites("all_reduce", f"{where}.self_attn")
        self.reduce_mlp = sites("all_reduce", f"{where}.mlp")

    def __call__(
        self, x: Tensor | None, residual: Tensor, step: Step, cache: LatentCache, cos_sin: Tensor
    ) -> tuple[Tensor, Tensor]:
        b, w, eps = step.bucket, self.w, self.eps
        if x is None:
            normed = self.first_norm[b](x=residual, weight=w.input_norm, eps=eps)
        else:
            normed, residual = self.input_norm[b](x=x, residual=residual, weight=w.input_norm, eps=eps)
        a = self.attn(normed, step, cache, cos_sin)
        if self.group is not None:
            a = self.reduce_attn[b](x=a, group=self.group)
        normed, residual = self.post_norm[b](x=a, residual=residual, weight=w.post_norm, eps=eps)
        out = self.mlp(normed, b)
        if self.group is not None:
            out = self.reduce_mlp[b](x=out, group=self.group)
        return out, residual
