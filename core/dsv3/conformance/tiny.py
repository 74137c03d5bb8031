"""A small random DeepSeek-V3: one dense layer, two with experts, an MTP module; every part of the family in 2 MB."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from dsv3.conformance.data import Data
from dsv3.graph.config_hf import from_hf
from dsv3.graph.names import expected_tensors

CONFIG: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "vocab_size": 256, "hidden_size": 256,
    "intermediate_size": 384, "moe_intermediate_size": 128, "num_hidden_layers": 3, "first_k_dense_replace": 1,
    "num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 128, "kv_lora_rank": 128, "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16, "v_head_dim": 32, "n_routed_experts": 16, "n_shared_experts": 1, "num_experts_per_tok": 4,
    "n_group": 4, "topk_group": 2, "topk_method": "noaux_tc", "scoring_func": "sigmoid", "norm_topk_prob": True,
    "routed_scaling_factor": 2.5, "rms_norm_eps": 1e-6, "max_position_embeddings": 2048, "rope_theta": 10000.0,
    "rope_scaling": {"type": "yarn", "factor": 16, "original_max_position_embeddings": 64, "beta_fast": 32, "beta_slow": 1,
                     "mscale": 1.0, "mscale_all_dim": 1.0},
    "num_nextn_predict_layers": 1, "bos_token_id": 0, "eos_token_id": 1, "hidden_act": "silu", "attention_bias": False,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip


def write(folder: Path, seed: int) -> Path:
    """The checkpoint in bf16, in Hugging Face's layout, without a tokenizer."""
    data = Data("tiny", seed)
    tensors: dict[str, torch.Tensor] = {}
    for e in expected_tensors(from_hf(CONFIG)):
        if e.kind == "copy":
            continue
        x = data.normal(e.name, *e.shape)
        if e.name.endswith("norm.weight"):
            x = 1 + 0.1 * x
        elif e.kind == "f32":  # router biases: negative, as trained ones may be; far apart, so that rounding seldom decides
            x = 0.6 * x - 1
        elif ".experts." in e.name and "down_proj" in e.name:  # one expert instead of another should not be a new model
            x = 0.3 * x / e.shape[-1] ** 0.5
        else:
            x = x / e.shape[-1] ** 0.5
        tensors[e.name] = x if e.kind == "f32" else x.to(torch.bfloat16)
    (folder / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    save_file(tensors, folder / "model.safetensors")
    return folder
