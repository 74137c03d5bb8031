"""Logits against transformers in float32, over the family's configurations, at positions past YaRN's original length."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dsv3
from dsv3.quant.fp8 import quantize_block
from tests.support import hf

BOUND = 2e-4
TOKENS = 200  # past original_max_position_embeddings (64)

CONFIGURATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "v3": ("v3", hf.V3),
    "v3-positive-bias": ("v3", {**hf.V3, "_bias": 2.0}),
    "no-q-lora": ("v3", {**hf.V3, "q_lora_rank": None}),
    "one-group": ("v3", {**hf.V3, "n_group": 1, "topk_group": 1}),
    "no-yarn": ("v3", {**hf.V3, "rope_parameters": hf.PLAIN}),
    "mscale-differs": ("v3", {**hf.V3, "rope_parameters": {**hf.YARN, "mscale": 1.3, "mscale_all_dim": 0.6}}),
    "mscale-absent": ("v3", {**hf.V3, "rope_parameters": {k: v for k, v in hf.YARN.items() if "mscale" not in k}}),
    "kimi-yarn": ("v3", {**hf.V3, "rope_parameters": {**hf.YARN, "beta_fast": 1, "rope_theta": 50000.0, "factor": 32.0}}),
    "eps-1e-5": ("v3", {**hf.V3, "rms_norm_eps": 1e-5, "q_lora_rank": None, "routed_scaling_factor": 2.446}),
    "no-renormalisation": ("v3", {**hf.V3, "norm_topk_prob": False, "routed_scaling_factor": 0.7}),
    "all-dense": ("v3", {**hf.V3, "first_k_dense_replace": 3}),
    "all-moe": ("v3", {**hf.V3, "first_k_dense_replace": 0}),
    "no-round-sizes": (
        "v3",
        {
            **hf.V3,
            "hidden_size": 100,
            "intermediate_size": 150,
            "moe_intermediate_size": 37,
            "kv_lora_rank": 52,
            "q_lora_rank": 44,
            "qk_nope_head_dim": 20,
            "qk_rope_head_dim": 12,
            "v_head_dim": 17,
            "vocab_size": 301,
        },
    ),
    "two-shared": ("v3", {**hf.V3, "n_shared_experts": 2, "n_routed_experts": 12, "n_group": 3}),
    "every-expert": ("v3", {**hf.V3, "n_routed_experts": 8, "n_group": 2, "topk_group": 2, "num_experts_per_tok": 8}),
    "v2": ("v2", {**hf.V2, "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2}),
    "v2-lite": ("v2", {**hf.V2, "topk_method": "greedy", "q_lora_rank": None}),
    "v2-lite-ungrouped": ("v2", {**hf.V2, "topk_method": "greedy", "n_group": None, "topk_group": None}),
}


def _ids(vocab: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, vocab, (TOKENS,), generator=torch.Generator().manual_seed(seed))


def _reference(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids[None]).logits[0]


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_logits_equal_transformers(name: str, tmp_path: Path) -> None:
    family, fields = CONFIGURATIONS[name]
    fields = dict(fields)
    model = hf.random_model(family, fields, bias=fields.pop("_bias", -3.0))
    folder = hf.save(model, tmp_path)
    ids = _ids(fields["vocab_size"])
    wanted = _reference(model, ids)
    found = dsv3.load(str(folder), dtype="float32")
    error = {path: hf.relative(found.logits(ids, absorbed=path), wanted) for path in (False, True)}
    print(f"{name}: naive {error[False]:.1e}, absorbed {error[True]:.1e}")
    assert max(error.values()) <= BOUND


def test_old_spellings_mean_the_same(tmp_path: Path) -> None:
    """rope_scaling with `type`, rope_theta beside it, torch_dtype: as the releases write it."""
    model = hf.random_model("v3", hf.V3)
    old = {k: v for k, v in hf.YARN.items() if k not in ("rope_type", "rope_theta")}
    hf.save(model, tmp_path, rope_parameters=None, rope_scaling={"type": "yarn", **old}, rope_theta=10000.0,
            torch_dtype="float32", dtype=None, topk_method="noaux_tc", scoring_func="sigmoid")  # fmt: skip
    ids = _ids(320)
    assert hf.relative(dsv3.load(str(tmp_path)).logits(ids), _reference(model, ids)) <= BOUND


RAGGED = {
    **hf.V3, "hidden_size": 200, "intermediate_size": 300, "moe_intermediate_size": 136, "kv_lora_rank": 144,
    "q_lora_rank": 152, "qk_nope_head_dim": 40, "qk_rope_head_dim": 24, "v_head_dim": 36,
}  # fmt: skip
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}


def _dequantised(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """deepseek.md's formula, element by element in numpy, independent of dsv3's."""
    values = codes.to(torch.float32).numpy()
    rows, cols = np.indices(values.shape)
    return torch.from_numpy(values * scale.numpy()[rows // 128, cols // 128])


def test_fp8_with_ragged_blocks_equals_the_dequantised_weights(tmp_path: Path) -> None:
    model = hf.random_model("v3", RAGGED)
    hf.save(model, tmp_path / "fp8")
    hf.save(model, tmp_path / "real")
    linears = ("_proj.weight", "_proj_with_mqa.weight")

    def to_fp8(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        made = {}
        for name, tensor in tensors.items():
            if name.endswith(linears):
                made[name], made[name + "_scale_inv"] = quantize_block(tensor)
            else:
                made[name] = tensor
        return made

    def round_trip(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {n: _dequantised(*quantize_block(t)) if n.endswith(linears) else t for n, t in tensors.items()}

    hf.rewrite(tmp_path / "fp8", to_fp8, quantization_config=FP8)
    hf.rewrite(tmp_path / "real", round_trip)
    other = (
        type(model)
        .from_pretrained(tmp_path / "real", attn_implementation="eager", experts_implementation="eager", dtype=torch.float32)
        .eval()
    )
    ids = _ids(320)
    found = dsv3.load(str(tmp_path / "fp8"), dtype="float32")
    assert found.placement().quant == "fp8-w8a16"
    assert hf.relative(found.logits(ids), _reference(other, ids)) <= BOUND
    real = dsv3.load(str(tmp_path / "fp8"), dtype="float32", quant="none")
    assert hf.relative(real.logits(ids), _reference(other, ids)) <= BOUND
