"""Operator x backend: what runs each operator on each backend, and why not better."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from dsv3.conformance.report.text import one_line, plural
from dsv3.conformance.result import LEVELS, CaseResult, Report

State = Literal["native", "composite", "partial", "waived", "absent", "failed", "untested"]
SYMBOLS: dict[State, str] = {
    "native": "●",
    "partial": "◐",
    "composite": "○",
    "absent": "–",
    "waived": "△",
    "failed": "✕",
    "untested": "?",
}
LEGEND: dict[State, str] = {
    "native": "a kernel of the backend passed every case",
    "partial": "its kernels take n of m cases and passed them; the others are refused by what the kernels need",
    "composite": "no kernel of its own: runs through its parts",
    "absent": "no kernel: the reference runs it",
    "waived": "n of m results failed and are waived by the vendor, with a reason",
    "failed": "n of m results failed",
    "untested": "claimed, but this run checked none of its cases",
}
COUNTED: tuple[State, ...] = ("partial", "waived", "failed")  # shown with (n/m)
_MOST_REASONS = 8


@dataclass(frozen=True)
class Reason:
    """Why a cell is not native: a sentence, then what it holds for. case_id: of a failure; url: of a waiver."""

    text: str
    case_id: str = ""
    url: str = ""


@dataclass(frozen=True)
class Cell:
    """State of one operator, or level, on one backend. count: "n/m" of case ids (of results for failed and waived).
    numerics: the classes that the kernels that ran declare: a weaker one must be seen."""

    state: State
    count: str = ""
    reasons: tuple[Reason, ...] = ()
    numerics: tuple[str, ...] = ()

    @property
    def symbol(self) -> str:
        return SYMBOLS[self.state]

    @property
    def text(self) -> str:
        """`partial (3/5)`."""
        return f"{self.state} ({self.count})" if self.count else self.state


@dataclass(frozen=True)
class Matrix:
    """columns: titles of the backends, in the order of the reports. operators, levels: name -> one cell per column."""

    columns: tuple[str, ...]
    operators: dict[str, tuple[Cell, ...]]
    levels: Mapping[str, tuple[Cell | None, ...]]


def matrix(reports: Sequence[Report]) -> Matrix:
    """The matrix of several runs, one column each; operators in the order of the contract."""
    from dsv3.ops import names, spec

    operators: dict[str, tuple[Cell, ...]] = {}
    by_op = [_by_operator(r) for r in reports]
    for op in names():
        composite = spec(op).decompose is not None
        operators[op] = tuple(_cell(r, op, cases.get(op, []), composite) for r, cases in zip(reports, by_op, strict=True))
    levels: dict[str, tuple[Cell | None, ...]] = {level: tuple(_level(r, level) for r in reports) for level in LEVELS}
    used = {level: cells for level, cells in levels.items() if any(cells)}
    return Matrix(titles(reports), operators, used)


def titles(reports: Sequence[Report]) -> tuple[str, ...]:
    """Backend names; those that appear twice with their architecture, and then with a number."""
    names = [one_line(str(r.info.get("backend", "") or "?")) for r in reports]
    archs = [one_line(str((r.info.get("device") or {}).get("arch", ""))) for r in reports]
    full = [f"{n} ({a})" if names.count(n) > 1 and a else n for n, a in zip(names, archs, strict=True)]
    return tuple(f"{t} #{full[:i].count(t) + 1}" if full.count(t) > 1 else t for i, t in enumerate(full))


def _by_operator(report: Report) -> dict[str, list[CaseResult]]:
    found: dict[str, list[CaseResult]] = {}
    claims = report.info.get("claims") or {}
    for case in report.cases:
        # Kernels that read canonical weights have nothing to prepare: no part of the operator that they lack.
        if not (case.status == "absent" and "/prepare/" in case.id and claims.get(case.op)):
            found.setdefault(case.op, []).append(case)
    return found


def _cell(report: Report, op: str, cases: Sequence[CaseResult], composite: bool) -> Cell:
    cell = _state(report, op, cases, composite)
    if cell.state in ("composite", "absent"):
        return cell
    return replace(cell, numerics=tuple(sorted({one_line(c.numerics) for c in cases if c.numerics and c.status != "absent"})))


def _state(report: Report, op: str, cases: Sequence[CaseResult], composite: bool) -> Cell:
    outcome = _bad(cases)
    if outcome:
        return outcome
    tested = [c for c in cases if c.level != "L0"]  # that a kernel loads says nothing about what it computes
    passed, every = {c.id for c in tested if c.status == "passed"}, {c.id for c in tested}
    if not (report.info.get("claims") or {}).get(op):
        if passed:
            return Cell("composite", "", (Reason(f"{plural(len(passed), 'case')} passed through its parts"),))
        return Cell("composite" if composite else "absent", "", _unclaimed(tested, composite))
    if not every:
        return Cell("untested", "", (Reason("the run was limited to other operators or levels"),))
    if passed == every:
        return Cell("native")
    return Cell("partial", f"{len(passed)}/{len(every)}", _absences([c for c in tested if c.id not in passed]))


def _unclaimed(cases: Sequence[CaseResult], composite: bool) -> tuple[Reason, ...]:
    """What the run says about it, without counts: the same sentence for many operators is one note."""
    said = list(dict.fromkeys(one_line(c.message, 300) for c in cases if c.message))
    how = "it runs through its parts" if composite else "the reference runs it"
    return tuple(Reason(text) for text in said[:_MOST_REASONS]) or (Reason(f"no kernel of the backend claims it: {how}"),)


def _bad(cases: Sequence[CaseResult]) -> Cell | None:
    failed = [c for c in cases if c.status == "failed"]
    waived = [c for c in cases if c.status == "waived"]
    ran = sum(c.status != "absent" for c in cases)
    if failed:
        return Cell("failed", f"{len(failed)}/{ran}", (*_failures(failed), *_waivers(waived)))
    return Cell("waived", f"{len(waived)}/{ran}", _waivers(waived)) if waived else None


def _failures(failed: Sequence[CaseResult]) -> tuple[Reason, ...]:
    shown = [Reason(_named(c) + one_line(c.message, 160), c.id) for c in failed[:_MOST_REASONS]]
    return (*shown, *_more(len(failed) - len(shown), "failure"))


def _waivers(waived: Sequence[CaseResult]) -> tuple[Reason, ...]:
    shown = []
    for case in waived[:_MOST_REASONS]:
        waiver = case.details.get("waiver") or {}
        text = one_line(str(waiver.get("reason") or case.message), 300)
        shown.append(Reason(_named(case) + text, case.id, str(waiver.get("url", ""))))
    return (*shown, *_more(len(waived) - len(shown), "waived case"))


def _absences(cases: Iterable[CaseResult]) -> tuple[Reason, ...]:
    counts = Counter(one_line(c.message, 300) or "no reason given" for c in cases if c.status == "absent")
    shown = [Reason(f"{plural(n, 'case')}: {text}") for text, n in counts.most_common(_MOST_REASONS)]
    return (*shown, *_more(len(counts) - len(shown), "reason"))


def _more(count: int, word: str) -> tuple[Reason, ...]:
    return (Reason(f"and {plural(count, 'more ' + word)}, in results.jsonl"),) if count > 0 else ()


def _named(case: CaseResult) -> str:
    return f"{one_line(case.kernel)}: " if case.kernel else ""


def _level(report: Report, level: str) -> Cell | None:
    """The cases of a level together; None where the run had none."""
    cases = [c for c in report.cases if c.level == level]
    if not cases:
        return None
    outcome = _bad(cases)
    if outcome:
        return outcome
    passed = sum(c.status == "passed" for c in cases)
    if level == "L1" or passed == len(cases):  # absent operators have their own rows
        return Cell("native", f"{passed}/{passed}") if passed else Cell("absent", "", _absences(cases))
    return Cell("partial", f"{passed}/{len(cases)}", _absences(cases))
