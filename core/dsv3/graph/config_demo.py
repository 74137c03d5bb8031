"""The configuration of DeepSeek's own inference demo: its `ModelArgs` as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dsv3.errors import UnsupportedModel, nearest
from dsv3.graph.config import ModelConfig, Yarn
from dsv3.graph.config_hf import MAX_LAYERS, MAX_POSITIONS, checked
from dsv3.graph.fields import Fields

# What a file may leave out, with the demo's own defaults.
DEFAULTS: dict[str, Any] = {
    "max_batch_size": 8, "max_seq_len": 16384, "dtype": "bf16", "scale_fmt": None, "vocab_size": 102400, "dim": 2048,
    "inter_dim": 10944, "moe_inter_dim": 1408, "n_layers": 27, "n_dense_layers": 1, "n_heads": 16, "n_routed_experts": 64,
    "n_shared_experts": 2, "n_activated_experts": 6, "n_expert_groups": 1, "n_limited_groups": 1, "score_func": "softmax",
    "route_scale": 1.0, "q_lora_rank": 0, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
    "v_head_dim": 128, "original_seq_len": 4096, "rope_theta": 10000.0, "rope_factor": 40, "beta_fast": 32, "beta_slow": 1,
    "mscale": 1.0,
}  # fmt: skip
# Not the demo's: how many MTP modules a converted checkpoint keeps.
_MTP = "n_mtp_layers"


def is_demo(values: Mapping[str, Any]) -> bool:
    """Whether a JSON object is ModelArgs rather than a Hugging Face configuration."""
    return "dim" in values and "hidden_size" not in values


def from_demo(values: Mapping[str, Any], source: str = "config.json") -> ModelConfig:
    """ModelConfig from ModelArgs.

    As in the demo, YaRN and its softmax factor are on only if max_seq_len > original_seq_len: the same weights with a shorter
    max_seq_len are a different model. Sigmoid scores mean a router bias and normalised weights (noaux_tc).
    """
    known = [*DEFAULTS, _MTP]
    for name in values:
        if name not in known:
            raise UnsupportedModel(f"{source}: ModelArgs field {name!r} is not known{nearest(name, known)}")
    f = Fields({**DEFAULTS, **{k: v for k, v in values.items() if v is not None}}, source)
    dtype, scale_fmt = f.text("dtype"), f.values["scale_fmt"] or "float32"
    if dtype not in ("bf16", "fp8"):
        raise UnsupportedModel(f"{source}: dtype {dtype!r} is not supported; bf16 and fp8 are")
    if scale_fmt not in ("float32", "ue8m0"):
        raise UnsupportedModel(f"{source}: scale_fmt {scale_fmt!r} is not supported; ue8m0 is")
    sigmoid, groups = f.text("score_func") == "sigmoid", f.integer("n_expert_groups")
    greedy = "group_limited_greedy" if groups > 1 else "greedy"
    length, original = f.integer("max_seq_len", maximum=MAX_POSITIONS), f.integer("original_seq_len")
    mscale = f.number("mscale", maximum=1e3)
    yarn = Yarn(
        factor=f.number("rope_factor", minimum=1.0, maximum=1e6),
        original_max_position_embeddings=original,
        beta_fast=f.number("beta_fast", minimum=1e-3),
        beta_slow=f.number("beta_slow", minimum=1e-3),
        mscale=mscale,
        mscale_all_dim=mscale,
    )
    config = ModelConfig(
        model_type="deepseek_v3" if sigmoid else "deepseek_v2",
        vocab_size=f.integer("vocab_size"),
        hidden_size=f.integer("dim"),
        intermediate_size=f.integer("inter_dim"),
        moe_intermediate_size=f.integer("moe_inter_dim"),
        num_hidden_layers=f.integer("n_layers", maximum=MAX_LAYERS),
        num_attention_heads=f.integer("n_heads"),
        first_k_dense_replace=f.integer("n_dense_layers", minimum=0),
        moe_layer_freq=1,
        q_lora_rank=f.integer("q_lora_rank", minimum=0) or None,
        kv_lora_rank=f.integer("kv_lora_rank"),
        qk_nope_head_dim=f.integer("qk_nope_head_dim"),
        qk_rope_head_dim=f.integer("qk_rope_head_dim", minimum=2),
        v_head_dim=f.integer("v_head_dim"),
        n_routed_experts=f.integer("n_routed_experts"),
        n_shared_experts=f.integer("n_shared_experts", minimum=0),
        num_experts_per_tok=f.integer("n_activated_experts"),
        n_group=groups,
        topk_group=f.integer("n_limited_groups"),
        topk_method="noaux_tc" if sigmoid else greedy,
        scoring_func=f.text("score_func"),
        norm_topk_prob=sigmoid,
        routed_scaling_factor=f.number("route_scale", minimum=1e-6, maximum=1e6),
        rms_norm_eps=1e-6,
        max_position_embeddings=length,
        rope_theta=f.number("rope_theta", minimum=1.0001),
        rope_scaling=yarn if length > original else None,
        num_nextn_predict_layers=f.integer(_MTP, 0, minimum=0),
        bos_token_id=None,
        eos_token_id=(),
        torch_dtype="bfloat16",
        quant_method="fp8" if dtype == "fp8" else "none",
        scale_fmt=scale_fmt,
    )
    return checked(config, f)
