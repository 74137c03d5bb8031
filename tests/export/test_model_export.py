"""Exported graphs against the model they were made from, as a program with ONNX Runtime alone would run them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dsv3
from dsv3.errors import CheckpointError, UsageError
from tests.support.checkpoints import FP8, TINY, poke, random_tensors, write_demo, write_hf

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

from dsv3.export import packages  # noqa: E402
from dsv3.export.model import export_onnx  # noqa: E402

V2 = {
    **TINY, "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", "q_lora_rank": None,
    "scoring_func": "softmax", "topk_method": "group_limited_greedy", "norm_topk_prob": False, "n_shared_experts": 2,
    "num_nextn_predict_layers": 0, "num_hidden_layers": 3,
}  # fmt: skip
GREEDY = {**V2, "topk_method": "greedy", "n_group": 1, "topk_group": 1, "rope_scaling": None, "n_shared_experts": 0}
TOKENS = 40
PLANS = {
    "one prefill": [("prefill", 40)],
    "chunked prefill": [("prefill", 17), ("prefill", 1), ("prefill", 22)],
    "token by token": [("decode", 1)] * 40,
    "prefill, then decode": [("prefill", 30)] + [("decode", 1)] * 8 + [("decode", 2)],
}


class Exported:
    """The files of an export and what they compute."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.about = json.loads((folder / "export.json").read_text())
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        self.sessions = {
            Path(name).stem: ort.InferenceSession(str(folder / name), options, providers=["CPUExecutionProvider"])
            for name in self.about["graphs"]
        }

    def logits(self, ids: list[int], plan: list[tuple[str, int]], dtype: str = "float32") -> np.ndarray[Any, Any]:
        """Through the steps of a plan, the cache handed from each to the next."""
        shapes = {i["name"]: [0 if d == "past" else d for d in i["shape"]] for i in self.about["inputs"]}
        state = {name: np.zeros(shapes[name], dtype) for name in ("cache_ckv", "cache_kpe")}
        rows, at = [], 0
        for graph, n in plan:
            feed = {"ids": np.asarray(ids[at : at + n], np.int64), **state}
            logits, ckv, kpe = self.sessions[graph].run(["logits", "cache_ckv_out", "cache_kpe_out"], feed)
            state, at = {"cache_ckv": ckv, "cache_kpe": kpe}, at + n
            assert ckv.shape[1] == kpe.shape[1] == at
            rows.append(logits)
        return np.concatenate(rows)


def _ids(vocabulary: int) -> list[int]:
    return np.random.default_rng(3).integers(0, vocabulary, TOKENS).tolist()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("models")
    quantised = {**V2, "quantization_config": FP8}
    return {
        "demo": "demo",
        "v2": str(write_hf(root / "v2", V2, random_tensors(V2))),
        "v2-greedy": str(write_hf(root / "greedy", GREEDY, random_tensors(GREEDY))),
        "v2-fp8": str(write_hf(root / "fp8", quantised, random_tensors(quantised, fp8=True), shards=3)),
        "v3-tiny": str(write_hf(root / "v3", TINY, random_tensors(TINY))),
    }


@pytest.fixture(scope="module")
def exports(models: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Exported]:
    root = tmp_path_factory.mktemp("exports")
    made = {}
    for name, model in models.items():
        export_onnx(model, root / name)
        made[name] = Exported(root / name)
    return made


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("name", ["demo", "v2", "v2-greedy", "v2-fp8", "v3-tiny"])
def test_logits_are_the_models(
    name: str, plan: list[tuple[str, int]], models: dict[str, str], exports: dict[str, Exported]
) -> None:
    model = dsv3.load(models[name], backend="reference", dtype="float32", mtp=False)
    ids = _ids(model.config.vocab_size)
    expected = model.logits(ids).numpy()
    found = exports[name].logits(ids, plan)
    assert found.dtype == np.float32 and found.shape == expected.shape
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()
    assert (found.argmax(-1) == expected.argmax(-1)).all()


@pytest.mark.parametrize("graph", ["prefill.onnx", "decode.onnx"])
@pytest.mark.parametrize("name", ["demo", "v2"])
def test_graphs_are_valid_and_of_standard_operators(name: str, graph: str, exports: dict[str, Exported]) -> None:
    path = exports[name].folder / graph
    onnx.checker.check_model(str(path), full_check=True)
    model = onnx.load(str(path), load_external_data=False)
    nodes = list(model.graph.node)
    nodes += [n for node in nodes for a in node.attribute if a.type == onnx.AttributeProto.GRAPH for n in a.g.node]
    assert {n.domain for n in nodes} == {""} and not model.functions
    assert {e.value for t in model.graph.initializer for e in t.external_data if e.key == "location"} == {"weights.bin"}
    assert path.stat().st_size < 200_000, "weights are outside"
    assert (exports[name].folder / "weights.bin").stat().st_size < 3 * 15_052_560


def test_the_graph_does_not_grow_with_experts(exports: dict[str, Exported]) -> None:
    """16 experts of the demo and 8 of the tiny model: the same number of nodes per layer with experts."""

    def nodes(name: str, graph: str) -> int:
        return len(onnx.load(str(exports[name].folder / graph), load_external_data=False).graph.node)

    for graph in ("prefill.onnx", "decode.onnx"):
        assert nodes("demo", graph) < 5 * 260 and nodes("v3-tiny", graph) < 2 * 260


@pytest.mark.parametrize("absorbed", [False, True])
def test_the_largest_preset_has_a_small_graph(absorbed: bool) -> None:
    """Without its weights: 61 layers of 256 experts in under 2 MB, far from protobuf's 2 GB."""
    from dsv3.checkpoint.folder import preset_config
    from dsv3.export.model import build_graph
    from dsv3.export.weightfile import Stored
    from dsv3.graph.weights import meta_weights, walk
    from dsv3.graph.yarn import cos_sin_table
    from dsv3.plugin import Prepared

    config = preset_config("671B")
    tree = walk(meta_weights(config, torch.float32, "none", cos_sin_table(config, "meta"), mtp=False))
    tensors = {name: v.tensors["weight"] if isinstance(v, Prepared) else v for name, _, _, v in tree}
    stored = {name: Stored(name, "float32", tuple(t.shape), 0, 4 * t.numel()) for name, t in tensors.items()}
    model = build_graph(config, stored, "float32", absorbed)
    assert model.ByteSize() < 2 << 20
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    logits = inferred.graph.output[0].type.tensor_type.shape.dim
    assert [d.dim_value or d.dim_param for d in logits] == ["T", 129280]


def test_onnx_reference_runs_the_graphs_too(models: dict[str, str], exports: dict[str, Exported]) -> None:
    from onnx.reference import ReferenceEvaluator

    model = dsv3.load(models["v2"], backend="reference", dtype="float32")
    expected = model.logits(_ids(64)[:9]).numpy()
    caches = {"cache_ckv": np.zeros((3, 0, 32), np.float32), "cache_kpe": np.zeros((3, 0, 8), np.float32)}
    for graph in ("prefill.onnx", "decode.onnx"):
        found = ReferenceEvaluator(str(exports["v2"].folder / graph)).run(
            ["logits"], {"ids": np.asarray(_ids(64)[:9]), **caches}
        )
        assert np.abs(found[0] - expected).max() <= 1e-4 * np.abs(expected).max()


def test_float64_graphs_are_as_exact_as_the_model(models: dict[str, str], tmp_path: Path) -> None:
    export_onnx(models["v2"], tmp_path / "out", dtype="float64")
    model = dsv3.load(models["v2"], backend="reference", dtype="float64")
    expected = model.logits(_ids(64)).numpy()
    for plan in PLANS.values():
        found = Exported(tmp_path / "out").logits(_ids(64), plan, "float64")
        assert np.abs(found - expected).max() <= 1e-12 * np.abs(expected).max()


def test_bfloat16_graphs_are_valid_and_near(models: dict[str, str], tmp_path: Path) -> None:
    """Through our own runner: numpy has no bfloat16."""
    from dsv3.export.runtime import run_onnxruntime

    export_onnx(models["v2"], tmp_path / "out", dtype="bfloat16")
    expected = dsv3.load(models["v2"], backend="reference", dtype="bfloat16").logits(_ids(64)).numpy()
    onnx.checker.check_model(str(tmp_path / "out" / "prefill.onnx"), full_check=True)
    model = onnx.load(str(tmp_path / "out" / "prefill.onnx"))
    empty = {"cache_ckv": torch.zeros(3, 0, 32), "cache_kpe": torch.zeros(3, 0, 8)}
    from dsv3.export.dtypes import to_numpy

    found = run_onnxruntime(model, {"ids": np.asarray(_ids(64)), **{k: to_numpy(v.bfloat16()) for k, v in empty.items()}})
    assert found["cache_ckv_out"].dtype.name == "bfloat16"
    error = np.square(found["logits"] - expected).sum() / np.square(expected).sum()
    assert 0 < error < 1e-2


def test_the_demos_own_layout_is_read_too(tmp_path: Path) -> None:
    from dsv3.graph.config_demo import DEFAULTS

    args = {
        **DEFAULTS, "vocab_size": 64, "dim": 32, "inter_dim": 48, "moe_inter_dim": 16, "n_layers": 2, "n_heads": 2,
        "n_routed_experts": 4, "n_shared_experts": 1, "n_activated_experts": 2, "kv_lora_rank": 16, "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4, "v_head_dim": 8, "max_seq_len": 256, "original_seq_len": 64,
    }  # fmt: skip
    hf = {
        **V2, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "num_hidden_layers": 2,
        "n_routed_experts": 4, "n_shared_experts": 1, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4,
        "v_head_dim": 8, "n_group": 1, "topk_group": 1, "topk_method": "greedy",
    }  # fmt: skip
    folder = write_demo(tmp_path / "ranks", args, random_tensors(hf), 2)
    export_onnx(folder, tmp_path / "out")
    expected = dsv3.load(str(folder), backend="reference", dtype="float32").logits(_ids(64)).numpy()
    found = Exported(tmp_path / "out").logits(_ids(64), PLANS["chunked prefill"])
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


# -- files and errors


def test_configuration_and_tokenizer_go_along(exports: dict[str, Exported]) -> None:
    names = {f.name for f in exports["demo"].folder.iterdir()}
    assert names == {
        "prefill.onnx", "decode.onnx", "weights.bin", "export.json", "config.json", "generation_config.json", "tokenizer.json",
        "tokenizer_config.json",
    }  # fmt: skip
    about = exports["demo"].about
    assert [i["name"] for i in about["inputs"]] == ["ids", "cache_ckv", "cache_kpe"] and about["eos_token_id"] == [1]


def test_an_existing_destination_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("kept")
    with pytest.raises(UsageError, match="exists already"):
        export_onnx("demo", tmp_path / "out")
    assert [f.name for f in tmp_path.rglob("*")] == ["out", "mine"]


def test_a_failure_leaves_nothing_behind(tmp_path: Path) -> None:
    folder = write_hf(tmp_path / "model", V2, random_tensors(V2))
    poke(folder / "model.safetensors", "model.norm.weight", np.full(4, 0x7FC0, np.uint16))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight"):
        export_onnx(folder, tmp_path / "out")
    assert [f.name for f in tmp_path.iterdir()] == ["model"]


def test_wrong_arguments_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="did you mean 'float32'"):
        export_onnx("demo", tmp_path / "out", dtype="float3")
    with pytest.raises(UsageError, match="configuration without weights"):
        export_onnx("671B", tmp_path / "out")
    with pytest.raises(UsageError, match="create it first"):
        export_onnx("demo", tmp_path / "no" / "out")
    assert not list(tmp_path.iterdir())


def test_a_missing_package_is_named_with_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(UsageError, match=r"onnx cannot be imported .*pip install 'dsv3\[conformance\]'"):
        export_onnx("demo", tmp_path / "out")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UsageError, match=r"onnxruntime cannot be imported .*pip install 'onnxruntime'"):
        packages.onnxruntime()
    assert not list(tmp_path.iterdir())


def test_the_command_writes_and_lists_the_files(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "dsv3", "export", "demo", str(tmp_path / "out"), "--format", "onnx"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.split()) == sorted(str(f) for f in (tmp_path / "out").iterdir())
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert again.returncode == 2 and "exists already" in again.stderr and not again.stdout
