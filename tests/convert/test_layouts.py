"""Layouts: Hugging Face's and the demo's, there and back, and splits that cannot be."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import dsv3
from dsv3.checkpoint.convert.run import convert
from dsv3.checkpoint.convert.target import Target
from dsv3.checkpoint.folder import preset_config, presets
from dsv3.checkpoint.header import read_header
from dsv3.errors import UsageError
from dsv3.graph.config_demo import from_demo
from dsv3.graph.config_hf import from_hf
from dsv3.graph.config_write import to_hf
from tests.support.checkpoints import FP8, TINY, random_tensors, write_demo, write_hf
from tests.support.convert import same, tensors


@pytest.mark.parametrize(("source", "ranks"), [("bf16", 1), ("bf16", 2), ("sharded", 2), ("fp8", 1), ("aligned", 2)])
def test_to_the_demo_and_back_is_byte_identical(made: dict[str, Path], tmp_path: Path, source: str, ranks: int) -> None:
    convert(str(made[source]), tmp_path / "demo", Target("demo", model_parallel=ranks))
    assert sorted(p.name for p in (tmp_path / "demo").glob("*.safetensors")) == [
        f"model{i}-mp{ranks}.safetensors" for i in range(ranks)
    ]
    convert(str(tmp_path / "demo"), tmp_path / "hf", Target("hf"))
    assert same(tensors(made[source]), tensors(tmp_path / "hf"))
    assert (tmp_path / "hf" / "config.json").read_bytes() == (made[source] / "config.json").read_bytes()


def test_a_file_of_safetensors_comes_back_as_it_was(story: Path, tmp_path: Path) -> None:
    convert(str(story), tmp_path / "demo", Target("demo", model_parallel=4))
    convert(str(tmp_path / "demo"), tmp_path / "hf", Target("hf"))
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "hf" / name).read_bytes() == (story / name).read_bytes()


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_demo_files_are_those_of_an_independent_splitter(tmp_path: Path, made: dict[str, Path], ranks: int) -> None:
    write_demo(tmp_path / "wanted", TINY, random_tensors(TINY, copies=True), ranks)
    convert(str(made["bf16"]), tmp_path / "found", Target("demo", model_parallel=ranks))
    for rank in range(ranks):
        name = f"model{rank}-mp{ranks}.safetensors"
        assert (tmp_path / "found" / name).read_bytes() == (tmp_path / "wanted" / name).read_bytes()


def test_ranks_hold_slices_of_weights_and_their_scales(made: dict[str, Path], tmp_path: Path) -> None:
    convert(str(made["aligned"]), tmp_path / "demo", Target("demo", model_parallel=2))
    whole = tensors(made["aligned"])
    for rank in range(2):
        path = tmp_path / "demo" / f"model{rank}-mp2.safetensors"
        raw, infos = path.read_bytes(), read_header(path)
        up, down = infos["layers.0.ffn.w1.scale"], infos["layers.0.ffn.w2.scale"]
        scale = whole["model.layers.0.mlp.gate_proj.weight_scale_inv"]
        assert raw[up.start : up.end] == np.ascontiguousarray(scale[2 * rank : 2 * rank + 2]).tobytes()
        scale = whole["model.layers.0.mlp.down_proj.weight_scale_inv"]
        assert raw[down.start : down.end] == np.ascontiguousarray(scale[:, 2 * rank : 2 * rank + 2]).tobytes()
        experts = {int(n.split(".experts.")[1].split(".")[0]) for n in infos if ".experts." in n}
        assert experts == set(range(4 * rank, 4 * rank + 4))


@pytest.mark.parametrize(
    ("source", "ranks", "words"),
    [
        ("bf16", 3, ("8 routed experts", "possible: 1, 2")),
        ("bf16", 8, ("2 attention heads", "possible: 1, 2")),
        ("fp8", 2, ("block of 128", "possible: 1")),
    ],
)
def test_an_impossible_split_says_why_and_what_is_possible(
    made: dict[str, Path], tmp_path: Path, source: str, ranks: int, words: tuple[str, ...]
) -> None:
    with pytest.raises(UsageError) as refused:
        convert(str(made[source]), tmp_path / "out", Target("demo", model_parallel=ranks))
    assert all(word in str(refused.value) for word in words), refused.value
    assert not (tmp_path / "out").exists()


def test_without_mtp_its_tensors_go(made: dict[str, Path], tmp_path: Path) -> None:
    convert(str(made["bf16"]), tmp_path / "out", Target("fp8", mtp=False))
    assert not any("layers.2." in name for name in tensors(tmp_path / "out"))
    model = dsv3.load(str(tmp_path / "out"))
    assert model.config.num_nextn_predict_layers == 0 and model.logits([0, 5]).isfinite().all()


def test_a_demo_configuration_becomes_hugging_faces(tmp_path: Path) -> None:
    demo = {
        "vocab_size": 64, "dim": 136, "inter_dim": 144, "moe_inter_dim": 132, "n_layers": 2, "n_dense_layers": 1, "n_heads": 2,
        "n_routed_experts": 8, "n_shared_experts": 1, "n_activated_experts": 2, "n_expert_groups": 4, "n_limited_groups": 2,
        "route_scale": 2.5, "score_func": "sigmoid", "q_lora_rank": 24, "kv_lora_rank": 32, "qk_nope_head_dim": 12,
        "qk_rope_head_dim": 8, "v_head_dim": 20, "dtype": "fp8", "original_seq_len": 32, "max_seq_len": 256, "rope_factor": 4,
        "mscale": 1.0, "n_mtp_layers": 1,
    }  # fmt: skip
    write_demo(tmp_path / "demo", demo, random_tensors(TINY, fp8=True), 1)
    convert(str(tmp_path / "demo"), tmp_path / "hf", Target("hf"))
    written = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert from_hf(written) == from_demo(demo) and written["quantization_config"] == FP8
    write_hf(tmp_path / "wanted", written, random_tensors(TINY, fp8=True))
    assert same(tensors(tmp_path / "hf"), tensors(tmp_path / "wanted"))


@pytest.mark.parametrize("preset", presets())
def test_every_field_of_a_configuration_survives_writing(preset: str) -> None:
    config = preset_config(preset)
    assert from_hf(to_hf(config)) == config


@pytest.mark.parametrize(
    ("source", "target", "words"),
    [
        ("bf16", {"to": "bf16"}, "in bf16 already"),
        ("bf16", {"to": "hf"}, "Hugging Face's layout already"),
        ("fp8", {"to": "fp8"}, "stored in fp8 already"),
    ],
)
def test_nothing_to_convert_is_said(
    made: dict[str, Path], tmp_path: Path, source: str, target: dict[str, str], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        convert(str(made[source]), tmp_path / "out", Target(**target))  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        {"to": "fp4"},
        {"to": "bf16", "model_parallel": 2},
        {"to": "demo", "model_parallel": 0},
        {"to": "int8", "scale_fmt": "ue8m0"},
        {"to": "int4", "weight_only": True},
        {"to": "fp8", "calibrate": True},
    ],
)
def test_options_that_do_not_go_together_are_refused(arguments: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        Target(**arguments)  # type: ignore[arg-type]


def test_int8_does_not_go_into_the_demo_layout(made: dict[str, Path], tmp_path: Path) -> None:
    convert(str(made["bf16"]), tmp_path / "int8", Target("int8"))
    with pytest.raises(UsageError, match="no int8 weights"):
        convert(str(tmp_path / "int8"), tmp_path / "out", Target("demo"))
