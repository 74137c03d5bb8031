"""The roofline as a picture: FLOP per byte against GFLOP per second, both logarithmic, under the ceilings of the same run. An
SVG that needs nothing else, light or dark as its viewer is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from dsv3.bench.results import Point, Result
from dsv3.drawing.axes import Axis, curve, escaped, line, power_text, short, text
from dsv3.drawing.page import page, stylesheet
from dsv3.drawing.save import check_plot, save
from dsv3.errors import UsageError

WIDTH, HEIGHT = 760, 560
_LEFT, _RIGHT, _TOP, _BOTTOM = 76.0, 724.0, 96.0, 480.0
_LABELS = 14  # dots with a name beside them; the others say it on hovering
_STYLE = stylesheet(
    """
svg { font-size: 11px }
.head { font-size: 12px }
.grid, .roof, .lead { fill: none; stroke-width: 1 }
.roof { stroke-width: 2; stroke-linejoin: round }
.lead { stroke-width: .6 }
""",
    ".roof{stroke:text} .lead{stroke:soft} .workload{fill:first;stroke:bg} .operator{fill:second;stroke:bg}",
)


def write_plot(result: Result, path: Path) -> None:
    """Whole or not at all."""
    check_plot(path)
    if not result.points:
        raise UsageError(f"--plot: `dsv3 bench {result.what}` has nothing with FLOP to draw; plot decode, prefill or ops")
    save(svg(result), path)


def svg(result: Result) -> str:
    """The text of the file."""
    gb_s, gflop_s = result.best.read_gb_s, result.best.gflop_s
    x, y = _axes(result.points, gb_s, gflop_s)
    parts = [*_header(result), *_grid(x, y), *_roof(x, y, gb_s, gflop_s), *_dots(result.points, x, y)]
    return page(WIDTH, HEIGHT, f"dsv3 bench {result.what}: roofline", _STYLE, parts)


def _axes(points: Sequence[Point], gb_s: float, gflop_s: float) -> tuple[Axis, Axis]:
    """Of logarithms to base 10, in whole powers that hold all dots and the ridge, where the two ceilings meet."""
    across = [math.log10(p.intensity) for p in points] + [math.log10(gflop_s / gb_s)]
    up = [math.log10(p.gflop_s) for p in points] + [math.log10(gflop_s)]
    x0, x1 = math.floor(min(across) - 0.1), math.ceil(max(across) + 0.4)
    y0, y1 = math.floor(min(up) - 0.1), math.ceil(max(up) + 0.1)
    return Axis(x0, x1, _LEFT, _RIGHT), Axis(y0, y1, _BOTTOM, _TOP)


def _header(result: Result) -> list[str]:
    s = result.subject
    size = f"batch {s.batch}, context {s.context}, {s.threads} threads" if s.batch else f"{s.threads} threads"
    how = f"ceilings of the same run: read {result.best.read_gb_s:.1f} GB/s, products {result.best.gflop_s:,.0f} GFLOP/s"
    return [
        text(24, 34, f"Roofline: {result.what} of {short(s.model, 40)}", "title"),
        text(24, 54, short(f"{s.placement}; {size}", 118)),
        text(24, 71, how),
    ]


def _grid(x: Axis, y: Axis) -> list[str]:
    parts = []
    for power in range(round(x.low), round(x.high) + 1):
        parts += [line(x.at(power), _TOP, x.at(power), _BOTTOM, "grid")]
        parts += [text(x.at(power), _BOTTOM + 18, power_text(power), anchor="middle")]
    for power in range(round(y.low), round(y.high) + 1):
        parts += [line(_LEFT, y.at(power), _RIGHT, y.at(power), "grid")]
        parts += [text(_LEFT - 8, y.at(power) + 4, power_text(power), anchor="end")]
    parts.append(text((_LEFT + _RIGHT) / 2, _BOTTOM + 38, "FLOP per byte", anchor="middle"))
    return [*parts, text(24, _TOP - 10, "GFLOP/s")]


def _roof(x: Axis, y: Axis, gb_s: float, gflop_s: float) -> list[str]:
    """From where the slope enters the picture, at its left or its bottom, to the ridge, and level from there."""
    start = max(x.low, y.low - math.log10(gb_s))
    ridge = math.log10(gflop_s / gb_s)
    points = [(start, start + math.log10(gb_s)), (ridge, math.log10(gflop_s)), (x.high, math.log10(gflop_s))]
    names = text(x.at(x.high) - 4, y.at(math.log10(gflop_s)) - 8, f"{gflop_s:,.0f} GFLOP/s", "strong", "end")
    middle = (start + ridge) / 2
    read = text(x.at(middle) - 10, y.at(middle + math.log10(gb_s)) - 8, f"{gb_s:.1f} GB/s", "strong", "end")
    return [curve([(x.at(a), y.at(b)) for a, b in points], "roof"), names, read]


def _dots(points: Sequence[Point], x: Axis, y: Axis) -> list[str]:
    """Dots, and names beside the first so many, from the highest down: a name that would cover another goes below it."""
    parts = []
    for p in points:
        title = escaped(f"{p.label}: {p.gflop_s:,.3g} GFLOP/s at {p.intensity:,.3g} FLOP per byte")
        at, height, size = x.at(math.log10(p.intensity)), y.at(math.log10(p.gflop_s)), 6 if p.kind == "workload" else 4.5
        parts.append(f'<circle class="{p.kind}" cx="{at:.1f}" cy="{height:.1f}" r="{size}"><title>{title}</title></circle>')
    taken: list[tuple[float, float, float]] = []
    for p in sorted(points[:_LABELS], key=lambda p: -p.gflop_s):
        at, height, name = x.at(math.log10(p.intensity)), y.at(math.log10(p.gflop_s)), short(p.label, 34)
        wide = 6.2 * len(name)
        right = at + 20 + wide < _RIGHT + 20
        left = at + 20 if right else at - 20 - wide
        place = height + 4
        while any(left <= a + w and a <= left + wide and abs(place - b) < 13 for a, w, b in taken):
            place += 1
        taken.append((left, wide, place))
        if place - height - 4 > 3:
            parts.append(line(at, height, left - 2 if right else left + wide + 2, place - 4, "lead"))
        parts.append(text(left if right else at - 20, place, name, "strong", "start" if right else "end"))
    return parts
