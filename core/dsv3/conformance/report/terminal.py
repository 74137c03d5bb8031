"""The summary of a run for a terminal or a log: a table of operators, then every failure with how to repeat it."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Sequence

from dsv3.conformance.report.badge import badge
from dsv3.conformance.report.progress import Progress
from dsv3.conformance.report.rows import Row, facts, rows, where
from dsv3.conformance.report.text import cut, number, one_line, plural, printable
from dsv3.conformance.result import WARN_MARGIN, CaseResult, Report

__all__ = ["Progress", "summary"]

Segment = tuple[str, str]  # text, style of rich
Line = list[Segment]
# Beyond this many, a failure takes one line: the rest of what is known about it is in results.jsonl and report.html.
_BLOCKS = 50
_HEAD = ("operator", "kernels", "numerics", "passed", "failed", "waived", "absent", "margin", "nmse", "s")
_LEFT = 3


def summary(report: Report, *, verbose: bool = False, color: bool | None = None) -> str:
    """The summary as text without a line end; its last line is the badge, or says that the run is not conformant.

    verbose: also every absent and waived case with its reason, and the cases that passed with a margin above 0.5.
    color: ANSI colours or none; None: if standard output is a terminal.
    """
    lines: list[Line] = [*_header(report), *_table(rows(report)), *_reasons(report)]
    if verbose:
        lines += _listed(report)
    lines += _failures(report.failed)
    lines += _waivers(report)
    earned = badge(report)
    style = "bold green" if not earned.refusal else "bold red" if report.failed else "bold yellow"
    lines += [[], [(one_line(earned.text), style)]]
    colored = sys.stdout.isatty() if color is None else color
    return _colored(lines) if colored else "\n".join("".join(text for text, _ in line).rstrip() for line in lines)


def _header(report: Report) -> Iterator[Line]:
    known = dict(facts(report))
    words = [known[k] for k in ("backend", "plugin", "device", "arch") if k in known]
    run = [f"{k} {known[k]}" for k in ("suite", "level", "size", "seed") if k in known]
    for text in (", ".join(words), ", ".join(run)):
        if text:
            yield [(text, "dim")]
    yield []


def _table(found: Sequence[Row]) -> Iterator[Line]:
    cells = [[(h, "bold") for h in _HEAD], *([*_row(r)] for r in found)]
    widths = [max(len(line[i][0]) for line in cells) for i in range(len(_HEAD))]
    for line in cells:
        padded = (
            (text.ljust(width) if i < _LEFT else text.rjust(width), style)
            for i, ((text, style), width) in enumerate(zip(line, widths, strict=True))
        )
        yield [segment for cell in padded for segment in (cell, ("  ", ""))][:-1]


def _row(row: Row) -> Iterator[Segment]:
    yield one_line(row.name, 40), ""
    yield one_line(", ".join(row.kernels), 60) or "-", ""
    yield one_line(", ".join(row.numerics), 40) or "-", ""
    for status, style in (("passed", "green"), ("failed", "bold red"), ("waived", "magenta"), ("absent", "dim")):
        count = row.count(status)  # type: ignore[arg-type]
        yield (str(count), style) if count else ("-", "dim")
    margin, nmse = row.margin, row.nmse
    yield ("-", "dim") if margin is None else (number(margin), _margin_style(margin))
    yield ("-", "dim") if nmse is None else (number(nmse), "")
    yield f"{row.seconds:.1f}", ""


def _margin_style(margin: float) -> str:
    return "green" if margin <= WARN_MARGIN else "yellow" if margin <= 1 else "bold red"


def _reasons(report: Report) -> Iterator[Line]:
    """Why cases are absent, the most frequent reasons first, and how many passed narrowly."""
    absent = Counter(one_line(c.message, 300) or "no reason given" for c in report.cases if c.status == "absent")
    if absent:
        yield []
    for reason, count in absent.most_common(10):
        yield [(f"absent: {plural(count, 'case')}: {reason}", "dim")]
    if len(absent) > 10:
        yield [(f"absent: {len(absent) - 10} other reasons; --verbose lists all", "dim")]
    narrow = sum(c.status == "passed" and c.margin > WARN_MARGIN for c in report.cases)
    if narrow:
        yield [(f"narrow: {plural(narrow, 'case')} passed with a margin above {WARN_MARGIN}", "yellow")]


def _listed(report: Report) -> Iterator[Line]:
    yield []
    for case in report.cases:
        text = f"{one_line(case.id)} {one_line(case.kernel)}".rstrip()
        if case.status in ("absent", "waived"):
            yield [(f"{case.status}: {text}: {one_line(case.message, 1000)}", "dim" if case.status == "absent" else "magenta")]
        elif case.status == "passed" and case.margin > WARN_MARGIN:
            yield [(f"narrow: {text}: margin {number(case.margin)}", "yellow")]


def _failures(failed: Sequence[CaseResult]) -> Iterator[Line]:
    for case in failed[:_BLOCKS]:
        yield []
        yield [("FAILED ", "bold red"), (one_line(case.id), "bold")]
        for label, text in failure(case):
            first, *more = cut(printable(text), 2000).split("\n")
            yield [(f"  {label:<9} ", "dim"), (first, "")]
            yield from ([(" " * 12 + line, "")] for line in more)
    if failed[_BLOCKS:]:
        yield []
    for case in failed[_BLOCKS:]:
        yield [("FAILED ", "bold red"), (f"{one_line(case.id)}: {one_line(case.message, 120)}; {one_line(case.repeat)}", "")]


def failure(case: CaseResult) -> list[tuple[str, str]]:
    """What is to be said about a failure: label and text, without the empty ones; the command that repeats it last."""
    details = case.details
    error = ""
    if "error" in details and "budget" in details:
        error = f"{_value(details['error'])}, budget {_value(details['budget'])}, "
    pairs = [
        ("kernel", f"{case.kernel}, numerics {case.numerics}" if case.numerics else case.kernel),
        ("expected", _value(details.get("expected"))),
        ("found", _value(details.get("found"))),
        ("where", where(case)),
        ("error", f"{error}margin {number(case.margin)}, nmse {number(case.nmse)}"),
        ("why", case.message),
        ("repeat", case.repeat),
    ]
    return [(label, text) for label, text in pairs if text]


def _value(value: object) -> str:
    return "" if value is None else f"{value:.9g}" if isinstance(value, float) else str(value)


def _waivers(report: Report) -> Iterator[Line]:
    unmatched = report.info.get("unmatched_waivers") or ()
    unexpected = report.info.get("unexpected_passes") or ()
    if unmatched or unexpected:
        yield []
    for text in unmatched:
        yield [(f"warning: a waiver matches no case: {one_line(str(text))}; correct or remove it", "yellow")]
    for text in unexpected:
        yield [(f"unexpected pass: {one_line(str(text))}; remove the waiver", "yellow")]


def _colored(lines: Sequence[Line]) -> str:
    from io import StringIO

    from rich.console import Console
    from rich.text import Text

    out = StringIO()
    console = Console(
        file=out, force_terminal=True, color_system="standard", highlight=False, no_color=False, legacy_windows=False
    )
    for line in lines:
        console.print(Text.assemble(*line), soft_wrap=True)
    return out.getvalue().rstrip("\n")
