"""Small random checkpoints, written tensor by tensor in any of the layouts, and safetensors files written by hand."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from dsv3.checkpoint.demo_layout import expert_index, shard_axis, to_demo
from dsv3.graph.config_hf import from_hf
from dsv3.graph.names import expected_tensors
from dsv3.quant.fp8 import quantize_block

FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
TINY: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "vocab_size": 64, "hidden_size": 136,
    "intermediate_size": 144, "moe_intermediate_size": 132, "num_hidden_layers": 2, "first_k_dense_replace": 1,
    "num_attention_heads": 2, "num_key_value_heads": 2, "q_lora_rank": 24, "kv_lora_rank": 32, "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8, "v_head_dim": 20, "n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2,
    "n_group": 4, "topk_group": 2, "topk_method": "noaux_tc", "scoring_func": "sigmoid", "norm_topk_prob": True,
    "routed_scaling_factor": 2.5, "rms_norm_eps": 1e-6, "max_position_embeddings": 256, "rope_theta": 10000.0,
    "rope_scaling": {"type": "yarn", "factor": 4, "original_max_position_embeddings": 32, "beta_fast": 32, "beta_slow": 1,
                     "mscale": 1.0, "mscale_all_dim": 1.0},
    "num_nextn_predict_layers": 1, "bos_token_id": 0, "eos_token_id": 1, "hidden_act": "silu", "attention_bias": False,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip


def random_tensors(
    config: Mapping[str, Any], fp8: bool = False, dtype: torch.dtype = torch.bfloat16, seed: int = 0, copies: bool = False
) -> dict[str, torch.Tensor]:
    """All tensors of a configuration. copies: with the MTP module's repeated embedding and head."""
    generator = torch.Generator().manual_seed(seed)
    made: dict[str, torch.Tensor] = {}
    for e in expected_tensors(from_hf({k: v for k, v in config.items() if k != "quantization_config"})):
        if e.kind == "copy":
            if copies:
                made[e.name] = made[e.copy_of].clone()
            continue
        tensor = torch.randn(e.shape, generator=generator)
        if e.name.endswith("norm.weight"):
            tensor = 1 + 0.1 * tensor
        elif e.kind == "f32":
            tensor = tensor - 3
        else:
            tensor = tensor / math.sqrt(e.shape[-1])
        if fp8 and e.kind == "linear":
            made[e.name], made[e.name + "_scale_inv"] = quantize_block(tensor)
        else:
            made[e.name] = tensor if e.kind == "f32" else tensor.to(dtype)
    return made


def write_hf(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], shards: int = 1) -> Path:
    """Hugging Face layout: one file, or shards with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(dict(tensors), folder / "model.safetensors")
        return folder
    names, weight_map = sorted(tensors), {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = {n: tensors[n] for n in names[i::shards]}
        weight_map |= dict.fromkeys(part, file)
        save_file(part, folder / file)
    write_index(folder, weight_map, sum(t.numel() * t.element_size() for t in tensors.values()))
    return folder


def write_index(folder: Path, weight_map: Mapping[str, str], total: int | None = None) -> None:
    index: dict[str, Any] = {"metadata": {} if total is None else {"total_size": total}, "weight_map": dict(weight_map)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def write_demo(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], size: int) -> Path:
    """The inference demo's layout over `size` ranks."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    experts = int(config.get("n_routed_experts", 1))
    for rank in range(size):
        part = {}
        for name, tensor in tensors.items():
            expert, axis = expert_index(name), shard_axis(name)
            if expert is not None:
                if expert // (experts // size) == rank:
                    part[to_demo(name)] = tensor
            elif axis is None or tensor.dim() <= axis:
                part[to_demo(name)] = tensor
            else:
                part[to_demo(name)] = tensor.chunk(size, axis)[rank].contiguous()
        save_file(part, folder / f"model{rank}-mp{size}.safetensors")
    return folder


def raw_file(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> None:
    """A safetensors file from a header (an object, or its text) and data; `length` lies about the header's size."""
    text = (header if isinstance(header, bytes) else json.dumps(header).encode()) if header is not None else b""
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def parse_file(path: Path) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def poke(path: Path, tensor: str, values: np.ndarray) -> None:
    """Overwrite the first bytes of a tensor in place."""
    raw = bytearray(path.read_bytes())
    (length,) = struct.unpack("<Q", raw[:8])
    start = 8 + length + json.loads(raw[8 : 8 + length])[tensor]["data_offsets"][0]
    raw[start : start + values.nbytes] = values.tobytes()
    path.write_bytes(bytes(raw))
