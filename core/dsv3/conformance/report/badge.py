"""The badge: one line that says what a run proved, or that it proved nothing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dsv3.conformance.report import profiles, suite
from dsv3.conformance.report.text import plural
from dsv3.conformance.result import LEVELS, Report


@dataclass(frozen=True)
class Badge:
    """text: the line. refusal: "" if the run earned a badge, and so a certificate; else why not."""

    text: str
    refusal: str = ""


def badge(report: Report, folder: Path | None = None) -> Badge:
    """What the report proved: `dsv3-conformant v1 L2 core+int8`; what weakens it stands in brackets behind: a size below
    full, waived cases, an emulated device. Refused for any failure, for a level of which not all cases were run, and where
    no case of a level passed. folder: frozen lists other than the shipped."""
    if report.failed:
        counts = [f"{report.count(s)} {s}" for s in ("failed", "passed", "waived") if report.count(s)]
        return Badge(f"not conformant: {', '.join(counts)}", f"{plural(len(report.failed), 'case')} failed")
    reason = suite.incomplete(report, folder) or _empty_level(report)
    if reason:
        return Badge(f"no failure in {plural(len(report.cases), 'case')}, but no badge: {reason}", reason)
    given = report.info.get("profiles")
    names = [str(n) for n in given] if given is not None else profiles.passed(report, folder)
    words = ["dsv3-conformant", suite.version(report.suite), str(report.info["level"]), "+".join(names)]
    notes = _notes(report, names)
    return Badge(" ".join(w for w in words if w) + (f" ({', '.join(notes)})" if notes else ""))


def _notes(report: Report, names: list[str]) -> list[str]:
    notes = [] if names else ["no profile"]
    if report.info.get("size") != "full":
        notes.append(f"size {report.info.get('size')}")
    if report.count("waived"):
        notes.append(f"{report.count('waived')} waived")
    if (report.info.get("device") or {}).get("emulated"):
        notes.append("emulated")
    return notes


def _empty_level(report: Report) -> str:
    """A level all of whose cases are absent was not reached."""
    asked = LEVELS[: LEVELS.index(report.info["level"]) + 1]
    present = {suite.level_of(c.id) for c in report.cases}
    for level in asked:
        if level in present and not any(c.status == "passed" for c in report.cases if suite.level_of(c.id) == level):
            return f"no case of {level} passed"
    return "" if report.cases else "no case was run"
