"""The picture: well formed, dots where the numbers are, under the roof, in colours that need no style variables."""

from __future__ import annotations

import importlib.util
import math
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from dsv3.bench.plot import HEIGHT, WIDTH, svg, write_plot
from dsv3.bench.results import Point
from dsv3.drawing.save import check_plot
from dsv3.errors import UsageError
from tests.bench.test_compare import SLOW, result

POINTS = [
    Point("decode b1, context 64", 1.0, 4.0, "workload"), Point("bmm <16x128>", 0.9, 3.0, "operator"),
    Point("prefill 512", 300.0, 45.0, "workload"), *(Point(f"quant_linear {n}", 1.0, 2.0, "operator") for n in range(20)),
]  # fmt: skip
_NS = {"s": "http://www.w3.org/2000/svg"}


def drawn() -> Any:
    made = result(SLOW, [])
    made.points = list(POINTS)
    return made


def test_dots_lie_under_the_roof_where_their_numbers_say() -> None:
    tree = ElementTree.fromstring(svg(drawn()))
    dots = tree.findall(".//s:circle", _NS)
    assert len(dots) == len(POINTS)
    places = [(float(d.get("cx", "")), float(d.get("cy", ""))) for d in dots]
    roof = tree.find(".//s:path[@class='roof']", _NS)
    assert roof is not None
    corner = [tuple(map(float, xy.split())) for xy in roof.get("d", "")[1:].split("L")][1]
    for point, (x, y) in zip(POINTS, places, strict=True):
        assert 0 < x < WIDTH and 0 < y < HEIGHT
        if point.intensity > 5.0:  # right of the ridge at 50 GFLOP/s over 10 GB/s
            assert x > corner[0] and y > corner[1]
    (x0, y0), (x1, _), (x2, y2) = places[:3]
    assert x1 < x0 < x2 and y2 < y0 < places[1][1]
    decade = (x2 - x0) / math.log10(300.0)
    assert corner[0] == pytest.approx(x0 + decade * math.log10(5.0), abs=0.2)


def test_names_do_not_cover_each_other() -> None:
    tree = ElementTree.fromstring(svg(drawn()))
    names = {p.label for p in POINTS}
    labels = [t for t in tree.findall(".//s:text", _NS) if t.text in names]
    assert len(labels) == 14 and any(t.text == "bmm <16x128>" for t in labels)
    heights = sorted(float(t.get("y", "")) for t in labels if (t.text or "").startswith("quant"))
    assert all(b - a >= 12 for a, b in pairwise(heights))


def test_colours_are_written_out_for_light_and_dark() -> None:
    text = svg(drawn())
    assert "var(" not in text and "currentColor" not in text and "prefers-color-scheme: dark" in text
    classes = {c.get("class") for c in ElementTree.fromstring(text).iter() if c.get("class")}
    light, _, dark = text.partition("@media")
    for name in classes:
        for style in (light, dark):
            assert re.search(rf"\.{name}\b[^{{]*{{[^}}]*(fill|stroke): ?#", style), name


def test_what_cannot_be_drawn_is_said_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"ends in \.svg"):
        check_plot(tmp_path / "x.pdf")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="pip install cairosvg"):
        check_plot(tmp_path / "x.png")
    with pytest.raises(UsageError, match="nothing with FLOP to draw"):
        write_plot(replace(drawn(), points=[]), tmp_path / "x.svg")
    assert list(tmp_path.iterdir()) == []


def test_files_are_written_whole(tmp_path: Path) -> None:
    write_plot(drawn(), tmp_path / "x.svg")
    ElementTree.parse(tmp_path / "x.svg")
    if importlib.util.find_spec("cairosvg") is None:
        pytest.skip("cairosvg is not installed: no PNG")
    write_plot(drawn(), tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG") and len(list(tmp_path.iterdir())) == 2
