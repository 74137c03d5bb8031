"""The weight tree: what the graph's modules read. First built of meta tensors, from the configuration; the loader puts the real
tensors into the same places."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from dsv3.graph.config import ModelConfig
from dsv3.plugin import Prepared, Quant
from dsv3.quant import SCHEMES, canonical
from dsv3.quant.fp8 import BLOCK


@dataclass(eq=False)
class AttentionWeights:
    """q_a, q_a_norm, q_b or q. kv_b is unquantised; w_uk [Nh, Dn, R] and w_uv [Nh, R, Dv] are views of it."""

    kv_a: Prepared
    kv_a_norm: Tensor
    kv_b: Prepared
    o: Prepared
    w_uk: Tensor
    w_uv: Tensor
    q: Prepared | None = None
    q_a: Prepared | None = None
    q_a_norm: Tensor | None = None
    q_b: Prepared | None = None


@dataclass(eq=False)
class MlpWeights:
    w13: Prepared
    w2: Prepared


@dataclass(eq=False)
class MoeWeights:
    gate: Tensor
    bias: Tensor | None
    w13: Prepared
    w2: Prepared
    shared13: Prepared | None = None
    shared2: Prepared | None = None


@dataclass(eq=False)
class LayerWeights:
    input_norm: Tensor
    post_norm: Tensor
    attn: AttentionWeights
    mlp: MlpWeights | MoeWeights


@dataclass(eq=False)
class MtpWeights:
    enorm: Tensor
    hnorm: Tensor
    eh_proj: Tensor
    norm: Tensor
    layer: LayerWeights


@dataclass(eq=False)
class ModelWeights:
    embed: Tensor
    norm: Tensor
    head: Tensor
    cos_sin: Tensor
    layers: list[LayerWeights] = field(default_factory=list)
    mtp: list[MtpWeights] = field(default_factory=list)


def meta_weights(
    c: ModelConfig, dtype: torch.dtype, quant: Quant, cos_sin: Tensor, mtp: bool = True, mtp_quant: Quant | None = None
) -> ModelWeights:
    """The whole tree in shapes only. dtype: of activations and unquantised weights; quant: of linears and experts;
    mtp_quant: of those in MTP modules, where it differs."""
    build = _Builder(c, dtype, quant)
    weights = ModelWeights(
        embed=build.plain(c.vocab_size, c.hidden_size),
        norm=build.plain(c.hidden_size),
        head=build.plain(c.vocab_size, c.hidden_size),
        cos_sin=cos_sin,
        layers=[build.layer(i) for i in range(c.num_hidden_layers)],
    )
    if mtp:
        build = _Builder(c, dtype, mtp_quant or quant)
        weights.mtp = [build.mtp(c.num_hidden_layers + k) for k in range(c.num_nextn_predict_layers)]
    return weights


class _Builder:
    def __init__(self, c: ModelConfig, dtype: torch.dtype, quant: Quant) -> None:
        self.c, self.dtype, self.quant = c, dtype, quant

    def plain(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.dtype, device="meta")

    def linear(self, *shape: int, quant: Quant | None = None) -> Prepared:
        quant = self.quant if quant is None else quant
        fmt = self.c.scale_fmt if SCHEMES[quant].weights == "fp8" else "float32"
        return Prepared("canonical", quant, shape, canonical(quant, shape, self.dtype, "meta"), fmt)  # type: ignore[arg-type]

    def padded(self, width: int) -> int:
        """An expert width as it is stored: for FP8 up to whole blocks, so that gate and up never share one."""
        return -(-width // BLOCK) * BLOCK if SCHEMES[self.quant].weights == "fp8" else width

    def attention(self) -> AttentionWeights:
        c, h = self.c, self.c.hidden_size
        heads, rank = c.num_attention_heads, c.kv_lora_rank
        kv_b = self.linear(heads * (c.qk_nope_head_dim + c.v_head_dim), rank, quant="none")
        w_uk, w_uv = absorbed(c, kv_b.tensors["weight"])
        attn = AttentionWeights(
            kv_a=self.linear(rank + c.qk_rope_head_dim, h),
            kv_a_norm=self.plain(rank),
            kv_b=kv_b,
            o=self.linear(h, heads * c.v_head_dim),
            w_uk=w_uk,
            w_uv=w_uv,
        )
        if c.q_lora_rank is None:
            attn.q = self.linear(heads * c.qk_head_dim, h)
        else:
            attn.q_a = self.linear(c.q_lora_rank, h)
            attn.q_a_norm = self.plain(c.q_lora_rank)
            attn.q_b = self.linear(heads * c.qk_head_dim, c.q_lora_rank)
        return attn

    def layer(self, index: int) -> LayerWeights:
        c, h = self.c, self.c.hidden_size
        if not c.is_moe(index):
            width = self.padded(c.intermediate_size)
            mlp: MlpWeights | MoeWeights = MlpWeights(self.linear(2 * width, h), self.linear(h, width))
        else:
            experts, width = c.n_routed_experts or 0, self.padded(c.moe_intermediate_size)
            mlp = MoeWeights(
                gate=self.plain(experts, h),
                bias=self.plain(experts, dtype=torch.float32) if c.has_router_bias else None,
                w13=self.linear(experts, 2 * width, h),
                w2=self.linear(experts, h, width),
            )
            if c.n_shared_experts:
                shared = self.padded(c.moe_intermediate_size * c.n_shared_experts)
                mlp.shared13, mlp.shared2 = self.linear(2 * shared, h), self.linear(h, shared)
        return LayerWeights(self.plain(h), self.plain(h), self.attention(), mlp)

    def mtp(self, index: int) -> MtpWeights:
        h = self.c.hidden_size
        return MtpWeights(self.plain(h), self.plain(h), self.plain(h, 2 * h), self.plain(h), self.layer(index))


def absorbed(c: ModelConfig, kv_b: Tensor) -> tuple[Tensor, Tensor]:
    """kv_b [Nh (Dn + Dv), R] as W_UK [Nh, Dn, R] and W_UV [Nh, R, Dv], both views."""
    per_head = kv_b.view(-1, c.qk_nope_head_dim + c.v_head_dim, kv_b.shape[1])
    return per_head[:, : c.qk_nope_head_dim], per_head[:, c.qk_nope_head_dim :].transpose(1, 2)


def walk(tree: Any, path: str = "") -> Iterator[tuple[str, Any, str, Tensor | Prepared]]:
    """(path, owner, field name, value) of every tensor and prepared weight in the tree."""
    for f in fields(tree):
        value = getattr(tree, f.name)
        here = f"{path}.{f.name}" if path else f.name
        if isinstance(value, Tensor | Prepared):
            yield here, tree, f.name, value
        elif isinstance(value, list):
            for i, item in enumerate(value):
                yield from walk(item, f"{here}.{i}")
        elif is_dataclass(value) and value is not None:
            yield from walk(value, here)
