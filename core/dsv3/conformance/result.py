"""What a conformance run found: one record per case and kernel, and the report that holds them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Level = Literal["L0", "L1", "L2", "L3"]
Size = Literal["quick", "small", "full"]
Status = Literal["passed", "failed", "waived", "absent"]
LEVELS: tuple[Level, ...] = ("L0", "L1", "L2", "L3")
SIZES: tuple[Size, ...] = ("quick", "small", "full")
# Above this share of its budget a case that passed is shown in yellow.
WARN_MARGIN = 0.5


@dataclass(frozen=True)
class CaseResult:
    """One case on one kernel.

    id: stable for ever, usable as a filter. kernel: "backend.kernel", "" where none was asked. margin: the largest error over
    its budget (over 1: failed; 0: exact). nmse: squared error over squared expected value. message: why it failed, was
    absent or waived; else notes. repeat: the command that runs this case alone. numerics: the class the kernel declares.
    details: for programs, such as the worst element's index, expected and found value and budget.
    """

    id: str
    op: str
    kernel: str
    status: Status
    margin: float
    nmse: float
    message: str
    repeat: str
    level: Level = "L1"
    numerics: str = ""
    seconds: float = 0.0
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """All results of a run. suite: version and hash of the case list. info: what ran, for reports and certificates:
    "backend", "level", "size", "seed", "device" (mapping), "plugin" (mapping: dist, version, files name -> sha256),
    "versions" (mapping), "seconds", "list_sha256", "claims" (operator -> list of "backend.kernel"), "notes" (list),
    "unmatched_waivers" (list), "unexpected_passes" (list)."""

    cases: list[CaseResult]
    suite: str
    info: Mapping[str, Any] = field(default_factory=dict)

    @property
    def failed(self) -> list[CaseResult]:
        """The cases that failed and are not waived."""
        return [c for c in self.cases if c.status == "failed"]

    def count(self, status: Status) -> int:
        """How many cases have the status."""
        return sum(c.status == status for c in self.cases)
