"""Figures against a computation by hand in NumPy, from the logits that the model gives one window at a time."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import dsv3
from dsv3.errors import Dsv3Error, UsageError
from dsv3.eval import Evaluation, Text, evaluate, read_texts
from dsv3.eval.stream import encode
from tests.support.heldout import figures, windows

WINDOW = 24


@pytest.fixture(scope="module")
def schemes() -> dict[str, dsv3.Model]:
    return {
        quant: dsv3.load("demo", dtype="float32", quant=quant, backend="reference") for quant in ("fp8-w8a16", "int4-w4a16")
    }  # type: ignore[arg-type]


def _log_p(logits: torch.Tensor) -> NDArray[np.float64]:
    """Log-probabilities [T, V] by their definition."""
    values = logits.numpy().astype(np.float64)
    values -= values.max(axis=1, keepdims=True)
    return values - np.log(np.exp(values).sum(axis=1, keepdims=True))


def _by_hand(model: dsv3.Model, other: dsv3.Model, texts: list[Text]) -> dict[str, Any]:
    """Every figure of a comparison, token by token."""
    ids = encode(model, texts).ids.tolist()
    loss, other_loss, kl, same, mtp_loss, accepted = [], [], [], [], [], []
    for at in range(0, len(ids) - WINDOW, WINDOW):
        inputs, targets = ids[at : at + WINDOW], ids[at + 1 : at + WINDOW + 1]
        q, p = _log_p(model.logits(inputs)), _log_p(other.logits(inputs))
        drafts = _log_p(model.mtp_logits(inputs))
        for i, target in enumerate(targets):
            loss.append(-q[i, target])
            other_loss.append(-p[i, target])
            kl.append(float(np.sum(np.exp(p[i]) * (p[i] - q[i]))))
            same.append(q[i].argmax() == p[i].argmax())
        for i in range(WINDOW - 1):
            mtp_loss.append(-drafts[i, targets[i + 1]])
            accepted.append(drafts[i].argmax() == q[i + 1].argmax())
    return {
        "loss": loss, "other_loss": other_loss, "kl": kl, "same": same, "mtp_loss": np.mean(mtp_loss),
        "accepted": np.mean(accepted), "ids": ids,
    }  # fmt: skip


@pytest.fixture(scope="module")
def compared(model: dsv3.Model, schemes: dict[str, dsv3.Model], texts: list[Text]) -> tuple[Evaluation, dict[str, Any]]:
    """int4 beside the demo in float32: found, and by hand."""
    this = schemes["int4-w4a16"]
    return evaluate(this, texts, against=model, window=WINDOW), _by_hand(this, model, texts)


def test_figures_are_those_computed_by_hand(compared: tuple[Evaluation, dict[str, Any]], texts: list[Text]) -> None:
    found, hand = compared
    n = len(hand["loss"])
    assert (found.tokens, found.windows, found.window) == (n, n // WINDOW, WINDOW) and found.windows >= 4
    loss, other = np.mean(hand["loss"]), np.mean(hand["other_loss"])
    nbytes = sum(len(d.encode()) for t in texts for d in t.documents)
    rated, against, d = found.model, found.against, found.difference
    assert against is not None and d is not None
    assert rated.loss == pytest.approx(loss, rel=1e-5) and against.loss == pytest.approx(other, rel=1e-5)
    assert rated.perplexity == pytest.approx(math.exp(loss), rel=1e-4)
    assert rated.bits_per_byte == pytest.approx(loss / math.log(2) * len(hand["ids"]) / nbytes, rel=1e-5)
    assert rated.mtp_loss == pytest.approx(hand["mtp_loss"], rel=1e-5)
    assert rated.mtp_acceptance == pytest.approx(hand["accepted"], abs=1e-9)
    assert d.kl == pytest.approx(np.mean(hand["kl"]), rel=1e-4) and d.kl_max == pytest.approx(max(hand["kl"]), rel=1e-3)
    assert d.kl_median == pytest.approx(np.median(hand["kl"]), rel=1e-3)
    assert d.agreement == pytest.approx(np.mean(hand["same"]), abs=1e-9)
    assert d.loss_percent == pytest.approx(100 * (loss / other - 1), rel=1e-2)
    by_window = np.reshape(hand["kl"], (-1, WINDOW)).mean(axis=1)
    assert d.kl_error == pytest.approx(np.sqrt(by_window.var(ddof=1) / len(by_window)), rel=1e-3)
    assert sum(d.kl_histogram.counts) == n and len(d.kl_histogram.edges) == len(d.kl_histogram.counts) + 1


def test_rows_of_files_and_positions_are_parts_of_the_whole(
    compared: tuple[Evaluation, dict[str, Any]], model: dsv3.Model, texts: list[Text]
) -> None:
    found, hand = compared
    edge = len(encode(model, texts[:1])) - 1  # predicted tokens of the first text: all but its BOS
    for row, part in zip(found.files, (slice(0, edge), slice(edge, None)), strict=True):
        assert row.tokens == len(hand["loss"][part])
        assert row.loss == pytest.approx(np.mean(hand["loss"][part]), rel=1e-5)
        assert row.against_loss == pytest.approx(np.mean(hand["other_loss"][part]), rel=1e-5)
        assert row.kl == pytest.approx(np.mean(hand["kl"][part]), rel=1e-4)
        assert row.agreement == pytest.approx(np.mean(hand["same"][part]), abs=1e-9)
        assert row.bits_per_byte == pytest.approx(row.loss / math.log(2) / row.bytes_per_token, rel=1e-9)
    assert [r.name for r in found.files] == ["two.txt", "one.txt"]
    assert (found.positions[0].first, found.positions[-1].last) == (0, WINDOW - 1)
    assert all(b.first == a.last + 1 for a, b in itertools.pairwise(found.positions))
    by_position = np.reshape(hand["loss"], (-1, WINDOW)).mean(axis=0)
    assert [r.loss for r in found.positions] == pytest.approx(by_position.tolist(), rel=1e-5)  # 24 positions: a row each


def test_a_model_is_itself(model: dsv3.Model, texts: list[Text]) -> None:
    d = evaluate(model, texts, against=model, window=WINDOW, mtp=False).difference
    assert d is not None
    assert (d.kl, d.kl_max, d.agreement, d.loss_percent, d.loss_percent_error) == (0.0, 0.0, 1.0, 0.0, 0.0)


def test_coarser_schemes_are_further_away(model: dsv3.Model, schemes: dict[str, dsv3.Model], texts: list[Text]) -> None:
    # The demo is stored in FP8, so that fp8-w8a16 holds the very same weights; eight bits a row are between it and four.
    eight = dsv3.load("demo", dtype="float32", quant="int8-w8a8", backend="reference")
    kl = {}
    for name, other in (*schemes.items(), ("int8-w8a8", eight)):
        found = evaluate(other, texts, against=model, window=WINDOW, mtp=False)
        assert found.difference is not None and found.against is not None
        kl[name] = found.difference.kl
        assert found.model.weight_bytes < found.against.weight_bytes
    print(kl)
    assert kl["fp8-w8a16"] < 1e-9 < kl["int8-w8a8"] < kl["int4-w4a16"] < 1


def test_fp8_costs_less_than_int4_on_the_unquantised_checkpoint(shared_data: Path, story: Path) -> None:
    texts = read_texts([shared_data / "data" / "heldout"])
    whole = dsv3.load(str(story), dtype="float32", backend="reference")
    kl = []
    for quant in ("fp8-w8a16", "int4-w4a16"):
        other = dsv3.load(str(story), dtype="float32", quant=quant, backend="reference")  # type: ignore[arg-type]
        found = evaluate(other, texts, against=whole, tokens=256, mtp=False)
        assert found.difference is not None
        kl.append(found.difference.kl)
    print(kl)
    assert 0 < 4 * kl[0] < kl[1]


def test_windows_of_the_card_are_scored_alike(shared_data: Path, story: Path) -> None:
    """The first windows against the tests' own loop, which steps through them one at a time."""
    model = dsv3.load(str(story), dtype="float32", backend="reference")
    chosen = windows(shared_data, model.tokenizer)[:2]
    found = evaluate(model, read_texts([shared_data / "data" / "heldout"]), tokens=2 * 256 + 100)
    wanted = figures(model, chosen)
    assert (found.windows, found.tokens) == (2, 512)
    assert found.model.loss == pytest.approx(wanted["loss"], rel=1e-5)
    assert found.model.mtp_loss == pytest.approx(wanted["mtp_loss"], rel=1e-5)
    assert found.model.mtp_acceptance == pytest.approx(wanted["acceptance"], abs=2e-3)  # ties may fall otherwise


@pytest.mark.parametrize("window", [31, 32])
def test_windows_that_take_several_steps_score_alike(
    model: dsv3.Model, texts: list[Text], monkeypatch: pytest.MonkeyPatch, window: int
) -> None:
    """Steps of 10 tokens: the last of 31 has one row, and none for the MTP module."""
    whole = evaluate(model, texts, against=model, window=window)
    monkeypatch.setattr("dsv3.eval.score._CPU_TOKENS", 10)
    parts = evaluate(model, texts, against=model, window=window)
    assert parts.model.loss == pytest.approx(whole.model.loss, rel=1e-5)
    assert parts.model.mtp_loss == pytest.approx(whole.model.mtp_loss, rel=1e-5)
    assert parts.model.mtp_acceptance == pytest.approx(whole.model.mtp_acceptance, abs=1e-9)
    assert [r.loss for r in parts.positions] == pytest.approx([r.loss for r in whole.positions], rel=1e-5)


def test_a_short_text_is_one_window(model: dsv3.Model) -> None:
    found = evaluate(model, [Text("t", "Once upon a time")])
    ids = encode(model, [Text("t", "Once upon a time")]).ids.tolist()
    assert (found.windows, found.window, found.tokens) == (1, len(ids) - 1, len(ids) - 1)
    wanted = -_log_p(model.logits(ids[:-1]))[range(len(ids) - 1), ids[1:]].mean()
    assert found.model.loss == pytest.approx(wanted, rel=1e-5) and found.difference is None


def test_without_mtp_modules_their_figures_are_absent(model: dsv3.Model, texts: list[Text]) -> None:
    bare = dsv3.load("demo", dtype="float32", quant="none", backend="reference", mtp=False)
    found = evaluate(model, texts, against=bare, window=WINDOW, tokens=48)
    assert found.against is not None
    assert found.model.mtp_loss is not None and (found.against.mtp_loss, found.against.mtp_acceptance) == (None, None)
    assert found.against.weight_bytes < found.model.weight_bytes
    assert evaluate(model, texts, window=WINDOW, tokens=48, mtp=False).model.mtp_loss is None


def test_json_holds_every_figure(model: dsv3.Model, schemes: dict[str, dsv3.Model], texts: list[Text]) -> None:
    found = evaluate(schemes["int4-w4a16"], texts, against=model, window=WINDOW, tokens=50)
    data = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert data.pop("kind") == "dsv3 eval" and data.pop("schema") == 1
    assert data.keys() == Evaluation.__dataclass_fields__.keys()
    assert data["model"]["loss"] == found.model.loss and data["difference"]["kl"] == found.difference.kl  # type: ignore[union-attr]
    assert [row["name"] for row in data["files"]] == ["two.txt"] and data["tokens"] == 48


def test_what_cannot_be_scored_is_refused(model: dsv3.Model, texts: list[Text], lookalike: Path) -> None:
    for arguments in ({"window": 1}, {"window": True}, {"tokens": 1}, {"window": 10**6}):
        with pytest.raises(UsageError):
            evaluate(model, texts * 400 if arguments.get("window") == 10**6 else texts, **arguments)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="meta"):
        evaluate(dsv3.load("demo", device="meta"), texts)
    (lookalike / "tokenizer.json").unlink()
    with pytest.raises(UsageError, match=r"lookalike has no tokenizer\.json"):
        evaluate(dsv3.load(str(lookalike)), texts)


def test_models_with_other_tokens_are_not_compared(model: dsv3.Model, texts: list[Text], lookalike: Path) -> None:
    path = lookalike / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    words = tokenizer["model"]["vocab"]
    a, b = (w for w, i in words.items() if i in (300, 301))
    words[a], words[b] = words[b], words[a]
    path.write_text(json.dumps(tokenizer))
    with pytest.raises(UsageError, match="cannot be compared token by token: other tokens"):
        evaluate(model, texts, against=dsv3.load(str(lookalike)))


def test_nan_is_an_error(texts: list[Text], monkeypatch: pytest.MonkeyPatch) -> None:
    broken = dsv3.load("demo")
    head = broken.head
    monkeypatch.setattr(broken, "head", lambda hidden: head(hidden).masked_fill(torch.arange(4096) == 7, float("nan")))
    with pytest.raises(Dsv3Error, match="NaN logits"):
        evaluate(broken, texts)
