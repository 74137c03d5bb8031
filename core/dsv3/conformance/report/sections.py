"""The sections of the HTML report, as strings of HTML. All foreign text goes through `esc`."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator, Sequence

from dsv3.conformance.report.badge import badge
from dsv3.conformance.report.matrix import COUNTED, LEGEND, SYMBOLS, Cell, Reason, matrix
from dsv3.conformance.report.plot import severity
from dsv3.conformance.report.rows import Row, facts, rows
from dsv3.conformance.report.terminal import failure
from dsv3.conformance.report.text import cut, number, one_line, plural, printable
from dsv3.conformance.result import WARN_MARGIN, CaseResult, Report

# Further failures stand in the table of cases, with their messages.
_MOST_BLOCKS = 300
_NOTES = {"unmatched_waivers": "Waivers that match no case", "unexpected_passes": "Unexpected passes: remove their waivers"}


def esc(text: str) -> str:
    """Foreign text as HTML text or attribute value."""
    return html.escape(printable(text))


def anchor(run: int, index: int) -> str:
    """The id of a case's row: unique in the page, and free of what the case's own id may hold."""
    return f"case-{run}-{index}"


def scrolling(label: str, heads: Sequence[str], numbers: Sequence[str] = (), style: str = "") -> str:
    """The start of a table that scrolls sideways inside the page, up to its first row; `END` ends it."""
    cells = "".join(f'<th scope="col"{" class=n" if h in numbers else ""}>{esc(h)}</th>' for h in heads)
    named = f' class="{style}"' if style else ""
    return (
        f'<div class="scroll" role="region" aria-label="{esc(label)}" tabindex="0">'
        f"<table{named}><thead><tr>{cells}</tr></thead><tbody>"
    )


END = "</tbody></table></div>"


def overview(report: Report, title: str) -> Iterator[str]:
    """A card: badge, counts, what ran."""
    earned = badge(report)
    style = "failed" if report.failed else "partial" if earned.refusal else "native"
    yield f'<section class="run"><h2>{esc(title)}</h2><p class="badge {style}">{esc(one_line(earned.text))}</p>'
    known = dict(facts(report))
    words = [known[k] for k in ("plugin", "device", "arch", "date", "duration") if k in known]
    yield f'<p class="soft">{esc(", ".join(words))}</p><dl class="tiles">'
    narrow = sum(c.status == "passed" and c.margin > WARN_MARGIN for c in report.cases)
    tiles = [(s, report.count(s)) for s in ("passed", "failed", "waived", "absent")]
    for label, count in (*tiles, (f"margin above {WARN_MARGIN}", narrow)):
        tone = {"passed": "ok", "failed": "bad", "waived": "waived", "absent": "none"}.get(label, "warn")
        yield f'<div><dt class="soft">{label}</dt><dd><b class="{tone if count else "none"}">{count}</b></dd></div>'
    yield "</dl></section>"


def support(reports: Sequence[Report]) -> Iterator[str]:
    """The matrix, then the same for levels, then the legend."""
    table = matrix(reports)
    anchors = [{c.id: anchor(r, i) for i, c in reversed(list(enumerate(p.cases)))} for r, p in enumerate(reports)]
    for caption, lines in (("operator", table.operators), ("level", table.levels)):
        yield scrolling(f"Support per {caption}", (caption, *table.columns), style="matrix")
        for name, cells in lines.items():
            shown = "".join(_cell(c, anchors[i], caption) for i, c in enumerate(cells))
            yield f'<tr><th scope="row">{esc(name)}</th>{shown}</tr>'
        yield END
        if caption == "operator":
            items = "".join(
                f'<li><span class="chip {s}">{SYMBOLS[s]} {s}{" (n/m)" if s in COUNTED else ""}</span> {esc(text)}</li>'
                for s, text in LEGEND.items()
            )
            items += "<li>behind a state: the numerics class that its kernels declare</li>"
            yield f'<ul class="legend">{items}</ul><h3>Levels</h3>'


def _cell(cell: Cell | None, anchors: dict[str, str], caption: str) -> str:
    if cell is None:
        return '<td class="soft">not run</td>'
    text = cell.text.replace("native", "passed") if caption == "level" else cell.text
    chip = f'<span class="chip {cell.state}"><span aria-hidden="true">{cell.symbol}</span> {esc(text)}</span>'
    chip += "".join(f' <span class="soft">{esc(n)}</span>' for n in cell.numerics)
    if not cell.reasons:
        return f"<td>{chip}</td>"
    items = "".join(f"<li>{_reason(r, anchors)}</li>" for r in cell.reasons)
    return f'<td><details><summary>{chip} <span class="why">why</span></summary><ul>{items}</ul></details></td>'


def _reason(reason: Reason, anchors: dict[str, str]) -> str:
    parts = []
    if reason.case_id:
        parts.append(f'<a class="id" href="#{anchors[reason.case_id]}">{esc(one_line(reason.case_id, 200))}</a>')
    parts.append(esc(reason.text))
    if reason.url:
        parts.append(link(reason.url))
    return " ".join(parts)


def link(url: str) -> str:
    """A link for http and https, else the text: never a scheme that runs something."""
    if not re.fullmatch(r"https?://[^\s<>\"']+", url):
        return esc(url)
    return f'<a href="{esc(url)}" rel="noreferrer noopener">{esc(url)}</a>'


def failures(report: Report, run: int) -> Iterator[str]:
    """A block per failure: what was expected, found, where, and the command that repeats it."""
    failed = [(i, c) for i, c in enumerate(report.cases) if c.status == "failed"]
    for index, case in failed[:_MOST_BLOCKS]:
        yield f'<article class="fail" id="fail-{run}-{index}"><h3><a class="id" href="#{anchor(run, index)}">'
        yield f"{esc(one_line(case.id))}</a></h3><dl>"
        for label, text in failure(case):
            shown = f"<code>{esc(cut(text, 4000))}</code>" if label in ("repeat", "expected", "found") else esc(cut(text, 4000))
            yield f"<dt>{label}</dt><dd>{shown}</dd>"
        yield "</dl></article>"
    if len(failed) > _MOST_BLOCKS:
        yield f"<p>{len(failed) - _MOST_BLOCKS} more failures are in the table of cases and in results.jsonl.</p>"


def waivers(report: Report) -> Iterator[str]:
    """Waived cases with reason and link, then waivers to correct or remove."""
    waived = [c for c in report.cases if c.status == "waived"]
    if waived:
        yield scrolling("Waived cases", ("case", "kernel", "reason"))
        for case in waived:
            waiver = case.details.get("waiver") or {}
            reason, url = str(waiver.get("reason") or case.message), str(waiver.get("url", ""))
            yield f'<tr><th scope="row" class="id">{esc(one_line(case.id))}</th><td>{esc(one_line(case.kernel))}</td>'
            yield f"<td>{esc(one_line(reason, 500))} {link(url)}</td></tr>"
        yield END
    for key, head in _NOTES.items():
        found = [str(text) for text in report.info.get(key) or ()]
        if found:
            yield f"<h3>{head}</h3><ul>{''.join(f'<li>{esc(one_line(t))}</li>' for t in found)}</ul>"


def cases(report: Report, run: int) -> Iterator[str]:
    """A closed group per operator, with a row per case; groups with failures are open."""
    index = {id(c): i for i, c in enumerate(report.cases)}
    for row in rows(report):
        bad = row.count("failed")
        yield f'<details class="group"{" open" if bad and len(row.cases) <= 200 else ""}><summary>{_group(row)}</summary>'
        heads = ("case", "kernel", "status", "margin", "nmse", "s", "note")
        yield scrolling(f"Cases of {one_line(row.name, 60)}", heads, numbers=("margin", "nmse", "s"), style="cases")
        yield from (_row(c, run, index[id(c)]) for c in row.cases)
        yield END + "</details>"


def _group(row: Row) -> str:
    counts = [(s, row.count(s)) for s in ("passed", "failed", "waived", "absent")]
    chips = " ".join(f'<span class="chip {s}">{n} {s}</span>' for s, n in counts if n)
    worst = "" if row.margin is None else f'<span class="soft">worst margin {number(row.margin)}</span>'
    return f"<b>{esc(one_line(row.name, 60))}</b> {chips} {worst}"


def _row(case: CaseResult, run: int, index: int) -> str:
    narrow = case.status == "passed" and case.margin > WARN_MARGIN
    kind = f"is-{case.status}{' is-narrow' if narrow else ''}"
    name = esc(one_line(case.id))
    target = f"fail-{run}-{index}" if case.status == "failed" else anchor(run, index)
    ran = case.status != "absent"
    figures = (number(case.margin), number(case.nmse), f"{case.seconds:.3g}") if ran else ("", "", "")
    return (
        f'<tr id="{anchor(run, index)}" class="{kind}"><th scope="row" class="id"><a href="#{target}">{name}</a></th>'
        f'<td>{esc(one_line(case.kernel))}</td><td><span class="chip {case.status}">{case.status}</span></td>'
        f'<td class="n {severity(case.margin) if ran else "none"}">{figures[0]}</td><td class="n">{figures[1]}</td>'
        f'<td class="n">{figures[2]}</td><td>{esc(one_line(case.message, 300))}</td></tr>'
    )


def environment(report: Report) -> Iterator[str]:
    """Everything about the run, and the sha256 of the plugin's files."""
    yield '<dl class="facts">' + "".join(f"<dt>{esc(k)}</dt><dd>{esc(v)}</dd>" for k, v in facts(report)) + "</dl>"
    files = (report.info.get("plugin") or {}).get("files") or {}
    if files:
        yield f"<details><summary>{plural(len(files), 'file')} of the plugin, by sha256</summary>"
        yield scrolling("Files of the plugin", ("file", "sha256"))
        yield from (f'<tr><th scope="row">{esc(str(n))}</th><td><code>{esc(str(h))}</code></td></tr>' for n, h in files.items())
        yield END + "</details>"
