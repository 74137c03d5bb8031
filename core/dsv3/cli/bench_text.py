"""The figures of a benchmark as tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dsv3.cli.common import table

if TYPE_CHECKING:
    from dsv3.bench.ceiling import Ceilings
    from dsv3.bench.compare import Ratio
    from dsv3.bench.results import Figure, Result


def shown(result: Result) -> str:
    """Ceilings, figures, rows, notes."""
    from dsv3.bench.results import unrest

    s = result.subject
    size = ", ".join(
        f"{name} {value}" for name, value in (("batch", s.batch), ("context", s.context), ("tokens", s.tokens)) if value
    )
    head = f"{s.placement}\n{result.what}: {size}{'; ' if size else ''}{s.threads} threads, median of {s.repeats} repeats"
    parts = [head, _ceilings(result.before, result.after, result.best), figures(result.figures)]
    if result.rows:
        parts.append(rows(result.rows))
    if notes := [*result.notes, *unrest(result.before, result.after)]:
        parts.append("\n".join(f"note: {note}" for note in notes))
    return "\n\n".join(parts)


def _ceilings(before: Ceilings, after: Ceilings, best: Ceilings) -> str:
    lines: list[tuple[str, ...]] = [("this machine, this run", "before", "after", "best")]
    for name, label, unit in (
        ("read_gb_s", "read", "GB/s"), ("read_median_gb_s", "read, median", "GB/s"),
        ("read_one_gb_s", "read, one core", "GB/s"),
        ("bf16_gflop_s", "bf16 products", "GFLOP/s"), ("f32_gflop_s", "float32 products", "GFLOP/s"),
    ):  # fmt: skip
        values = [getattr(c, name) for c in (before, after, best)]
        if values[-1] is not None:
            lines.append((f"{label}, {unit}", *("-" if v is None else number(v) for v in values)))
    return aligned(lines)


def figures(found: Sequence[Figure]) -> str:
    """A line each."""
    lines = [("figure", "median", "quartiles", "")]
    for f in found:
        spread = "" if f.low is None or f.high is None else f"{number(f.low)} to {number(f.high)}"
        value = f"{100 * f.value:.1f} %" if f.unit == "" else number(f.value)
        lines.append((f.name, value, spread, f.unit))
    return aligned(lines, last=True)


def rows(found: Sequence[dict[str, Any]]) -> str:
    """A table of whatever the rows hold, under their keys."""
    keys = list(found[0])
    lines = [tuple(keys)]
    lines += [tuple(_cell(row[key]) for key in keys) for row in found]
    texts = [isinstance(found[0][key], str) for key in keys]
    return aligned(lines, texts=texts)


def _cell(value: Any) -> str:
    return "-" if value is None else value if isinstance(value, str) else number(value)


def compared(ratios: Sequence[Ratio]) -> str:
    """New over old, and the same with each run's own ceiling divided out."""
    lines = [("figure", "old", "new", "new / old", "per ceiling", "")]
    for r in ratios:
        per = "-" if r.normalised is None else f"x {r.normalised:.3f}"
        lines.append((r.name, number(r.old), number(r.new), f"x {r.ratio:.3f}", per, r.verdict))
    return "\n" + aligned(lines, last=True)


def number(value: float) -> str:
    """Three significant digits, or all before the point."""
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.3g}"


def aligned(lines: Sequence[Sequence[str]], last: bool = False, texts: Sequence[bool] | None = None) -> str:
    """A table whose columns of numbers end together; the first column, and the last if so asked, begin together."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    left = texts or [i == 0 or (last and i == len(widths) - 1) for i in range(len(widths))]
    made = [[c if left[i] else c.rjust(widths[i]) for i, c in enumerate(line)] for line in lines]
    return table(made)
