"""The frozen case lists: which ids a run at a level and size must hold."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from dsv3.conformance.result import LEVELS, Report
from dsv3.errors import UsageError
from dsv3.resources import resources


@dataclass(frozen=True)
class FrozenList:
    """One list: its ids in order, and the sha256 of the file they came from."""

    ids: tuple[str, ...]
    sha256: str

    def upto(self, level: str) -> list[str]:
        """The ids of this level and those below."""
        allowed = LEVELS[: LEVELS.index(level) + 1]
        return [i for i in self.ids if level_of(i) in allowed]


def version(suite: str) -> str:
    """The version in a report's `suite`: "v1"."""
    found = re.search(r"\bv\d+\b", suite)
    return found[0] if found else suite.split(" ")[0]


def level_of(case_id: str) -> str:
    """The level an id belongs to: `l0/..`, `l2/..` and `l3/..` say it, all others are operators' cases (L1)."""
    first = case_id.partition("/")[0].upper()
    return first if first in LEVELS else "L1"


def frozen(suite: str, size: str, folder: Path | None = None) -> FrozenList:
    """The shipped list of that version and size. folder: where versions lie, instead of the shipped ones. UsageError if
    there is none."""
    name = version(suite)
    if not re.fullmatch(r"v\d+", name) or not re.fullmatch(r"[a-z]+", size):
        raise UsageError(f"no frozen case list is called {name!r}, size {size!r}; expected such as v1, size full")
    try:
        path = folder / name / f"{size}.txt" if folder else resources("configs", "conformance", name, f"{size}.txt")
        raw = path.read_bytes()
    except OSError as error:
        raise UsageError(f"no frozen case list of {name}, size {size}, ships with dsv3") from error
    lines = (line.strip() for line in raw.decode("utf-8").split("\n"))
    return FrozenList(tuple(i for i in lines if i and not i.startswith("#")), hashlib.sha256(raw).hexdigest())


def incomplete(report: Report, folder: Path | None = None) -> str:
    """Why the report is not a full level of its suite; "" if it is. A case counts whatever its outcome."""
    level, size = str(report.info.get("level", "")), str(report.info.get("size", ""))
    if level not in LEVELS:
        return f"the run names no level ({level!r})"
    try:
        known = frozen(report.suite, size, folder)
    except UsageError as error:
        return str(error)
    if report.info.get("list_sha256") != known.sha256:
        return f"the run's case list ({report.info.get('list_sha256')}) is not the shipped one ({known.sha256})"
    wanted = known.upto(level)
    found = {c.id for c in report.cases}
    missing = [i for i in wanted if i not in found]
    if missing:
        return f"{len(missing)} of the {len(wanted)} cases of {level}, size {size}, were not run: {_some(missing)}"
    strangers = sorted(found - set(wanted))
    return f"{len(strangers)} cases are not in the list of {level}, size {size}: {_some(strangers)}" if strangers else ""


def _some(ids: Iterable[str]) -> str:
    ids = list(ids)
    return ", ".join(ids[:3]) + (", .." if len(ids) > 3 else "")
