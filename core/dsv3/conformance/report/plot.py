"""Margins as a plot: a strip of inline SVG per operator, one mark per case, on a log axis with the lines at 0.5 and 1."""

from __future__ import annotations

import html
import math
from collections.abc import Iterator, Sequence

from dsv3.conformance.report.rows import Row, rows
from dsv3.conformance.report.text import number, one_line
from dsv3.conformance.result import WARN_MARGIN, CaseResult, Report

WIDTH, HEIGHT = 640, 34
_LOW, _HIGH = -4, 1  # powers of ten at the ends of the axis
_LEFT, _RIGHT = 52.0, 596.0
_EXACT, _OVER = 16.0, 624.0  # lanes of margin 0, and of margins off the axis, infinite ones and NaN
_BIN = 6
_OFFSETS = (0, 6, -6, 12, -12)
_TICKS = (
    (-4, "1e-4"),
    (-3, "1e-3"),
    (-2, "0.01"),
    (-1, "0.1"),
    (math.log10(WARN_MARGIN), str(WARN_MARGIN)),
    (0, "1"),
    (1, "10"),
)


def plot(report: Report) -> Iterator[str]:
    """An HTML table: operator, strip, worst margin. Operators none of whose cases ran are left out."""
    shown = [row for row in rows(report) if row.ran]
    if not shown:
        yield "<p>No case ran, so there are no margins.</p>"
        return
    yield '<div class="scroll" role="region" aria-label="Margins per operator" tabindex="0"><table class="plot">'
    heads = f'<th scope="col">operator</th><th scope="col">{_axis()}</th><th scope="col" class="n">worst</th>'
    yield f"<thead><tr>{heads}</tr></thead><tbody>"
    for row in shown:
        margin = row.margin
        worst = "" if margin is None else number(margin)
        label = f"{len(row.ran)} results, worst margin {worst}"
        strip = "".join(_marks(row))
        yield (
            f'<tr><th scope="row">{html.escape(one_line(row.name, 40))}</th><td><svg viewBox="0 0 {WIDTH} {HEIGHT}" '
            f'width="{WIDTH}" height="{HEIGHT}" role="img" aria-label="{html.escape(label)}">{_ground()}{strip}</svg></td>'
            f'<td class="n {severity(margin)}">{worst}</td></tr>'
        )
    yield "</tbody></table></div>"


def severity(margin: float | None) -> str:
    """The class that colours a margin: "ok", "warn" above 0.5, "bad" above 1 and for NaN."""
    if margin is None:
        return "none"
    return "ok" if margin <= WARN_MARGIN else "warn" if margin <= 1 else "bad"


def place(margin: float) -> float:
    """The x of a margin: exact ones in a lane at the left, those off the axis in one at the right."""
    if margin == 0:
        return _EXACT
    if not math.isfinite(margin) or margin < 0 or math.log10(margin) > _HIGH:
        return _OVER
    return _at(max(math.log10(margin), _LOW))


def _at(power: float) -> float:
    return _LEFT + (power - _LOW) / (_HIGH - _LOW) * (_RIGHT - _LEFT)


def _axis() -> str:
    labels = [(_EXACT, "0"), *((_at(p), text) for p, text in _TICKS), (_OVER, ">10")]
    texts = "".join(f'<text x="{x:.0f}" y="15" text-anchor="middle">{html.escape(t)}</text>' for x, t in labels)
    return (
        f'<svg viewBox="0 0 {WIDTH} 22" width="{WIDTH}" height="22" role="img" '
        f'aria-label="margin, the error over its budget, on a log axis from 1e-4 to 10">{texts}</svg>'
    )


def _ground() -> str:
    """Zones above 0.5 and above 1, and the lines of the axis."""
    warn, bad = _at(math.log10(WARN_MARGIN)), _at(0)
    zones = (
        f'<rect class="zone-warn" x="{warn:.1f}" y="0" width="{bad - warn:.1f}" height="{HEIGHT}"/>'
        f'<rect class="zone-bad" x="{bad:.1f}" y="0" width="{WIDTH - bad:.1f}" height="{HEIGHT}"/>'
    )
    plain = "".join(f"M{_at(p):.1f} 0V{HEIGHT}" for p in range(_LOW, _HIGH + 1) if p)
    return f'{zones}<path class="grid" d="{plain}"/><path class="limit" d="M{warn:.1f} 0V{HEIGHT}M{bad:.1f} 0V{HEIGHT}"/>'


def _marks(row: Row) -> Iterator[str]:
    """Marks of one operator: those that share a place are stacked, and beyond five the last one names the rest. Failures are
    drawn last, over the others."""
    bins: dict[tuple[int, str], list[CaseResult]] = {}
    for case in row.ran:
        bins.setdefault((round(place(case.margin) / _BIN), _kind(case)), []).append(case)
    order = ("ok", "warn", "waived", "bad")
    for (x, kind), cases in sorted(bins.items(), key=lambda item: (order.index(item[0][1]), item[0][0])):
        shown = cases[: len(_OFFSETS)]
        for i, (case, offset) in enumerate(zip(shown, _OFFSETS, strict=False)):
            last = i == len(_OFFSETS) - 1
            title = _title(case, cases[len(_OFFSETS) :] if last else ())
            yield f"<g>{_shape(kind, x * _BIN, HEIGHT // 2 + offset)}<title>{html.escape(title)}</title></g>"


def _kind(case: CaseResult) -> str:
    if case.status == "passed":
        return severity(case.margin)
    return "waived" if case.status == "waived" else "bad"


def _shape(kind: str, x: int, y: int) -> str:
    """A shape per kind, so that colour is not all that tells them apart: disc, ring, triangle, cross."""
    if kind in ("ok", "warn"):
        return f'<circle class="{kind}" cx="{x}" cy="{y}" r="{3 if kind == "ok" else 3.5}"/>'
    if kind == "waived":
        return f'<path class="waived" d="M{x} {y - 4}l4 7h-8z"/>'
    return f'<path class="bad" d="M{x - 3} {y - 3}l6 6m0 -6l-6 6"/>'


def _title(case: CaseResult, others: Sequence[CaseResult]) -> str:
    text = f"{one_line(case.id, 200)}: margin {number(case.margin)}"
    return f"{text}; and {len(others)} more, worst {number(max(o.margin for o in others))}" if others else text
