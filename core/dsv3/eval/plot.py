"""An evaluation as a picture: bits per byte of every text, loss over the position in the window, and, against another model,
how its divergence is spread over the tokens. One SVG that needs nothing else, light or dark as its viewer is."""

from __future__ import annotations

import math
from collections.abc import Iterator

from dsv3.drawing.axes import Axis, bar, curve, line, power_text, short, text, tick_text, ticks
from dsv3.drawing.page import page, stylesheet
from dsv3.eval.results import Difference, Evaluation, FileRow

WIDTH = 760
_LEFT, _RIGHT = 24.0, 736.0
_NAMES, _BARS_END = 196.0, 560.0  # of the panel of files: names end, bars end
_FILES = 40  # shown; a longer picture is none
_PLOT = 64.0  # where the area of the other panels begins
_TALL = 170.0
_STYLE = stylesheet(
    """
svg { font-size: 12px }
.head { font-size: 13px }
.grid, .mark, .this-line, .other-line { fill: none; stroke-linejoin: round }
.mark { stroke-dasharray: 3 3 }
.this-line { stroke-width: 1.8 }
.other-line { stroke-width: 5; stroke-opacity: .55 }
""",
    ".mark{stroke:soft} .this{fill:first} .other{fill:second} .this-line{stroke:first} .other-line{stroke:second}",
)


def svg(found: Evaluation) -> str:
    """The text of the file."""
    parts, y = [], 0.0
    panels = [_header(found), _files(found), _positions(found)]
    if found.difference is not None:
        panels.append(_divergence(found.difference, found.labels))
    for height, elements in panels:
        parts.append(f'<g transform="translate(0 {y:.0f})">{"".join(elements)}</g>')
        y += height
    return page(WIDTH, y + 12, f"dsv3 eval: {_title(found)}", _STYLE, parts)


_Panel = tuple[float, list[str]]


def _title(found: Evaluation) -> str:
    this, other = found.labels
    return f"{this} against {other}" if other else this


def _header(found: Evaluation) -> _Panel:
    this, other = found.labels
    r, o, d = found.model, found.against, found.difference
    size = f"{found.tokens:,} tokens in {found.windows:,} windows of {found.window}"
    if o is not None and d is not None:
        said = f"loss {r.loss:.4f}, the other's {o.loss:.4f} nats per token ({d.loss_percent:+.2f} %)"
        said += f", mean KL {d.kl:.2e} nats, same first choice {d.agreement:.1%}"
    else:
        said = f"loss {r.loss:.4f} nats per token, {r.bits_per_byte:.4f} bits per byte, perplexity {r.perplexity:.2f}"
    parts = [text(_LEFT, 34, short(_title(found), 76), "title"), text(_LEFT, 55, size), text(_LEFT, 72, said)]
    x = _LEFT
    for style, name in (("this", this), ("other", other)):
        if other:
            parts += [bar(x, 87, 12, 12, style, name), text(x + 18, 97, short(name, 40), "strong")]
            x += 42 + 7.2 * len(short(name, 40))
    return (124.0 if other else 98.0), parts


def _files(found: Evaluation) -> _Panel:
    rows = [row for row in found.files if row.bits_per_byte is not None]
    hidden, rows = len(rows[_FILES:]), rows[:_FILES]
    two = found.against is not None
    total = FileRow("all", found.tokens, found.bytes_per_token, found.model.loss, found.model.bits_per_byte)
    if found.against is not None:
        total = FileRow(
            *(total.name, total.tokens, total.bytes_per_token, total.loss, total.bits_per_byte),
            against_bits_per_byte=found.against.bits_per_byte,
        )
    rows.append(total)
    most = max(v for r in rows for v in (r.bits_per_byte, r.against_bits_per_byte) if v is not None)
    marks = ticks(0.0, most, 5)
    axis, thick = Axis(0.0, marks[-1], _NAMES + 8, _BARS_END), 10.0 if two else 14.0
    step = 2 * thick + 12 if two else thick + 10
    bottom = 34 + step * len(rows)
    parts = [text(_LEFT, 14, "Bits per byte of every text", "head")]
    for value in marks:
        parts += [line(axis.at(value), 28, axis.at(value), bottom, "grid")]
        parts += [text(axis.at(value), bottom + 16, tick_text(value), anchor="middle")]
    for n, row in enumerate(rows):
        parts += _bars(row, 34 + n * step, thick, axis)
    if hidden:
        parts.append(text(_LEFT, bottom + 34, f"and {hidden} more texts, which the total counts"))
    return bottom + (62 if hidden else 46), parts


def _bars(row: FileRow, y: float, thick: float, axis: Axis) -> Iterator[str]:
    """The name of a text, its bars, their values."""
    values = [("this", row.bits_per_byte), ("other", row.against_bits_per_byte)]
    shown = [(style, value) for style, value in values if value is not None]
    middle = y + thick * len(shown) / 2 + 4
    yield text(_NAMES, middle, short(row.name, 26), "strong", "end")
    for n, (style, value) in enumerate(shown):
        title = f"{row.name}: {value:.4f} bits per byte, {row.tokens:,} tokens"
        yield bar(axis.start, y + n * thick, axis.at(value) - axis.start, thick - 1, style, title)
    said = " / ".join(f"{value:.3f}" for _, value in shown)
    if len(shown) == 2:
        this, other = shown[0][1], shown[1][1]
        said += f"  ({100 * (this / other - 1):+.2f} %)" if other else ""
    yield text(_BARS_END + 14, middle, said)


def _positions(found: Evaluation) -> _Panel:
    rows, top = found.positions, 30.0
    values = [v for r in rows for v in (r.loss, r.against_loss) if v is not None]
    marks = ticks(min(values), max(values), 5)
    x = Axis(0, found.window, _PLOT, _RIGHT)
    y = Axis(marks[0], marks[-1], top + _TALL, top)
    parts = [text(_LEFT, 14, "Loss over the position in the window, nats per token", "head")]
    for value in marks:
        parts += [line(_PLOT, y.at(value), _RIGHT, y.at(value), "grid")]
        parts += [text(_PLOT - 8, y.at(value) + 4, tick_text(value), anchor="end")]
    for value in ticks(0, found.window, 8):
        if value <= found.window:
            parts.append(text(x.at(value), top + _TALL + 18, tick_text(value), anchor="middle"))
    middles = [x.at((r.first + r.last + 1) / 2) for r in rows]
    if found.against is not None:
        losses = [r.against_loss for r in rows if r.against_loss is not None]
        parts.append(curve([(m, y.at(v)) for m, v in zip(middles, losses, strict=True)], "other-line"))
    parts.append(curve([(m, y.at(r.loss)) for m, r in zip(middles, rows, strict=True)], "this-line"))
    parts.append(text((_PLOT + _RIGHT) / 2, top + _TALL + 36, "tokens of context", anchor="middle"))
    return top + _TALL + 60, parts


def _divergence(found: Difference, labels: tuple[str, str]) -> _Panel:
    """The histogram of per-token KL, on a log axis from its first to its last token."""
    edges, counts, top = found.kl_histogram.edges, found.kl_histogram.counts, 46.0
    total, filled = sum(counts), [i for i, n in enumerate(counts) if n]
    first, last = filled[0] // 4 * 4, -(-(filled[-1] + 1) // 4) * 4
    powers = [round(p) for p in (math.log10(edges[first]), math.log10(edges[last]))]
    x = Axis(powers[0], powers[1], _PLOT, _RIGHT)
    marks = ticks(0, 100 * max(counts) / total, 4)
    y = Axis(0, marks[-1], top + _TALL, top)
    what = f"Tokens by KL({short(labels[1], 30)} || {short(labels[0], 30)}), nats"
    parts = [text(_LEFT, 14, what, "head")]
    for value in marks:
        parts += [line(_PLOT, y.at(value), _RIGHT, y.at(value), "grid")]
        parts += [text(_PLOT - 8, y.at(value) + 4, f"{tick_text(value)} %", anchor="end")]
    for power in range(powers[0], powers[1] + 1):
        below = "≤ " if power == -8 and counts[0] else ""
        parts.append(text(x.at(power), top + _TALL + 18, below + power_text(power), anchor="middle"))
    for i in range(first, last):
        left, right, share = x.at(math.log10(edges[i])), x.at(math.log10(edges[i + 1])), 100 * counts[i] / total
        title = f"{counts[i]:,} tokens ({share:.2f} %) from {edges[i]:.1e} to {edges[i + 1]:.1e}"
        if counts[i]:
            parts.append(bar(left + 0.5, y.at(share), right - left - 1, y.start - y.at(share), "this", title))
    for name, value, height, side in (
        ("median", found.kl_median, 40.0, "end"),
        ("mean", found.kl, 40.0, "start"),
        ("99 % below", found.kl_99, 26.0, "start"),
    ):
        if value > 0:
            place = x.at(math.log10(value))
            anchor = side if _PLOT + 90 < place < _RIGHT - 90 else "start" if place < _RIGHT - 90 else "end"
            words = text(place + {"start": 4, "end": -4}[anchor], height, f"{name} {value:.2g}", "strong", anchor)
            parts += [line(place, height - 9, place, top + _TALL, "mark"), words]
    return top + _TALL + 36, parts
