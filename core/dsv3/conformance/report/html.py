"""report.html: one file that needs nothing else, for a browser with or without scripts, light or dark, wide or narrow."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from dsv3.conformance.report import sections
from dsv3.conformance.report.files import write_text
from dsv3.conformance.report.matrix import titles
from dsv3.conformance.report.plot import plot
from dsv3.conformance.report.style import CSS, SCRIPT
from dsv3.conformance.result import Report

_ABOUT = (
    "A margin is the largest error of a case over its error budget, relative to float64 on the CPU: up to 0.5 is comfortable, "
    "up to 1 passes. Disc: passed; ring: passed above 0.5; triangle: failed and waived; cross: failed. A stack of five stands "
    "for five or more. Hover a mark for its case."
)
_FILTER = """<form id="filter" class="filter" hidden>
<input id="filter-text" type="search" aria-label="Words in the row" placeholder="words: operator, kernel, part of an id">
<select id="filter-status" aria-label="Status"><option value="">every status</option><option>passed</option>
<option>narrow</option><option>failed</option><option>waived</option><option>absent</option></select>
<output id="filter-count" class="soft" aria-live="polite"></output></form>"""


def write(reports: Report | Sequence[Report], path: str | Path) -> None:
    """Write the page of one or several runs; the file is replaced whole. UsageError if it cannot be written."""
    write_text(path, page([reports] if isinstance(reports, Report) else list(reports)))


def page(reports: Sequence[Report]) -> str:
    """The text of the file."""
    names = titles(reports)
    head = f"dsv3 conformance: {', '.join(names)}"
    policy = f"default-src 'none'; style-src '{_hash(CSS)}'; script-src '{_hash(SCRIPT)}'; base-uri 'none'; form-action 'none'"
    lines = [
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<meta name="referrer" content="no-referrer">',
        f"<title>{sections.esc(head)}</title>\n<style>{CSS}</style>\n</head>\n<body>\n<main>\n<h1>dsv3 conformance</h1>",
        *_body(reports, names),
        f"</main>\n<script>{SCRIPT}</script>\n</body>\n</html>\n",
    ]
    return "\n".join(lines)


def _body(reports: Sequence[Report], names: Sequence[str]) -> Iterator[str]:
    runs = list(zip(reports, names, strict=True))
    failed = sum(len(r.failed) for r in reports)
    keys = ("unmatched_waivers", "unexpected_passes")
    waived = any(r.count("waived") or any(r.info.get(k) for k in keys) for r in reports)
    present = [("failures", f"Failures ({failed})", bool(failed)), ("matrix", "Support", True), ("margins", "Margins", True)]
    present += [("waivers", "Waivers", waived), ("cases", "Cases", True), ("environment", "Environment", True)]
    shown = [(key, text) for key, text, there in present if there]
    for report, name in runs:
        yield from sections.overview(report, name)
    links = "".join(f'<a href="#{key}">{text}</a>' for key, text in shown)
    yield f'<nav aria-label="Sections">{links}</nav>'
    for key, text in shown:
        yield f'<section aria-labelledby="{key}"><h2 id="{key}">{text}</h2>'
        if key == "matrix":
            yield from sections.support(reports)
        else:
            yield {"margins": f'<p class="soft">{_ABOUT}</p>', "cases": _FILTER}.get(key, "")
            yield from _each(runs, _SECTIONS[key])
        yield "</section>"


_SECTIONS: dict[str, Callable[[Report, int], Iterable[str]]] = {
    "failures": sections.failures,
    "margins": lambda report, run: plot(report),
    "waivers": lambda report, run: sections.waivers(report),
    "cases": sections.cases,
    "environment": lambda report, run: sections.environment(report),
}


def _each(runs: Sequence[tuple[Report, str]], section: Callable[[Report, int], Iterable[str]]) -> Iterator[str]:
    """The section for every run, under its name where there are several."""
    for run, (report, name) in enumerate(runs):
        lines = list(section(report, run))
        if lines and len(runs) > 1:
            yield f"<h3>{sections.esc(name)}</h3>"
        yield from lines


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
