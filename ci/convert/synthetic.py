"""A synthetic FP8 checkpoint of about N GB, in shards of about 1 GB: `python ci/convert/synthetic.py FOLDER GB`.

Random codes and scales in DeepSeek-V3's layout; nothing to generate text with.
"""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np

from dsv3.checkpoint.stored import scale_shape
from dsv3.graph.config_hf import from_hf
from dsv3.graph.names import expected_tensors

SHARD = 1 << 30
CONFIG: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "vocab_size": 32000, "hidden_size": 2048,
    "intermediate_size": 10944, "moe_intermediate_size": 1408, "first_k_dense_replace": 1, "num_attention_heads": 16,
    "num_key_value_heads": 16, "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
    "v_head_dim": 128, "n_routed_experts": 64, "n_shared_experts": 2, "num_experts_per_tok": 6, "n_group": 8, "topk_group": 4,
    "topk_method": "noaux_tc", "scoring_func": "sigmoid", "norm_topk_prob": True, "routed_scaling_factor": 2.5,
    "rms_norm_eps": 1e-6, "max_position_embeddings": 4096, "num_nextn_predict_layers": 0, "torch_dtype": "bfloat16",
    "quantization_config": {
        "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128],
    },
}  # fmt: skip
_LAYER_BYTES = 64 * 3 * 2048 * 1408


def tensors(layers: int) -> list[tuple[str, str, tuple[int, ...]]]:
    """(name, dtype, shape) of everything the checkpoint holds."""
    found: list[tuple[str, str, tuple[int, ...]]] = []
    for e in expected_tensors(from_hf({**CONFIG, "num_hidden_layers": layers})):
        if e.kind == "linear":
            found += [(e.name, "F8_E4M3", e.shape), (e.name + "_scale_inv", "F32", scale_shape(e.shape, "fp8"))]
        else:
            found.append((e.name, "F32" if e.kind == "f32" else "BF16", e.shape))
    return found


def data(rng: np.random.Generator) -> dict[str, bytes]:
    """Random bytes for each dtype, used again and again."""
    codes = rng.integers(0, 256, 64 << 20, dtype=np.uint8)
    codes[(codes & 0x7F) == 0x7F] = 0
    bf16 = (rng.standard_normal(16 << 20, dtype=np.float32).view(np.uint32) >> 16).astype(np.uint16)
    scales = rng.uniform(1e-5, 1e-3, 1 << 20).astype(np.float32)
    return {"F8_E4M3": codes.tobytes(), "BF16": bf16.tobytes(), "F32": scales.tobytes()}


def write(folder: Path, gigabytes: float, seed: int = 0) -> int:
    """Write the checkpoint; the bytes of its tensors."""
    layers = max(2, round(gigabytes * 1e9 / _LAYER_BYTES))
    folder.mkdir(parents=True)
    pool, size = data(np.random.default_rng(seed)), {"F8_E4M3": 1, "BF16": 2, "F32": 4}
    groups: list[list[tuple[str, str, tuple[int, ...]]]] = [[]]
    held = total = 0
    for tensor in tensors(layers):
        nbytes = int(np.prod(tensor[2])) * size[tensor[1]]
        if held + nbytes > SHARD and groups[-1]:
            groups.append([])
            held = 0
        groups[-1].append(tensor)
        held, total = held + nbytes, total + nbytes
    names = {}
    for i, group in enumerate(groups):
        file = f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors"
        names |= {name: file for name, _, _ in group}
        _write_file(folder / file, group, pool, size)
    index = {"metadata": {"total_size": total}, "weight_map": names}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": layers}))
    return total


def _write_file(
    path: Path, group: list[tuple[str, str, tuple[int, ...]]], pool: dict[str, bytes], size: dict[str, int]
) -> None:
    header, at = {}, 0
    for name, dtype, shape in group:
        nbytes = int(np.prod(shape)) * size[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + nbytes]}
        at += nbytes
    text = json.dumps(header).encode()
    with path.open("wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        for _, dtype, shape in group:
            left = int(np.prod(shape)) * size[dtype]
            while left:
                block = memoryview(pool[dtype])[:left]
                f.write(block)
                left -= len(block)


if __name__ == "__main__":
    print(f"{write(Path(sys.argv[1]), float(sys.argv[2])) / 1e9:.2f} GB")
