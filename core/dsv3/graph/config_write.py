"""A configuration as Hugging Face's config.json: the inverse of `config_hf.from_hf`."""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import Any

from dsv3.graph.config import ModelConfig
from dsv3.graph.quantization import Quantization, write

_ARCHITECTURES = {"deepseek_v2": "DeepseekV2ForCausalLM"}
# Fields of ModelConfig that config.json spells otherwise.
_OTHERWISE = ("rope_scaling", "quant_method", "scale_fmt", "quant_activations", "eos_token_id", "mtp_hidden")


def to_hf(c: ModelConfig) -> dict[str, Any]:
    """The fields that `from_hf` reads."""
    architecture = _ARCHITECTURES.get(c.model_type, "DeepseekV3ForCausalLM")
    values: dict[str, Any] = {"architectures": [architecture]}
    values |= {f.name: getattr(c, f.name) for f in fields(c) if f.name not in _OTHERWISE}
    values |= {"num_key_value_heads": c.num_attention_heads, "hidden_act": "silu", "attention_bias": False}
    values |= {"tie_word_embeddings": False, "eos_token_id": list(c.eos_token_id) or None}
    if len(c.eos_token_id) == 1:
        values["eos_token_id"] = c.eos_token_id[0]
    if c.mtp_hidden != "post_norm":
        values["mtp_hidden"] = c.mtp_hidden
    if c.rope_scaling is not None:
        values["rope_scaling"] = {"type": "yarn", **{k: v for k, v in asdict(c.rope_scaling).items() if v is not None}}
    quantization = write(Quantization(c.quant_method, c.scale_fmt, c.quant_activations))
    if quantization is not None:
        values["quantization_config"] = quantization
    return values
