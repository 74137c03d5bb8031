"""An equivalent model whose activations have outliers: some channels of a norm times 30, the columns that meet them over 30."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

_CONSUMERS = {
    "input_layernorm": r"self_attn\.(q_a_proj|q_proj|kv_a_proj_with_mqa)",
    "self_attn.q_a_layernorm": r"self_attn\.q_b_proj",
    "post_attention_layernorm": r"mlp\.(gate|(experts\.\d+\.|shared_experts\.)?(gate|up)_proj)",
}


def fold(source: Path, folder: Path, channels: int = 8, factor: float = 30.0, seed: int = 0) -> Path:
    """Write the checkpoint of one file with outliers in every layer."""
    shutil.copytree(source, folder)
    tensors = load_file(source / "model.safetensors")
    generator = torch.Generator().manual_seed(seed)
    for name in sorted(tensors):
        found = re.fullmatch(r"(model\.layers\.\d+)\.(\S+layernorm)\.weight", name)
        if found is None or found[2] not in _CONSUMERS:
            continue
        chosen = torch.randperm(tensors[name].shape[0], generator=generator)[:channels]
        tensors[name][chosen] *= factor
        pattern = re.compile(re.escape(found[1]) + r"\." + _CONSUMERS[found[2]] + r"\.weight")
        for weight in tensors:
            if pattern.fullmatch(weight):
                tensors[weight][:, chosen] = (tensors[weight][:, chosen].float() / factor).to(tensors[weight].dtype)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
