"""A run as a picture: which share of requests had waited no longer than so, for the first token and between tokens, and what
came out of the server while it ran."""

from __future__ import annotations

import math
from collections.abc import Sequence

from dsv3.bench.serve.client import Sample
from dsv3.bench.serve.figures import Goal, Outcome, quantile
from dsv3.drawing.axes import Axis, curve, line, short, text, tick_text, ticks
from dsv3.drawing.page import page, stylesheet

WIDTH, HEIGHT = 760, 620
_BINS = 60
_POINTS = 400  # of a curve; more cannot be seen
_STYLE = stylesheet(
    """
svg { font-size: 11px }
.head { font-size: 12px }
.grid, .line, .other, .goal { fill: none; stroke-width: 1 }
.line, .other { stroke-width: 2; stroke-linejoin: round }
.goal { stroke-dasharray: 4 4 }
""",
    ".line{stroke:first} .other{stroke:second} .goal{stroke:soft} .ofline{fill:first} .ofother{fill:second}",
)


def svg(found: Outcome, samples: Sequence[Sample], title: str, goal: Goal) -> str:
    """The text of the file. title: what was asked of which server."""
    whole = [s for s in samples if s.error is None]
    first = [1e3 * s.ttft for s in whole if s.ttft is not None]
    between = [1e3 * gap for s in whole for gap in s.itl]
    rates = f"{found.tokens_s:,.1f} tokens/s, {found.requests_s:.2f} requests/s"
    head = f"{found.whole} of {found.requests} requests whole, {rates}"
    parts = [text(24, 34, "Load: dsv3 bench serve", "title"), text(24, 54, short(title, 118)), text(24, 71, head)]
    parts += _shares(first, "time to first token, ms", 64.0, 362.0, goal.ttft)
    parts += _shares(between, "between events, ms", 438.0, 736.0, goal.per_token)
    parts += _output(whole, min(s.start for s in samples), found.seconds)
    return page(WIDTH, HEIGHT, "dsv3 bench serve: latencies and throughput", _STYLE, parts)


def _frame(
    x: Axis, y: Axis, across: Sequence[float], up: Sequence[float], name: str, unit: str, style: str = "soft"
) -> list[str]:
    """Grid, numbers, the name of each axis. unit: of y, in its style."""
    parts = []
    for value in across:
        parts += [line(x.at(value), y.end, x.at(value), y.start, "grid")]
        parts += [text(x.at(value), y.start + 16, tick_text(value), anchor="middle")]
    for value in up:
        parts += [line(x.start, y.at(value), x.end, y.at(value), "grid")]
        parts += [text(x.start - 7, y.at(value) + 4, tick_text(value), anchor="end")]
    return [
        *parts,
        text((x.start + x.end) / 2, y.start + 34, name, anchor="middle"),
        text(x.start - 40, y.end - 10, unit, style),
    ]


def _shares(values: Sequence[float], name: str, left: float, right: float, goal: float | None) -> list[str]:
    """The share of values at or below, in percent, up to twice the p99: a single straggler would flatten all others."""
    y = Axis(0, 100, 310.0, 122.0)
    s = sorted(values)
    up = [0.0, 25.0, 50.0, 75.0, 100.0]
    if not s:
        return [*_frame(Axis(0, 1, left, right), y, [], up, name, "% of all"), text(left + 10, 220, "nothing was measured")]
    middle, high = quantile(s, 0.5), quantile(s, 0.99)
    across = ticks(0.0, max(min(s[-1], 2 * high), 1e-3), 5)
    x = Axis(across[0], across[-1], left, right)
    steps = [(x.start, y.start)]
    for k in range(min(_POINTS, len(s))):
        n = k if len(s) <= _POINTS else round(k * (len(s) - 1) / (_POINTS - 1))
        if s[n] > x.high:
            break
        steps += [(x.at(s[n]), steps[-1][1]), (x.at(s[n]), y.at(100 * (n + 1) / len(s)))]
    parts = [*_frame(x, y, across, up, name, "% of all"), curve(steps, "line")]
    if goal is not None and 1e3 * goal <= x.high:
        parts += [line(x.at(1e3 * goal), y.end, x.at(1e3 * goal), y.start, "goal")]
        parts += [text(x.at(1e3 * goal) + 4, y.start - 6, "goal")]
    said = f"median {middle:,.3g}, p99 {high:,.3g}, worst {s[-1]:,.3g}"
    return [*parts, text(right, y.end - 10, said, "strong", "end")]


def _output(whole: Sequence[Sample], start: float, seconds: float) -> list[str]:
    """Tokens a second and requests under way, over the run."""
    wide = max(seconds, 1e-6) / _BINS
    tokens, under_way = [0.0] * _BINS, [0.0] * _BINS
    for s in whole:
        for at in s.arrivals:  # the answer's tokens, evenly over its events
            tokens[min(int((at - start) / wide), _BINS - 1)] += s.tokens / len(s.arrivals) / wide
        for n in range(_BINS):
            low, high = start + n * wide, start + (n + 1) * wide
            under_way[n] += max(0.0, min(s.end, high) - max(s.start, low)) / wide
    across = ticks(0.0, max(seconds, 1e-6), 8)
    x = Axis(0.0, max(across[-1], seconds), 64.0, 696.0)
    up, right = ticks(0.0, max(*tokens, 1.0), 4), ticks(0.0, max(math.ceil(max(under_way)), 1), 4)
    y, other = Axis(0.0, up[-1], 570.0, 392.0), Axis(0.0, right[-1], 570.0, 392.0)
    parts = _frame(x, y, across, up, "seconds", "tokens/s", "ofline")
    parts += [text(x.end + 7, other.at(value) + 4, tick_text(value)) for value in right]
    parts += [text(736.0, other.end - 10, "requests under way", "ofother", "end")]
    for values, axis, style in ((under_way, other, "other"), (tokens, y, "line")):
        steps = [(x.at((n + end) * wide), axis.at(value)) for n, value in enumerate(values) for end in (0, 1)]
        parts.append(curve(steps, style))
    return parts
