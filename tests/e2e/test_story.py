"""The story checkpoint: tokens, held-out loss and MTP acceptance as on its card, in bf16 and as the bundled FP8 copy."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import dsv3
from dsv3.resources import resources
from tests.support.heldout import figures, windows

CARD = {"loss": 3.914, "mtp_loss": 3.8414, "acceptance": 0.5799}


def test_greedy_tokens_are_the_other_implementations(story: Path) -> None:
    model = dsv3.load(str(story), dtype="float32")
    for prompt, wanted in json.loads((story / "greedy.json").read_text()).items():
        assert model.tokenizer.encode(prompt) == wanted["prompt_ids"]
        count = len(wanted["new_ids"])
        for draft in (None, "mtp"):
            found = model.generate(wanted["prompt_ids"], max_new_tokens=count, ignore_eos=True, draft=draft)
            assert found.ids == wanted["new_ids"]


def test_the_bundled_copy_is_small_fp8_and_of_the_same_make(story: Path) -> None:
    demo = dsv3.load("demo")
    assert demo.placement().quant == "fp8-w8a16"
    folder = resources("configs", "demo")
    assert sum(p.stat().st_size for p in folder.iterdir()) < 25e6
    assert (folder / "tokenizer.json").read_bytes() == (story / "tokenizer.json").read_bytes()


def test_a_sample_of_the_heldout_text_scores_as_on_the_card(shared_data: Path, story: Path) -> None:
    """Every twentieth window; the whole is in the slow tests."""
    model = dsv3.load(str(story))
    chosen = windows(shared_data, model.tokenizer)
    assert len(chosen) == 318
    found = figures(model, chosen[::20])
    assert abs(found["loss"] / CARD["loss"] - 1) < 0.06
    assert abs(found["acceptance"] - CARD["acceptance"]) < 0.03


@pytest.mark.slow
def test_heldout_loss_and_acceptance(shared_data: Path, story: Path) -> None:
    model = dsv3.load(str(story))
    chosen = windows(shared_data, model.tokenizer)
    bf16, fp8 = figures(model, chosen), figures(dsv3.load("demo"), chosen)
    loss, share = bf16["loss"] / CARD["loss"] - 1, bf16["acceptance"] - CARD["acceptance"]
    copy = fp8["loss"] / bf16["loss"] - 1
    print(f"card {CARD}\nbf16 {bf16}\nbundled FP8 {fp8}")
    print(f"bf16 loss {loss:+.3%} of the card, acceptance {share:+.4f}; FP8 loss {copy:+.3%} of bf16")
    assert abs(loss) < 0.005
    assert abs(share) < 0.01
    assert abs(copy) < 0.01
