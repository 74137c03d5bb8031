"""SUPPORT.md: which backend runs which operator how, with the reasons below, for a vendor's repository."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from dsv3.conformance.report.badge import badge
from dsv3.conformance.report.files import write_text
from dsv3.conformance.report.matrix import COUNTED, LEGEND, SYMBOLS, Cell, Matrix, Reason, matrix
from dsv3.conformance.report.rows import facts
from dsv3.conformance.report.text import one_line
from dsv3.conformance.result import Report

_SPECIAL = re.compile(r"([\\`*{}\[\]<>|~&$]|(?<!\w)_|_(?!\w)|^[#+=-])")
_PLAIN_CODE = re.compile(r"[\w./,:=+@ *?'-]+")


def write(reports: Report | Sequence[Report], path: str | Path) -> None:
    """Write the matrix of one or several runs; the file is replaced whole. UsageError if it cannot be written."""
    write_text(path, markdown([reports] if isinstance(reports, Report) else list(reports)))


def markdown(reports: Sequence[Report]) -> str:
    """The text of the file."""
    table = matrix(reports)
    notes = _Notes()
    lines = ["# Support matrix", "", "Written by `dsv3 conformance --report`; do not edit.", ""]
    for title, report in zip(table.columns, reports, strict=True):
        lines += [f"## {escape(title)}", "", f"**{escape(badge(report).text)}**", ""]
        lines += [*_table(("", ""), [(escape(k), escape(v)) for k, v in facts(report)]), ""]
    lines += ["## Operators", "", *_operators(table, notes), ""]
    lines += ["## Levels", "", *_levels(table, notes), ""]
    lines += [
        "## Legend",
        "",
        *(f"- {SYMBOLS[s]} {s}{' (n/m)' if s in COUNTED else ''}: {text}" for s, text in LEGEND.items()),
        "",
    ]
    lines += notes.section()
    lines += _stale(reports)
    return "\n".join(lines).rstrip("\n") + "\n"


class _Notes:
    """Footnotes, each set of reasons once, numbered in the order of use."""

    def __init__(self) -> None:
        self._numbers: dict[tuple[Reason, ...], int] = {}

    def link(self, cell: Cell) -> str:
        if not cell.reasons:
            return ""
        number = self._numbers.setdefault(cell.reasons, len(self._numbers) + 1)
        return f" [{number}](#note-{number})"

    def section(self) -> list[str]:
        lines = ["## Notes", ""] if self._numbers else []
        for reasons, number in self._numbers.items():
            lines += [f'<a id="note-{number}"></a>', f"**{number}.**", "", *(f"- {_reason(r)}" for r in reasons), ""]
        return lines


def _operators(table: Matrix, notes: _Notes) -> Iterator[str]:
    rows = [
        (code(op), *(f"{c.symbol} {escape(', '.join((c.text, *c.numerics)))}{notes.link(c)}" for c in cells))
        for op, cells in table.operators.items()
    ]
    yield from _table(("operator", *map(escape, table.columns)), rows)


def _levels(table: Matrix, notes: _Notes) -> Iterator[str]:
    rows = []
    for level, cells in table.levels.items():
        shown = []
        for cell in cells:
            word = "" if cell is None else escape(cell.text.replace("native", "passed"))
            shown.append("not run" if cell is None else f"{cell.symbol} {word}{notes.link(cell)}")
        rows.append((level, *shown))
    yield from _table(("level", *map(escape, table.columns)), rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    for line in (head, ["---"] * len(head), *rows):
        yield f"| {' | '.join(line)} |"


def _reason(reason: Reason) -> str:
    parts = [code(reason.case_id)] if reason.case_id else []
    parts.append(escape(reason.text))
    if reason.url:
        # Only what a waiver file allows becomes a link.
        link = re.fullmatch(r"https?://[^\s<>\"()\\]+", reason.url)
        parts.append(f"<{reason.url}>" if link else escape(reason.url))
    return " ".join(parts)


def _stale(reports: Sequence[Report]) -> list[str]:
    lines = []
    heads = {"unmatched_waivers": "Waivers that match no case", "unexpected_passes": "Unexpected passes"}
    for key, head in heads.items():
        found = [str(text) for r in reports for text in r.info.get(key) or ()]
        if found:
            lines += [f"## {head}", "", *(f"- {escape(text)}" for text in found), ""]
    return lines


def escape(text: str) -> str:
    """Foreign text as itself in Markdown, on one line."""
    return _SPECIAL.sub(r"\\\1", one_line(text))


def code(text: str) -> str:
    """A name in code font where Markdown can hold it, else as escaped text."""
    return f"`{text}`" if _PLAIN_CODE.fullmatch(text) and text == text.strip() else escape(text)
