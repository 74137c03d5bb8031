"""The story checkpoint: tokens, held-out loss and MTP acceptance as on its card, in bf16 and as the bundled FP8 copy."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import dsv3
from dsv3.eval import evaluate, read_texts
from dsv3.resources import resources
from tests.support.heldout import figures, windows

CARD = {"loss": 3.914, "bits_per_byte": 1.6123, "mtp_loss": 3.8414, "acceptance": 0.5799}


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
@pytest.mark.timeout(3600)  # bf16 on one busy core without bf16 units
def test_heldout_figures_are_those_of_the_card(shared_data: Path, story: Path) -> None:
    """All of the text through the library: bf16 as on the card, and the bundled FP8 copy close to it."""
    demo, bf16 = (dsv3.load(name, backend="reference") for name in ("demo", str(story)))
    found = evaluate(demo, read_texts([shared_data / "data" / "heldout"]), against=bf16, progress=True)
    card, copy, d = found.against, found.model, found.difference
    assert card is not None and d is not None and card.mtp_loss is not None and card.mtp_acceptance is not None
    print(f"card {CARD}\nbf16 {card}\nbundled FP8 {copy}\n{d}")
    assert (found.windows, found.tokens, card.dtype, card.quant) == (318, 81408, "bfloat16", "none")
    assert card.loss == pytest.approx(CARD["loss"], rel=1e-3)
    assert card.bits_per_byte == pytest.approx(CARD["bits_per_byte"], rel=1e-3)
    assert card.mtp_loss == pytest.approx(CARD["mtp_loss"], rel=1e-3)
    assert card.mtp_acceptance == pytest.approx(CARD["acceptance"], abs=5e-3)
    assert abs(d.loss_percent) < 1 and d.agreement > 0.9
