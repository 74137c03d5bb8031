"""A checkpoint of random weights to measure engines on: `python ci/bench/peer_model.py DST [--quant SCHEME] [--layers N]`.

DeepSeek-V3's layout at 1.28 B parameters, 280 M of them touched per token, in bf16: 2.56 GB, a file per layer. Small enough for
any machine, large enough that no cache holds what a step reads. There is no tokenizer: measurements feed random ids. --quant
converts the bf16 checkpoint, made beside DST and removed again, as `dsv3 convert` does.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from dsv3.graph.config_hf import from_hf
from dsv3.graph.names import Expected, expected_tensors

CONFIG: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "vocab_size": 32000, "hidden_size": 1024,
    "intermediate_size": 2816, "moe_intermediate_size": 512, "num_hidden_layers": 12, "first_k_dense_replace": 1,
    "moe_layer_freq": 1, "num_attention_heads": 16, "num_key_value_heads": 16, "q_lora_rank": 512, "kv_lora_rank": 512,
    "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "n_routed_experts": 64, "n_shared_experts": 1,
    "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4, "topk_method": "noaux_tc", "scoring_func": "sigmoid",
    "norm_topk_prob": True, "routed_scaling_factor": 2.5, "rms_norm_eps": 1e-6, "max_position_embeddings": 163840,
    "rope_theta": 10000.0, "num_nextn_predict_layers": 0, "bos_token_id": 0, "eos_token_id": 1, "tie_word_embeddings": False,
    "hidden_act": "silu", "attention_bias": False, "attention_dropout": 0.0, "ep_size": 1, "initializer_range": 0.02,
    "torch_dtype": "bfloat16",
    "rope_scaling": {
        "type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1,
        "mscale": 1.0, "mscale_all_dim": 1.0,
    },
}  # fmt: skip
TARGETS = {"fp8-w8a16": "fp8", "int8-w8a16": "int8", "int4-w4a16": "int4"}


def tensor(rng: np.random.Generator, e: Expected) -> torch.Tensor:
    """Norms are one. A matrix is normal with deviation 1 / sqrt(fan-in), the embedding with 1: every layer's output is then of
    the size of its input, and the token itself stays visible in the residual stream, so that greedy text does not collapse."""
    if e.name.endswith("norm.weight"):
        return torch.ones(e.shape, dtype=torch.bfloat16)
    if e.kind == "f32":  # the router's bias: small beside the scores, and not nothing
        return torch.from_numpy(rng.uniform(-0.01, 0.01, e.shape).astype(np.float32))
    std = 1.0 if e.into == "embed" else 1 / math.sqrt(e.shape[-1])
    made = rng.standard_normal(e.shape, dtype=np.float32)
    made *= np.float32(std)
    return torch.from_numpy(made).to(torch.bfloat16)


def shards(config: dict[str, Any]) -> Iterator[list[Expected]]:
    """The tensors of each file: what belongs to no layer, then the layers."""
    for _, group in groupby(expected_tensors(from_hf(config)), key=lambda e: e.layer):
        yield list(group)


def write(folder: Path, config: dict[str, Any], seed: int = 0) -> int:
    """Write the checkpoint, config.json last: a folder without it is no checkpoint. The bytes of its tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    groups, names, total = list(shards(config)), {}, 0
    for number, group in enumerate(groups):
        file = f"model-{number + 1:05d}-of-{len(groups):05d}.safetensors"
        rng = np.random.default_rng((seed, number))
        made = {e.name: tensor(rng, e) for e in group}
        part = folder / f".{file}.part"
        save_file(made, part, metadata={"format": "pt"})
        part.chmod(0o644)
        part.replace(folder / file)
        names |= dict.fromkeys(made, file)
        total += sum(t.numel() * t.element_size() for t in made.values())
    index = {"metadata": {"total_size": total}, "weight_map": names}
    for name, content in (("model.safetensors.index.json", index), ("config.json", config)):
        part = folder / f".{name}.part"
        part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        part.replace(folder / name)
    return total


def quantised(dst: Path, config: dict[str, Any], quant: str, seed: int) -> int:
    """The same numbers in another scheme."""
    from dsv3.checkpoint.convert.run import convert
    from dsv3.checkpoint.convert.target import Target

    plain = dst.with_name(f".{dst.name}.bf16")
    write(plain, config, seed)
    target = Target(TARGETS[quant], weight_only=True) if quant.startswith("int8") else Target(TARGETS[quant])  # type: ignore[arg-type]
    convert(str(plain), dst, target, workers=1)
    shutil.rmtree(plain)
    return sum(p.stat().st_size for p in dst.glob("*.safetensors"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dst", type=Path, metavar="DST", help="folder to write")
    parser.add_argument("--quant", choices=["none", *TARGETS], default="none", help="(default: none)")
    parser.add_argument("--layers", type=int, default=CONFIG["num_hidden_layers"], metavar="N", help="(default: 12)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="(default: 0)")
    given = parser.parse_args()
    config = {**CONFIG, "num_hidden_layers": given.layers}
    plain = given.quant == "none"
    size = write(given.dst, config, given.seed) if plain else quantised(given.dst, config, given.quant, given.seed)
    print(f"{given.dst}: {size / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
