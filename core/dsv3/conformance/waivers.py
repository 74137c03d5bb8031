"""Waivers: cases that a vendor knows to fail, each with a reason and a link, kept in the vendor's own repository."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

from dsv3.conformance.result import CaseResult
from dsv3.errors import UsageError

_SEPARATOR = re.compile(r"\s*\t\s*| {2,}")
_URL = re.compile(r"https?://[^\s<>\"]+")
_FORM = "expected `case-id-or-glob  reason  url`, separated by two or more spaces or a tab"


@dataclass(frozen=True)
class Waiver:
    """pattern: a case id, or a glob over ids (`*`, `?`, `[..]`; `*` crosses `/`). line: where it stands, from 1."""

    pattern: str
    reason: str
    url: str
    line: int = 0

    def matches(self, case_id: str) -> bool:
        return case_id == self.pattern or fnmatchcase(case_id, self.pattern)

    def __str__(self) -> str:
        return f"{self.pattern}  {self.reason}  {self.url}"


def read(path: str | Path) -> list[Waiver]:
    """The waivers of a UTF-8 text file, one a line; empty lines and lines that start with # are comments.

    UsageError, with file and line, for a line without reason or link or with more than three fields, for a pattern that
    appears twice, and for a file that cannot be read.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"waivers: {path} cannot be read: {error}; name a UTF-8 text file") from error
    found: dict[str, Waiver] = {}
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        waiver = _parse(line.strip(), number, path)
        if waiver.pattern in found:
            earlier = found[waiver.pattern].line
            raise UsageError(f"{path}:{number}: {waiver.pattern!r} is waived on line {earlier} too; remove one of the two")
        found[waiver.pattern] = waiver
    return list(found.values())


def _parse(line: str, number: int, path: str | Path) -> Waiver:
    fields = _SEPARATOR.split(line)
    if len(fields) != 3 or not all(fields):
        raise UsageError(f"{path}:{number}: {len(fields)} field(s) in {line!r}; {_FORM}")
    pattern, reason, url = fields
    if " " in pattern:
        raise UsageError(f"{path}:{number}: {pattern!r} is no case id or glob: it has a space; {_FORM}")
    if not _URL.fullmatch(url):
        raise UsageError(f"{path}:{number}: {url!r} is no http or https link; {_FORM}")
    return Waiver(pattern, reason, url, number)


def apply(cases: Sequence[CaseResult], waivers: Sequence[Waiver]) -> tuple[list[CaseResult], list[str], list[str]]:
    """The cases with every failure that a waiver matches turned into "waived", then two lists of sentences for the report:
    waivers that match no case, and unexpected passes: cases that passed although they are waived, under a waiver that
    covers no failure any more. The first waiver that matches a failure gives its reason; `details["waiver"]` keeps it.
    """
    matched: set[Waiver] = set()
    needed: set[Waiver] = set()
    passes: dict[Waiver, list[str]] = {}
    done = []
    for case in cases:
        applying = [w for w in waivers if w.matches(case.id)]
        matched.update(applying)
        if case.status == "failed" and applying:
            needed.update(applying)
            case = _waived(case, applying[0])
        elif case.status == "passed":
            for waiver in applying:
                on = f" on {case.kernel}" if case.kernel else ""
                passes.setdefault(waiver, []).append(f"{case.id}{on} passes; its waiver says: {waiver.reason} ({waiver.url})")
        done.append(case)
    unmatched = [str(w) for w in waivers if w not in matched]
    unexpected = [text for waiver, texts in passes.items() if waiver not in needed for text in texts]
    return done, unmatched, unexpected


def _waived(case: CaseResult, waiver: Waiver) -> CaseResult:
    details = {**case.details, "waiver": {"pattern": waiver.pattern, "reason": waiver.reason, "url": waiver.url}}
    message = f"waived: {waiver.reason} ({waiver.url}); {case.message}".removesuffix("; ")
    return replace(case, status="waived", message=message, details=details)
