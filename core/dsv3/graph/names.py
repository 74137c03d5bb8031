"""The tensors a checkpoint must hold, in Hugging Face's names, and where in the model each goes. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from dsv3.graph.config import ModelConfig

# linear: may be quantised. plain: never is. f32: must be float32. copy: repeats another tensor, may be absent.
Kind = Literal["linear", "plain", "f32", "copy"]
SCALE_SUFFIX = "_scale_inv"


@dataclass(frozen=True)
class Expected:
    """One tensor. `into` is a path in the weight tree, e.g. "layers.3.mlp.w13"; `half` its place in a fused gate/up weight;
    `copy_of` the tensor that a copy repeats. For Kind "linear" an FP8 checkpoint has a `<name>_scale_inv` beside it."""

    name: str
    shape: tuple[int, ...]
    kind: Kind
    into: str
    expert: int | None = None
    half: Literal["gate", "up"] | None = None
    copy_of: str = ""
    layer: int = -1


def expected_tensors(c: ModelConfig) -> Iterator[Expected]:
    """Every tensor of the model, MTP modules included. Lazy: a wrong configuration fails at its first missing tensor,
    however many layers it claims."""
    h, v = c.hidden_size, c.vocab_size
    yield Expected("model.embed_tokens.weight", (v, h), "plain", "embed")
    yield Expected("model.norm.weight", (h,), "plain", "norm")
    yield Expected("lm_head.weight", (v, h), "plain", "head")
    for i in range(c.num_hidden_layers):
        yield from _layer(c, i, f"layers.{i}")
    for k in range(c.num_nextn_predict_layers):
        yield from _mtp(c, c.num_hidden_layers + k, f"mtp.{k}")


def copy_names(c: ModelConfig) -> dict[str, str]:
    """Where the first MTP module repeats the embedding and the head."""
    prefix = f"model.layers.{c.num_hidden_layers}"
    return {
        "model.embed_tokens.weight": f"{prefix}.embed_tokens.weight",
        "lm_head.weight": f"{prefix}.shared_head.head.weight",
    }


def _mtp(c: ModelConfig, layer: int, into: str) -> Iterator[Expected]:
    prefix, h, v = f"model.layers.{layer}", c.hidden_size, c.vocab_size
    yield Expected(f"{prefix}.enorm.weight", (h,), "plain", f"{into}.enorm", layer=layer)
    yield Expected(f"{prefix}.hnorm.weight", (h,), "plain", f"{into}.hnorm", layer=layer)
    yield Expected(f"{prefix}.eh_proj.weight", (h, 2 * h), "plain", f"{into}.eh_proj", layer=layer)
    yield Expected(f"{prefix}.shared_head.norm.weight", (h,), "plain", f"{into}.norm", layer=layer)
    for name, original in (("embed_tokens", "model.embed_tokens.weight"), ("shared_head.head", "lm_head.weight")):
        yield Expected(f"{prefix}.{name}.weight", (v, h), "copy", "", copy_of=original, layer=layer)
    yield from _layer(c, layer, f"{into}.layer")


def _layer(c: ModelConfig, layer: int, into: str) -> Iterator[Expected]:
    prefix, h = f"model.layers.{layer}", c.hidden_size

    def one(name: str, shape: tuple[int, ...], kind: Kind, to: str) -> Expected:
        return Expected(f"{prefix}.{name}.weight", shape, kind, f"{into}.{to}", layer=layer)

    yield one("input_layernorm", (h,), "plain", "input_norm")
    yield one("post_attention_layernorm", (h,), "plain", "post_norm")
    heads, rank = c.num_attention_heads, c.kv_lora_rank
    if c.q_lora_rank is None:
        yield one("self_attn.q_proj", (heads * c.qk_head_dim, h), "linear", "attn.q")
    else:
        yield one("self_attn.q_a_proj", (c.q_lora_rank, h), "linear", "attn.q_a")
        yield one("self_attn.q_a_layernorm", (c.q_lora_rank,), "plain", "attn.q_a_norm")
        yield one("self_attn.q_b_proj", (heads * c.qk_head_dim, c.q_lora_rank), "linear", "attn.q_b")
    yield one("self_attn.kv_a_proj_with_mqa", (rank + c.qk_rope_head_dim, h), "linear", "attn.kv_a")
    yield one("self_attn.kv_a_layernorm", (rank,), "plain", "attn.kv_a_norm")
    yield one("self_attn.kv_b_proj", (heads * (c.qk_nope_head_dim + c.v_head_dim), rank), "linear", "attn.kv_b")
    yield one("self_attn.o_proj", (h, heads * c.v_head_dim), "linear", "attn.o")
    if not c.is_moe(layer):
        yield from _mlp(c, f"{prefix}.mlp", layer, c.intermediate_size, f"{into}.mlp.w13", f"{into}.mlp.w2")
        return
    assert c.n_routed_experts is not None
    yield one("mlp.gate", (c.n_routed_experts, h), "plain", "mlp.gate")
    if c.has_router_bias:
        name = f"{prefix}.mlp.gate.e_score_correction_bias"
        yield Expected(name, (c.n_routed_experts,), "f32", f"{into}.mlp.bias", layer=layer)
    width = c.moe_intermediate_size
    for e in range(c.n_routed_experts):
        yield from _mlp(c, f"{prefix}.mlp.experts.{e}", layer, width, f"{into}.mlp.w13", f"{into}.mlp.w2", e)
    if c.n_shared_experts:
        shared = f"{prefix}.mlp.shared_experts"
        width *= c.n_shared_experts
        yield from _mlp(c, shared, layer, width, f"{into}.mlp.shared13", f"{into}.mlp.shared2")


def _mlp(
    c: ModelConfig, prefix: str, layer: int, width: int, w13: str, w2: str, expert: int | None = None
) -> Iterator[Expected]:
    up_shape = (width, c.hidden_size)
    yield Expected(f"{prefix}.gate_proj.weight", up_shape, "linear", w13, expert, "gate", layer=layer)
    yield Expected(f"{prefix}.up_proj.weight", up_shape, "linear", w13, expert, "up", layer=layer)
    yield Expected(f"{prefix}.down_proj.weight", (c.hidden_size, width), "linear", w2, expert, layer=layer)


def ignorable(name: str) -> bool:
    """Tensors that old dumps hold and nobody needs."""
    return name.endswith("rotary_emb.inv_freq")
