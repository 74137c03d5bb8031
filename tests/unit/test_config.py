"""Configurations of the family, in every spelling, and YaRN's published numbers."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch

import dsv3
from dsv3.checkpoint.folder import preset_config, presets
from dsv3.graph.config_demo import DEFAULTS, from_demo
from dsv3.graph.config_hf import from_hf
from dsv3.graph.names import expected_tensors
from dsv3.graph.yarn import cos_sin_table, inverse_frequencies, softmax_scale
from dsv3.resources import resources
from tests.support.checkpoints import TINY


def _raw(name: str) -> dict[str, object]:
    return json.loads(resources("configs", "models", f"{name}.json").read_text())  # type: ignore[no-any-return]


def test_the_presets_are_there() -> None:
    assert presets() == ["16B", "236B", "671B", "kimi-k2", "moonlight", "tiny"]


@pytest.mark.parametrize(
    ("name", "billions"),
    [("671B", 671.03 + 11.61), ("236B", 235.74), ("16B", 15.71), ("kimi-k2", 1026.4), ("moonlight", 15.96)],
)
def test_parameter_counts_are_the_published_ones(name: str, billions: float) -> None:
    """Without the MTP module's copies of embedding and head."""
    count = sum(math.prod(e.shape) for e in expected_tensors(preset_config(name)) if e.kind != "copy")
    assert abs(count / 1e9 / billions - 1) < 0.001


@pytest.mark.parametrize("name", ["671B", "236B", "16B", "kimi-k2", "moonlight", "tiny"])
def test_every_preset_builds_in_shapes_only(name: str) -> None:
    model = dsv3.load(name, device="meta")
    assert model.placement().operators()
    with pytest.raises(dsv3.UsageError, match="device 'meta'"):
        model.logits([1])
    if name == "671B":
        assert 680e9 < model.weight_bytes < 690e9


@pytest.mark.parametrize(("name", "scale"), [("671B", 0.1352338), ("16B", 0.1147214), ("kimi-k2", 0.1308608)])
def test_softmax_scales(name: str, scale: float) -> None:
    assert softmax_scale(preset_config(name)) == pytest.approx(scale, abs=5e-8)


@pytest.mark.parametrize(("name", "low", "high"), [("671B", 10, 23), ("kimi-k2", 19, 20)])
def test_yarn_ramps(name: str, low: int, high: int) -> None:
    c = preset_config(name)
    assert c.rope_scaling is not None
    ratio = inverse_frequencies(64, c.rope_theta, c.rope_scaling) / inverse_frequencies(64, c.rope_theta, None)
    assert torch.equal(ratio[: low + 1], torch.ones(low + 1, dtype=torch.float64))
    assert torch.allclose(ratio[high:], torch.full((32 - high,), 1 / c.rope_scaling.factor, dtype=torch.float64), rtol=1e-12)
    assert (ratio.diff() <= 1e-15).all()


def test_the_table_is_exact_at_long_positions() -> None:
    """Angles in float64: float32 would be off by 1e-2 at position 163,839."""
    c = preset_config("671B")
    table = cos_sin_table(c, "cpu")
    assert table.shape == (163840, 64) and table.dtype == torch.float32
    inverse = inverse_frequencies(64, c.rope_theta, c.rope_scaling)
    for position in (1, 4097, 163839):
        wanted = [math.cos(position * float(f)) for f in inverse] + [math.sin(position * float(f)) for f in inverse]
        assert torch.allclose(table[position].double(), torch.tensor(wanted, dtype=torch.float64), atol=1e-7)


def test_new_spellings_are_the_old_ones() -> None:
    old = _raw("671B")
    new = dict(old)
    rope = dict(new.pop("rope_scaling"))  # type: ignore[call-overload]
    rope["rope_type"] = rope.pop("type")
    new["rope_parameters"] = {**rope, "rope_theta": new.pop("rope_theta")}
    new["num_mtp_layers"] = new.pop("num_nextn_predict_layers")
    new["dtype"] = new.pop("torch_dtype")
    new["num_local_experts"] = new.pop("n_routed_experts")
    assert from_hf(new) == from_hf(old)


def test_what_v3_1_adds_is_read() -> None:
    raw = {**_raw("671B"), "quantization_config": {**_raw("671B")["quantization_config"], "scale_fmt": "ue8m0"}}  # type: ignore[dict-item]
    assert (from_hf(raw).quant_method, from_hf(raw).scale_fmt) == ("fp8", "ue8m0")
    raw["quantization_config"]["scale_fmt"] = "e5"  # type: ignore[index]
    with pytest.raises(dsv3.UnsupportedModel, match="'e5'"):
        from_hf(raw)


def test_harmless_fields_are_ignored() -> None:
    extra = {"aux_loss_alpha": 0.001, "seq_aux": True, "ep_size": 1, "pretraining_tp": 1, "auto_map": {"AutoModel": "x.Y"},
             "use_cache": True, "attention_dropout": 0.0, "transformers_version": "4.33.1"}  # fmt: skip
    assert from_hf({**_raw("671B"), **extra}) == from_hf(_raw("671B"))


def test_model_args_mean_what_the_demo_does() -> None:
    c = from_demo(
        {
            "vocab_size": 129280, "dim": 7168, "inter_dim": 18432, "moe_inter_dim": 2048, "n_layers": 61, "n_dense_layers": 3,
            "n_heads": 128, "n_routed_experts": 256, "n_shared_experts": 1, "n_activated_experts": 8, "n_expert_groups": 8,
            "n_limited_groups": 4, "route_scale": 2.5, "score_func": "sigmoid", "q_lora_rank": 1536, "kv_lora_rank": 512,
            "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "dtype": "fp8",
        }
    )  # fmt: skip
    wanted = preset_config("671B")
    differ = {"max_position_embeddings", "num_nextn_predict_layers", "bos_token_id", "eos_token_id"}
    for f in dataclasses.fields(c):
        if f.name not in differ:
            assert getattr(c, f.name) == getattr(wanted, f.name), f.name
    assert softmax_scale(c) == softmax_scale(wanted)
    lite = from_demo({"dim": 2048})
    assert (lite.topk_method, lite.scoring_func, lite.q_lora_rank, lite.num_hidden_layers) == ("greedy", "softmax", None, 27)
    assert from_demo({"dim": 2048, "max_seq_len": DEFAULTS["original_seq_len"]}).rope_scaling is None
    with pytest.raises(dsv3.UnsupportedModel, match="did you mean 'n_layers'"):
        from_demo({"dim": 2048, "n_layer": 3})


def test_dense_and_sparse_layers() -> None:
    c = from_hf(TINY)
    assert [c.is_moe(i) for i in range(3)] == [False, True, True]  # the MTP module, layer 2, has experts
    every_other = from_hf({**TINY, "moe_layer_freq": 2, "num_hidden_layers": 4, "first_k_dense_replace": 0})
    assert [every_other.is_moe(i) for i in range(4)] == [True, False, True, False]
    assert not from_hf({**TINY, "n_routed_experts": None}).is_moe(5)


def test_the_mtp_switch(tmp_path: object) -> None:
    assert from_hf(TINY).mtp_hidden == "post_norm"
    assert from_hf({**TINY, "mtp_hidden": "pre_norm"}).mtp_hidden == "pre_norm"
    with pytest.raises(dsv3.CheckpointError, match="mtp_hidden"):
        from_hf({**TINY, "mtp_hidden": "both"})
