"""The picture: well formed whatever is in it, and what it shows is what was found."""

from __future__ import annotations

import dataclasses
import xml.etree.ElementTree as ET

import pytest

import dsv3
from dsv3.drawing.axes import Axis, power_text, short, tick_text, ticks
from dsv3.eval import Evaluation, Text, evaluate, svg

_NS = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def compared(model: dsv3.Model, texts: list[Text]) -> Evaluation:
    other = dsv3.load("demo", dtype="float32", quant="int4-w4a16", backend="reference")
    return evaluate(other, texts, against=model, window=24)


def _parse(found: Evaluation) -> tuple[ET.Element, list[str]]:
    root = ET.fromstring(svg(found))
    assert root.tag == f"{_NS}svg" and root.get("role") == "img"
    _, _, width, height = map(float, (root.get("viewBox") or "").split())
    for group in root.iter(f"{_NS}g"):
        for rect in group.iter(f"{_NS}rect"):
            x, y, w, h = (float(rect.get(k) or "nan") for k in ("x", "y", "width", "height"))
            assert 0 <= x <= x + w <= width and 0 <= y <= y + h <= height
    return root, [t.text or "" for t in root.iter(f"{_NS}text")]


def test_a_comparison_has_three_panels_and_bars_for_both(compared: Evaluation) -> None:
    root, words = _parse(compared)
    heads = [t.text for t in root.iter(f"{_NS}text") if t.get("class") == "head"]
    assert heads[0] == "Bits per byte of every text" and "Loss over the position" in heads[1] and len(heads) == 3
    assert heads[2] == "Tokens by KL(demo none || demo int4-w4a16), nats"
    bars = [float(r.get("width") or 0) for r in root.iter(f"{_NS}rect") if r.get("height") == "9.0"]
    rows = [*compared.files, compared.model]
    values = [v for r in rows[:-1] for v in (r.bits_per_byte, r.against_bits_per_byte)]  # type: ignore[union-attr]
    values += [compared.model.bits_per_byte, compared.against.bits_per_byte]  # type: ignore[union-attr]
    assert len(bars) == 6
    assert [b / bars[0] for b in bars] == pytest.approx([v / values[0] for v in values], rel=2e-3)
    assert {"two.txt", "one.txt", "all"} <= set(words)


def test_one_model_alone(compared: Evaluation) -> None:
    alone = dataclasses.replace(
        compared, against=None, difference=None,
        files=[dataclasses.replace(f, against_bits_per_byte=None, against_loss=None) for f in compared.files],
    )  # fmt: skip
    root, words = _parse(alone)
    assert sum(t.get("class") == "head" for t in root.iter(f"{_NS}text")) == 2
    assert not [r for r in root.iter(f"{_NS}rect") if r.get("class") == "other"]
    assert any(w.startswith("loss ") and "bits per byte" in w for w in words)


def test_awkward_names_and_many_files(compared: Evaluation) -> None:
    row = dataclasses.replace(compared.files[0], name='<b>&"\x01\udcff' + "x" * 90)
    _, words = _parse(dataclasses.replace(compared, files=[row] * 45))
    assert "and 5 more texts, which the total counts" in words
    assert any(w.startswith('<b>&"\ufffd\ufffdx') and len(w) == 26 and "…" in w for w in words)


def test_a_model_against_itself_and_a_window_of_two(model: dsv3.Model, texts: list[Text]) -> None:
    same = evaluate(model, texts, against=model, window=2, tokens=2, mtp=False)
    assert same.labels == ("demo none (1)", "demo none (2)")
    _, words = _parse(same)
    assert "≤ 10⁻⁸" in words
    _parse(evaluate(model, [Text("t", "Oh")], mtp=False))


def test_ticks_are_round_and_span_the_values() -> None:
    assert ticks(0, 1.9, 5) == pytest.approx([0, 0.5, 1.0, 1.5, 2.0])
    assert [tick_text(t) for t in ticks(3.41, 4.39, 5)] == ["3.4", "3.6", "3.8", "4", "4.2", "4.4"]
    for low, high in ((0.0, 7e-5), (2.0, 2.0), (-3.0, 11.0), (0.0, 0.0)):
        found = ticks(low, high, 5)
        assert found[0] <= low <= high <= found[-1] and 2 <= len(found) <= 7
    assert power_text(-12) == "10⁻¹²" and short("abcdefgh", 5) == "ab…gh"
    assert [Axis(0, 2, 10, 20).at(v) for v in (-1, 1, 5)] == [10, 15, 20] and Axis(1, 1, 3, 9).at(1) == 3
