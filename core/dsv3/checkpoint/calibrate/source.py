"""Weights of a checkpoint as real numbers, one at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv3.checkpoint.loader import as_tensor
from dsv3.checkpoint.reader import Reader, check_contents
from dsv3.checkpoint.unpack import real_rows
from dsv3.checkpoint.validate import LoadPlan
from dsv3.graph.config import ModelConfig
from dsv3.graph.weights import AttentionWeights, MlpWeights, absorbed
from dsv3.plugin import Prepared


class Source:
    """Tensors by their Hugging Face name."""

    def __init__(self, config: ModelConfig, plan: LoadPlan, reader: Reader) -> None:
        self.config, self._reader = config, reader
        self._items = {item.expected.name: item for item in plan.items}

    def has(self, name: str) -> bool:
        return name in self._items

    def real(self, name: str) -> Tensor:
        """The tensor in float32, [N, K] for a linear."""
        item = self._items[name]
        codes = self._reader.array(item.entry)
        check_contents(item.entry, codes)
        scale = None if item.scale is None else self._reader.array(item.scale)
        if item.scale is None or scale is None:
            return as_tensor(codes).to(torch.float32)
        check_contents(item.scale, scale, scale=True)
        n, k = item.expected.shape
        return real_rows(as_tensor(codes), as_tensor(scale), item.stored, k, 0, n, torch.float32)

    def attention(self, weights: dict[str, Tensor], prefix: str) -> AttentionWeights:
        """A layer's attention over the linears in `weights`; its norms are read."""
        c = self.config
        kv_b = weights[f"{prefix}.kv_b_proj.weight"]
        w_uk, w_uv = absorbed(c, kv_b)
        made = AttentionWeights(
            kv_a=plain(weights[f"{prefix}.kv_a_proj_with_mqa.weight"]),
            kv_a_norm=self.real(f"{prefix}.kv_a_layernorm.weight"),
            kv_b=plain(kv_b),
            o=plain(weights[f"{prefix}.o_proj.weight"]),
            w_uk=w_uk,
            w_uv=w_uv,
        )
        if c.q_lora_rank is None:
            made.q = plain(weights[f"{prefix}.q_proj.weight"])
        else:
            made.q_a = plain(weights[f"{prefix}.q_a_proj.weight"])
            made.q_a_norm = self.real(f"{prefix}.q_a_layernorm.weight")
            made.q_b = plain(weights[f"{prefix}.q_b_proj.weight"])
        return made


def plain(weight: Tensor) -> Prepared:
    """An unquantised weight as the graph takes it."""
    return Prepared("canonical", "none", tuple(weight.shape), {"weight": weight})


def mlp(gate: Tensor, up: Tensor, down: Tensor) -> MlpWeights:
    """A dense MLP, or one expert."""
    return MlpWeights(plain(torch.cat([gate, up])), plain(down))
