"""config.json as Hugging Face writes it, in the spellings of the original releases and of transformers 5."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dsv3.errors import UnsupportedModel
from dsv3.graph.config import ModelConfig, Yarn
from dsv3.graph.fields import Fields
from dsv3.graph.quantization import read

# kimi_k2 is V3 with other numbers. What a model type leaves out of its config.json takes the value here.
_V3 = {
    "topk_method": "noaux_tc", "scoring_func": "sigmoid", "norm_topk_prob": True, "n_group": 8, "topk_group": 4,
    "routed_scaling_factor": 2.5, "first_k_dense_replace": 3,
}  # fmt: skip
_V2 = {
    "topk_method": "greedy", "scoring_func": "softmax", "norm_topk_prob": False, "n_group": 1, "topk_group": 1,
    "routed_scaling_factor": 1.0, "first_k_dense_replace": 0,
}  # fmt: skip
# What a field that is there but null stands for.
_NULL = {"n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0, "first_k_dense_replace": 0}
MODEL_TYPES: dict[str, Mapping[str, Any]] = {"deepseek_v3": _V3, "kimi_k2": _V3, "deepseek_v2": _V2}
SUPPORTED = "supported are deepseek_v3 (V3, R1, V3.1, Moonlight), deepseek_v2 (V2, V2-Lite) and kimi_k2"
_REFUSED = {
    "deepseek_v32": "DeepSeek Sparse Attention (the lightning indexer of V3.2)",
    "deepseek_v4": "the DeepSeek-V4 architecture",
}
# Fields that change the arithmetic, with the only value that this program computes.
_FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "tie_word_embeddings": (False,),
    "rope_interleave": (True,),
    "mtp_hidden_states_first": (False,),
    "sliding_window": (),
    "index_topk": (),
    "index_n_heads": (),
    "vision_config": (),
    "text_config": (),
}
MAX_POSITIONS = 1 << 22  # the table of angles has a row for each
MAX_LAYERS = 1024
_METHODS = ("noaux_tc", "group_limited_greedy", "greedy")


def from_hf(values: Mapping[str, Any], source: str = "config.json") -> ModelConfig:
    """ModelConfig from the fields of a config.json. CheckpointError for a field that is missing or malformed,
    UnsupportedModel for one that asks for something dsv3 does not compute."""
    f = Fields(values, source)
    model_type = f.text("model_type")
    _refuse(values, model_type, source)
    defaults = {**MODEL_TYPES[model_type], **{k: v for k, v in _NULL.items() if k in values}}
    heads = f.integer("num_attention_heads")
    if (kv_heads := f.optional_integer("num_key_value_heads")) not in (None, heads):
        raise f.wrong("num_key_value_heads", kv_heads, f"num_attention_heads ({heads}): MLA has no grouped heads")
    experts = f.optional_integer("n_routed_experts")
    if experts is None:
        experts = f.optional_integer("num_local_experts")
    quantization = read(f)
    config = ModelConfig(
        model_type=model_type,
        vocab_size=f.integer("vocab_size"),
        hidden_size=f.integer("hidden_size"),
        intermediate_size=f.integer("intermediate_size"),
        moe_intermediate_size=f.integer("moe_intermediate_size", None if experts else 1),
        num_hidden_layers=f.integer("num_hidden_layers", maximum=MAX_LAYERS),
        num_attention_heads=heads,
        first_k_dense_replace=f.integer("first_k_dense_replace", defaults["first_k_dense_replace"], minimum=0),
        moe_layer_freq=f.integer("moe_layer_freq", 1),
        q_lora_rank=f.optional_integer("q_lora_rank"),
        kv_lora_rank=f.integer("kv_lora_rank"),
        qk_nope_head_dim=f.integer("qk_nope_head_dim"),
        qk_rope_head_dim=f.integer("qk_rope_head_dim", minimum=2),
        v_head_dim=f.integer("v_head_dim"),
        n_routed_experts=experts,
        n_shared_experts=f.integer("n_shared_experts", 0, minimum=0),
        num_experts_per_tok=f.integer("num_experts_per_tok", None if experts else 1),
        n_group=f.integer("n_group", defaults["n_group"]),
        topk_group=f.integer("topk_group", defaults["topk_group"]),
        topk_method=f.text("topk_method", defaults["topk_method"]),
        scoring_func=f.text("scoring_func", defaults["scoring_func"]),
        norm_topk_prob=f.flag("norm_topk_prob", defaults["norm_topk_prob"]),
        routed_scaling_factor=f.number("routed_scaling_factor", defaults["routed_scaling_factor"], 1e-6, 1e6),
        rms_norm_eps=f.number("rms_norm_eps", 1e-6, 0.0, 1.0),
        max_position_embeddings=f.integer("max_position_embeddings", maximum=MAX_POSITIONS),
        rope_theta=_rope_theta(f),
        rope_scaling=_yarn(f),
        num_nextn_predict_layers=_mtp_layers(f),
        bos_token_id=f.optional_integer("bos_token_id", minimum=0),
        eos_token_id=_token_ids(f, "eos_token_id"),
        torch_dtype=_dtype(f),
        quant_method=quantization.method,
        scale_fmt=quantization.scale_fmt,
        quant_activations=quantization.activations,
        mtp_hidden=f.text("mtp_hidden", "post_norm"),
    )
    return checked(config, f)


def _refuse(values: Mapping[str, Any], model_type: str, source: str) -> None:
    if model_type not in MODEL_TYPES:
        what = _REFUSED.get(model_type, f"model_type {model_type!r}")
        raise UnsupportedModel(f"{source}: {what} is not supported (model_type {model_type!r}); {SUPPORTED}")
    for name, allowed in _FIXED.items():
        value = values.get(name)
        if value is not None and value not in allowed:
            wanted = f"only {allowed[0]!r} is" if allowed else "no value is"
            raise UnsupportedModel(f"{source}: {name} = {value!r} is not supported; {wanted}")


def checked(c: ModelConfig, f: Fields) -> ModelConfig:
    """The configuration, if its fields agree with one another."""
    if c.qk_rope_head_dim % 2:
        raise f.wrong("qk_rope_head_dim", c.qk_rope_head_dim, "an even number")
    if c.torch_dtype not in ("bfloat16", "float32", "float64"):
        raise UnsupportedModel(f"{f.source}: torch_dtype {c.torch_dtype!r} is not supported")
    if c.mtp_hidden not in ("post_norm", "pre_norm"):
        raise f.wrong("mtp_hidden", c.mtp_hidden, "'post_norm' or 'pre_norm'")
    for name, ids in (("eos_token_id", c.eos_token_id), ("bos_token_id", (c.bos_token_id or 0,))):
        if any(i >= c.vocab_size for i in ids):
            raise f.wrong(name, max(ids), f"an id in the vocabulary of {c.vocab_size}")
    if c.n_routed_experts is None:
        return c
    if c.topk_method not in _METHODS:
        raise UnsupportedModel(f"{f.source}: topk_method {c.topk_method!r} is not supported; {', '.join(_METHODS)} are")
    if c.scoring_func not in ("sigmoid", "softmax"):
        raise UnsupportedModel(f"{f.source}: scoring_func {c.scoring_func!r} is not supported; sigmoid and softmax are")
    if c.n_routed_experts % c.n_group:
        raise f.wrong("n_group", c.n_group, f"a divisor of n_routed_experts ({c.n_routed_experts})")
    if c.topk_group > c.n_group:
        raise f.wrong("topk_group", c.topk_group, f"at most n_group ({c.n_group})")
    usable = c.n_routed_experts // c.n_group * c.topk_group if c.topk_method != "greedy" else c.n_routed_experts
    if c.num_experts_per_tok > usable:
        raise f.wrong("num_experts_per_tok", c.num_experts_per_tok, f"at most {usable} experts in {c.topk_group} groups")
    if c.topk_method == "noaux_tc" and c.n_group > 1 and c.n_routed_experts // c.n_group < 2:
        raise f.wrong("n_group", c.n_group, "groups of at least 2 experts, for the sum of the two best")
    return c


def _mtp_layers(f: Fields) -> int:
    name = "num_nextn_predict_layers" if f.values.get("num_nextn_predict_layers") is not None else "num_mtp_layers"
    return f.integer(name, 0, minimum=0, maximum=MAX_LAYERS)


def _dtype(f: Fields) -> str:
    name = "torch_dtype" if f.values.get("torch_dtype") is not None else "dtype"
    return f.text(name, "bfloat16").removeprefix("torch.")


def _token_ids(f: Fields, name: str) -> tuple[int, ...]:
    value = f.values.get(name)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
        raise f.wrong(name, value, "a token id or a list of them")
    return tuple(ids)


def _rope_table(f: Fields) -> Fields | None:
    return f.table("rope_parameters") or f.table("rope_scaling")


def _rope_theta(f: Fields) -> float:
    table = f.table("rope_parameters")
    if table is not None and table.values.get("rope_theta") is not None:
        return table.number("rope_theta", minimum=1.0001)
    return f.number("rope_theta", 10000.0, minimum=1.0001)


def _yarn(f: Fields) -> Yarn | None:
    table = _rope_table(f)
    if table is None:
        return None
    kind = table.values.get("rope_type") or table.values.get("type") or "default"
    if kind == "default":
        return None
    if kind != "yarn":
        raise UnsupportedModel(f"{table.source}: rope type {kind!r} is not supported; yarn and default are")
    original = table.optional_integer("original_max_position_embeddings")
    factor = table.values.get("attention_factor")
    return Yarn(
        factor=table.number("factor", minimum=1.0, maximum=1e6),
        original_max_position_embeddings=original or f.integer("max_position_embeddings"),
        beta_fast=table.number("beta_fast", 32.0, 1e-3, 1e6),
        beta_slow=table.number("beta_slow", 1.0, 1e-3, 1e6),
        mscale=table.number("mscale", 1.0, 0.0, 1e3),
        mscale_all_dim=table.number("mscale_all_dim", 0.0, 0.0, 1e3),
        attention_factor=None if factor is None else table.number("attention_factor", minimum=1e-3, maximum=1e3),
        truncate=table.flag("truncate", True),
    )
