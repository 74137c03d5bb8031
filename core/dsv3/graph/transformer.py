"""The whole graph: embedding, blocks, final norm, head, and the MTP modules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from dsv3.graph.block import Block
from dsv3.graph.config import ModelConfig
from dsv3.graph.step import Step
from dsv3.graph.weights import ModelWeights, MtpWeights
from dsv3.plugin import LatentCache


class Mtp:
    """One multi-token-prediction module: combine the next token's embedding with a hidden state, one block, a norm.

    Source: DeepSeek-V3 technical report, 2.2. The entry of token i + 1 lives at slot and position i + 1.
    """

    def __init__(self, c: ModelConfig, w: MtpWeights, sites: Any, where: str, group: Any = None) -> None:
        self.w, self.eps = w, c.rms_norm_eps
        self.combine = sites("mtp_combine", f"{where}.eh_proj")
        self.block = Block(c, w.layer, sites, where, group)
        self.norm = sites("add_rms_norm", f"{where}.shared_head.norm")

    def __call__(self, embedding: Tensor, hidden: Tensor, step: Step, cache: LatentCache, cos_sin: Tensor) -> Tensor:
        b, w = step.bucket, self.w
        z = self.combine[b](embedding=embedding, hidden=hidden, enorm=w.enorm, hnorm=w.hnorm, eh_proj=w.eh_proj, eps=self.eps)
        x, residual = self.block(None, z, step, cache, cos_sin)
        return self.norm[b](x=x, residual=residual, weight=w.norm, eps=self.eps)[0]


class Transformer:
    """The graph over a weight tree. `sites` declares call sites; `group` is the process group that shares layers, or None."""

    def __init__(self, c: ModelConfig, w: ModelWeights, sites: Any, group: Any = None) -> None:
        self.config, self.w = c, w
        self.embedding = sites("embedding", "embed_tokens")
        self.blocks = [Block(c, layer, sites, f"layers.{i}", group) for i, layer in enumerate(w.layers)]
        self.norm = sites("add_rms_norm", "norm")
        self.head = sites("linear", "lm_head")
        first = c.num_hidden_layers
        self.mtp = [Mtp(c, m, sites, f"layers.{first + k}", group) for k, m in enumerate(w.mtp)]

    def forward(self, step: Step, caches: Sequence[LatentCache]) -> tuple[Tensor, Tensor]:
        """Hidden states [T, H] after the final norm, and what an MTP module takes (the same, or before the norm)."""
        b, w = step.bucket, self.w
        x, residual = None, self.embedding[b](ids=step.ids, table=w.embed)
        for block, cache in zip(self.blocks, caches, strict=False):
            x, residual = block(x, residual, step, cache, w.cos_sin)
        hidden, before = self.norm[b](x=x, residual=residual, weight=w.norm, eps=self.config.rms_norm_eps)
        return hidden, hidden if self.config.mtp_hidden == "post_norm" else before

    def mtp_forward(self, step: Step, hidden: Tensor, caches: Sequence[LatentCache], module: int = 0) -> Tensor:
        """Hidden states [T, H] of an MTP module after its own norm; step.ids are the tokens after those of `hidden`."""
        embedding = self.embedding[step.bucket](ids=step.ids, table=self.w.embed)
        cache = caches[len(self.blocks) + module]
        return self.mtp[module](embedding, hidden, step, cache, self.w.cos_sin)

    def logits(self, hidden: Tensor, bucket: int) -> Tensor:
        """[T, V] in the dtype of hidden."""
        return self.head[bucket](x=hidden, weight=self.w.head, bias=None)
