"""What a check of level L0 answers, and the frozen list of its cases."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

Status = Literal["passed", "failed", "absent"]
# Asked of the installed package: absent for a Backend instance.
ENTRY_IDS = (
    "l0/entry-point",
    "l0/abi",
    "l0/names",
    "l0/metadata-files",
    "l0/import-side-effects",
    "l0/import-time",
    "l0/stdout",
)
HIDDEN_ID = "l0/probe-hidden"
# Asked of the instance.
INSTANCE_IDS = (
    "l0/interface",
    "l0/devices",
    "l0/probe",
    "l0/capability",
    "l0/kernels-metadata",
    "l0/registration",
    "l0/targets",
    "l0/signatures",
    "l0/accepts",
    "l0/torch-device",
    "l0/layouts",
    "l0/cache-spec",
    "l0/capture",
)
ALL_IDS = (*ENTRY_IDS, HIDDEN_ID, *INSTANCE_IDS)
_MOST = 4


@dataclass
class Answer:
    """mistakes break users; warnings cost them something; `absent` says why nothing could be asked; note: else."""

    mistakes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    note: str = ""
    absent: str = ""


@dataclass(frozen=True)
class Finding:
    """The outcome of one case."""

    id: str
    status: Status
    message: str
    seconds: float = 0.0


def finding(case: str, answer: Answer, seconds: float = 0.0) -> Finding:
    """The case failed if there is a mistake; a warning passes, with a message that begins "warning: "."""
    if answer.mistakes:
        return Finding(case, "failed", _joined(answer.mistakes), seconds)
    if answer.absent:
        return Finding(case, "absent", answer.absent, seconds)
    if answer.warnings:
        return Finding(case, "passed", "warning: " + _joined(answer.warnings), seconds)
    return Finding(case, "passed", answer.note, seconds)


def absent(cases: Iterable[str], why: str) -> list[Finding]:
    """The cases as not tried."""
    return [Finding(case, "absent", why) for case in cases]


def _joined(texts: list[str]) -> str:
    unique = list(dict.fromkeys(texts))
    more = [f"and {len(unique) - _MOST} more"] if len(unique) > _MOST else []
    return "; ".join(unique[:_MOST] + more)
