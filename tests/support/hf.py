"""Random models of transformers, saved as checkpoints that dsv3 loads: the other implementation of the parity tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.models.deepseek_v2 import DeepseekV2Config
from transformers.models.deepseek_v3 import DeepseekV3Config
from transformers.utils import logging

logging.set_verbosity_error()
logging.disable_progress_bar()

YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 64, "beta_fast": 32,
    "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0,
}  # fmt: skip
PLAIN = {"rope_type": "default", "rope_theta": 10000.0}
SMALL: dict[str, Any] = {
    "vocab_size": 320, "hidden_size": 128, "intermediate_size": 192, "moe_intermediate_size": 64, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 4, "n_shared_experts": 1, "n_routed_experts": 16, "kv_lora_rank": 64,
    "q_lora_rank": 96, "qk_rope_head_dim": 16, "v_head_dim": 24, "qk_nope_head_dim": 32, "num_experts_per_tok": 4,
    "first_k_dense_replace": 1, "max_position_embeddings": 512, "initializer_range": 0.1,
}  # fmt: skip
V3 = {**SMALL, "n_group": 4, "topk_group": 2, "rope_parameters": YARN, "num_mtp_layers": 0}
V2 = {
    **SMALL,
    "n_shared_experts": 2,
    "routed_scaling_factor": 1.5,
    "rope_parameters": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
}


def random_model(family: str, fields: dict[str, Any], seed: int = 0, bias: float = -3.0) -> Any:
    """A transformers model with random weights: norms around 1, router biases around `bias`."""
    torch.manual_seed(seed)
    config = {"v3": DeepseekV3Config, "v2": DeepseekV2Config}[family](**fields)
    config._experts_implementation = "eager"  # the grouped one wants strides of 16 bytes
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.copy_(1 + 0.2 * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if "e_score_correction_bias" in name:
                buffer.copy_(0.5 * torch.randn_like(buffer) + bias)
    return model


def save(model: Any, folder: Path, **config: Any) -> Path:
    """The model as transformers saves it; keyword arguments change its config.json."""
    model.save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **config}))
    return folder


def rewrite(folder: Path, change: Any, **config: Any) -> None:
    """Replace the checkpoint's tensors by `change(tensors)`, and fields of its config.json."""
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path)
    settings = folder / "config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text(encoding="utf-8")), **config}))


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """max |difference| / max |wanted|."""
    return float((found - wanted).abs().max() / wanted.abs().max())
