"""Unusual but good: what real folders look like, and must load."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import dsv3
from dsv3.cli import main
from dsv3.graph.config_hf import from_hf
from dsv3.graph.weights import walk
from dsv3.plugin import Prepared
from tests.support.checkpoints import FP8, TINY, random_tensors, write_hf, write_index
from tests.support.damage import INDEX, SINGLE, config, drop, set_to


def test_links_into_the_hub_cache_are_followed(whole: dict[str, Path], tmp_path: Path) -> None:
    """snapshots/REVISION holds links to ../../blobs."""
    snapshot = tmp_path / "snapshots" / "abc"
    shutil.copytree(whole["single"], snapshot)
    (tmp_path / "blobs").mkdir()
    (snapshot / SINGLE).rename(tmp_path / "blobs" / "0123")
    (snapshot / SINGLE).symlink_to("../../blobs/0123")
    assert dsv3.load(str(snapshot)).logits([0]).shape == (1, 64)


def test_mtp_can_be_left_out(whole: dict[str, Path], tmp_path: Path) -> None:
    assert dsv3.load(str(whole["single"]), mtp=False).logits([0, 1]).isfinite().all()
    names = [n for n in load_file(whole["single"] / SINGLE) if n.startswith("model.layers.2.")]
    folder = tmp_path / "checkpoint"
    shutil.copytree(whole["single"], folder)
    drop(*names)(folder)
    with pytest.raises(dsv3.CheckpointError, match="num_nextn_predict_layers to 0"):
        dsv3.load(str(folder))
    model = dsv3.load(str(folder), mtp=False)
    with pytest.raises(dsv3.UsageError, match="MTP module"):
        model.mtp_logits([0, 1])


def test_the_mtp_copy_of_the_embedding_stands_in_for_a_missing_original(whole: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(whole["single"], folder)
    drop("model.embed_tokens.weight")(folder)
    assert torch.equal(dsv3.load(str(folder)).logits([0, 3]), dsv3.load(str(whole["single"])).logits([0, 3]))


def test_an_index_may_be_without_total(whole: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(whole["sharded"], folder)
    write_index(folder, json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"])
    assert dsv3.load(str(folder)).logits([0]).isfinite().all()


def test_an_mtp_module_left_in_bf16_stays_so(tmp_path: Path) -> None:
    """FP8 checkpoints sometimes leave it unquantised; nothing is quantised that nobody asked for."""
    fp8, real = random_tensors(TINY, fp8=True), random_tensors(TINY)
    mixed = {k: v for k, v in fp8.items() if not k.startswith("model.layers.2.")}
    mixed |= {k: v for k, v in real.items() if k.startswith("model.layers.2.")}
    model = dsv3.load(str(write_hf(tmp_path / "mixed", {**TINY, "quantization_config": FP8}, mixed)))
    assert model.placement().quant == "fp8-w8a16"
    kept = {path: w.quant for path, _, _, w in walk(model._graph.w) if isinstance(w, Prepared) and not path.endswith("kv_b")}
    assert {q for p, q in kept.items() if p.startswith("layers.")} == {"fp8-w8a16"}
    assert {q for p, q in kept.items() if p.startswith("mtp.")} == {"none"}
    assert model.mtp_logits([0, 5, 9]).isfinite().all()


QUIRKS: dict[str, dict[str, Any]] = {
    "whole floats": {"vocab_size": 64.0, "rope_scaling": {**TINY["rope_scaling"], "original_max_position_embeddings": 32.0}},
    "integers for floats": {"routed_scaling_factor": 2, "rope_theta": 10000, "rms_norm_eps": 0.000001},
    "both rope keys": {"rope_scaling": {**TINY["rope_scaling"], "rope_type": None}},
    "torch. in the dtype": {"torch_dtype": "torch.bfloat16"},
    "nulls": {"moe_layer_freq": None, "norm_topk_prob": None, "topk_method": None, "scoring_func": None, "attention_bias": None,
              "quantization_config": None, "num_key_value_heads": None},
    "lists of ids": {"eos_token_id": [1, 5], "bos_token_id": None},
    "much that is ignored": {"aux_loss_alpha": 0.001, "auto_map": {"AutoConfig": "x.Y"}, "ep_size": 1, "use_cache": True,
                             "pretraining_tp": 1, "attention_dropout": 0.0, "head_dim": 8, "transformers_version": "4.33.1"},
}  # fmt: skip


@pytest.mark.parametrize("quirk", QUIRKS)
def test_harmless_quirks_load(quirk: str, whole: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(whole["single"], folder)
    config(**QUIRKS[quirk])(folder)
    assert dsv3.load(str(folder)).logits([0, 5]).isfinite().all()


def test_more_harmless_quirks(whole: dict[str, Path], tmp_path: Path) -> None:
    """A byte order mark, old inv_freq tensors, a cache whose blobs are a link to another disk."""
    folder = tmp_path / "elsewhere" / "snapshots" / "abc"
    shutil.copytree(whole["single"], folder)
    text = (folder / "config.json").read_bytes()
    (folder / "config.json").write_bytes(b"\xef\xbb\xbf" + text)
    set_to("model.layers.0.self_attn.rotary_emb.inv_freq", torch.ones(4))(folder)
    (tmp_path / "disk").mkdir()
    (tmp_path / "elsewhere" / "blobs").symlink_to(tmp_path / "disk")
    (folder / SINGLE).rename(tmp_path / "disk" / "0123")
    (folder / SINGLE).symlink_to("../../blobs/0123")
    assert torch.equal(dsv3.load(str(folder)).logits([0, 5]), dsv3.load(str(whole["single"])).logits([0, 5]))


def test_a_v3_config_that_leaves_fields_out_means_what_it_does_in_transformers() -> None:
    short = {
        k: v for k, v in TINY.items() if k not in ("n_group", "topk_group", "routed_scaling_factor", "first_k_dense_replace")
    }
    found = from_hf({**short, "n_routed_experts": 64})
    assert (found.n_group, found.topk_group, found.routed_scaling_factor, found.first_k_dense_replace) == (8, 4, 2.5, 3)
    none = from_hf({**short, "n_group": None, "topk_group": None})
    assert (none.n_group, none.topk_group) == (1, 1)


def test_explain_checks_the_headers_too(whole: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(whole["single"], folder)
    config(num_hidden_layers=900)(folder)
    start = time.perf_counter()
    assert main(["explain", "moe", "--model", str(folder)]) == 4
    assert time.perf_counter() - start < 1
    (folder / SINGLE).unlink()  # a configuration alone can be planned
    config(num_hidden_layers=3)(folder)
    assert main(["explain", "moe", "--model", str(folder)]) == 0
