"""The model against itself in float64: naive = absorbed, prefill = token by token, chunked = whole, batch = alone,
speculation = plain."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import dsv3
from tests.support.checkpoints import FP8, TINY, random_tensors, write_demo, write_hf

TOLERANCE = 1e-9
# Relative error of logits: a random model, whose near ties of the router flip, amplifies what a scheme rounds away.
NEAR = {"fp8": 0.3, "int8": 0.1, "int4": 0.8}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model whose greedy continuations wander."""
    return write_hf(tmp_path_factory.mktemp("tiny") / "m", TINY, random_tensors(TINY, dtype=torch.float32))


@pytest.fixture(scope="module")
def model(tiny: Path) -> dsv3.Model:
    return dsv3.load(str(tiny), dtype="float64")


@pytest.fixture(scope="module")
def demo() -> dsv3.Model:
    return dsv3.load("demo", dtype="float64")


IDS = [(7 * i * i + 3 * i + 1) % 64 for i in range(150)]  # past the first page, and past YaRN's original length


@pytest.mark.parametrize("what", ["logits", "mtp_logits"])
def test_all_paths_give_the_same_logits(model: dsv3.Model, what: str) -> None:
    wanted = getattr(model, what)(IDS)
    assert wanted.dtype == torch.float64
    for options in (
        {"absorbed": True},
        {"chunk": 1, "absorbed": True},
        {"chunk": 1},
        {"chunk": 7},
        {"chunk": 64, "absorbed": True},
    ):
        found = getattr(model, what)(IDS, **options)
        assert (found - wanted).abs().max() <= TOLERANCE * wanted.abs().max(), options


PROMPTS = [IDS[:5], IDS[:70], [3], IDS[10:75], IDS[100:140]]


@pytest.mark.parametrize("options", [{}, {"temperature": 0.9, "seed": 5}, {"temperature": 1.3, "top_p": 0.7, "seed": -3}])
def test_batched_is_alone_and_speculation_changes_nothing(model: dsv3.Model, options: dict[str, Any]) -> None:
    common = {"max_new_tokens": 30, "ignore_eos": True, **options}
    alone = [model.generate(p, **common).ids for p in PROMPTS]
    assert all(len(ids) == 30 for ids in alone)
    assert [g.ids for g in model.generate(PROMPTS, **common)] == alone
    drafted = model.generate(PROMPTS, draft="mtp", **common)
    assert [g.ids for g in drafted] == alone
    assert all(g.stats["drafted"] > 0 for g in drafted)
    assert [model.generate(p, draft="mtp", **common).ids for p in PROMPTS] == alone


def test_generation_is_the_argmax_of_logits(model: dsv3.Model) -> None:
    ids = list(IDS[:20])
    for token in model.generate(IDS[:20], max_new_tokens=12, ignore_eos=True).ids:
        assert int(model.logits(ids)[-1].argmax()) == token
        ids.append(token)


def test_speculation_on_text_accepts_drafts_and_takes_fewer_steps(demo: dsv3.Model) -> None:
    prompts = ["Once upon a time", "The little fox", "There was once a king who"]
    plain = demo.generate(prompts, max_new_tokens=40)
    fast = demo.generate(prompts, max_new_tokens=40, draft="mtp")
    assert [g.ids for g in fast] == [g.ids for g in plain] and [g.text for g in fast] == [g.text for g in plain]
    assert all(f.stats["steps"] < p.stats["steps"] and f.stats["accepted"] > 0 for f, p in zip(fast, plain, strict=True))


@pytest.mark.parametrize("limit", [1, 2, 3, 7])
def test_speculation_stops_at_the_limit(demo: dsv3.Model, limit: int) -> None:
    wanted = demo.generate("Once upon a time", max_new_tokens=limit)
    found = demo.generate("Once upon a time", max_new_tokens=limit, draft="mtp")
    assert found.ids == wanted.ids and len(found.ids) == limit and found.finish_reason == "length"


def test_long_batches_are_cut_into_steps(demo: dsv3.Model) -> None:
    """More sequences than a batch holds, and prompts longer than a prefill step, mixed."""
    prompts = ["Once upon a time", "The king", "A", "One day a girl", "The sun was", "Lily"]
    wanted = [demo.generate(p, max_new_tokens=6).ids for p in prompts]
    demo.serve_with(most=3, budget=4)
    for draft in (None, "mtp"):
        assert [g.ids for g in demo.generate(prompts, max_new_tokens=6, draft=draft)] == wanted


def test_an_fp8_cache_is_the_same_on_every_path(tiny: Path) -> None:
    model = dsv3.load(str(tiny), dtype="float64", kv_dtype="fp8")
    wanted = model.logits(IDS[:80])
    for options in ({"absorbed": True}, {"chunk": 1, "absorbed": True}, {"chunk": 9}):
        assert (model.logits(IDS[:80], **options) - wanted).abs().max() <= TOLERANCE * wanted.abs().max()
    exact = dsv3.load(str(tiny), dtype="float64").logits(IDS[:80])
    error = (wanted - exact).norm() / exact.norm()
    assert 1e-5 < error < 0.3  # it rounds, and not by much: random weights amplify, and near ties of the router flip


@pytest.mark.parametrize("kv_dtype", ["float32", "bfloat16"])
def test_a_narrower_cache_comes_near(tiny: Path, kv_dtype: str) -> None:
    exact = dsv3.load(str(tiny), dtype="float64").logits(IDS[:40])
    found = dsv3.load(str(tiny), dtype="float64", kv_dtype=kv_dtype).logits(IDS[:40])
    assert (found - exact).norm() / exact.norm() < {"float32": 1e-6, "bfloat16": 0.02}[kv_dtype]


@pytest.mark.parametrize("quant", ["fp8-w8a16", "fp8-w8a8", "int8-w8a8", "int8-w8a16", "int4-w4a16"])
def test_conversion_on_load_comes_near(tiny: Path, quant: str) -> None:
    exact = dsv3.load(str(tiny), dtype="float32").logits(IDS[:40])
    model = dsv3.load(str(tiny), dtype="float32", quant=quant)
    assert model.placement().quant == quant
    error = (model.logits(IDS[:40]) - exact).norm() / exact.norm()
    assert 1e-5 < error < NEAR[quant.split("-")[0]]


def test_fp8_on_disk_converts_to_every_scheme(tmp_path: Path) -> None:
    """int8 from FP8 is int8 from the numbers that the FP8 stands for."""
    config = {**TINY, "quantization_config": FP8}
    folder = write_hf(tmp_path / "fp8", config, random_tensors(TINY, fp8=True))
    real = dsv3.load(str(folder), dtype="float32", quant="none").logits(IDS[:30])
    near = dsv3.load(str(folder), dtype="float32", quant="fp8-w8a16").logits(IDS[:30])
    assert (near - real).abs().max() <= 1e-5 * real.abs().max()
    for quant in ("fp8-w8a8", "int8-w8a8", "int8-w8a16", "int4-w4a16"):
        found = dsv3.load(str(folder), dtype="float32", quant=quant).logits(IDS[:30])
        assert (found - real).norm() / real.norm() < NEAR[quant.split("-")[0]]


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("fp8", [False, True])
def test_the_demos_layout_holds_the_same_model(tmp_path: Path, size: int, fp8: bool) -> None:
    """Any number of ranks, with Hugging Face's config.json and with ModelArgs. Split axes are whole blocks, as FP8 wants."""
    fields = {**TINY, "hidden_size": 128, "intermediate_size": 512, "moe_intermediate_size": 128, "n_shared_experts": 4,
              "num_attention_heads": 16, "num_key_value_heads": 16, "qk_nope_head_dim": 32, "qk_rope_head_dim": 32,
              "v_head_dim": 32}  # fmt: skip
    config = {**fields, "quantization_config": FP8} if fp8 else fields
    tensors = random_tensors(fields, fp8=fp8)
    wanted = dsv3.load(str(write_hf(tmp_path / "hf", config, tensors, shards=3))).logits(IDS[:20])
    assert torch.equal(dsv3.load(str(write_demo(tmp_path / "demo", config, tensors, size))).logits(IDS[:20]), wanted)
    args = {
        "vocab_size": 64, "dim": 128, "inter_dim": 512, "moe_inter_dim": 128, "n_layers": 2, "n_dense_layers": 1, "n_heads": 16,
        "n_routed_experts": 8, "n_shared_experts": 4, "n_activated_experts": 2, "n_expert_groups": 4, "n_limited_groups": 2,
        "score_func": "sigmoid", "route_scale": 2.5, "q_lora_rank": 24, "kv_lora_rank": 32, "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 32, "v_head_dim": 32, "original_seq_len": 32, "rope_factor": 4, "max_seq_len": 256,
        "dtype": "fp8" if fp8 else "bf16", "n_mtp_layers": 1,
    }  # fmt: skip
    folder = write_demo(tmp_path / "args", {"n_routed_experts": 8}, tensors, size)
    (folder / "config.json").unlink()
    (folder / "config_tiny.json").write_text(json.dumps(args))
    assert torch.equal(dsv3.load(str(folder)).logits(IDS[:20]), wanted)
    (folder / "config_tiny.json").write_text(json.dumps({**args, "max_seq_len": 32}))
    short = dsv3.load(str(folder)).logits(IDS[:20])
    assert not torch.equal(short, wanted)  # no YaRN at max_seq_len <= original_seq_len: another model, as in the demo
