"""Counts and worst figures per operator, and the facts of a run, as several reports show them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from dsv3.conformance.report.text import one_line, seconds
from dsv3.conformance.result import CaseResult, Report, Status


@dataclass
class Row:
    """What the cases of one operator gave, over all kernels; cases of no operator stand under their level."""

    name: str
    cases: list[CaseResult] = field(default_factory=list)

    def count(self, status: Status) -> int:
        return sum(c.status == status for c in self.cases)

    @property
    def ran(self) -> list[CaseResult]:
        return [c for c in self.cases if c.status != "absent"]

    @property
    def kernels(self) -> list[str]:
        return sorted({c.kernel for c in self.ran if c.kernel})

    @property
    def numerics(self) -> list[str]:
        return sorted({c.numerics for c in self.ran if c.numerics})

    @property
    def margin(self) -> float | None:
        """The worst margin; None where nothing ran."""
        return worst(c.margin for c in self.ran)

    @property
    def nmse(self) -> float | None:
        return worst(c.nmse for c in self.ran)

    @property
    def seconds(self) -> float:
        return math.fsum(c.seconds for c in self.cases)


def worst(values: Iterable[float]) -> float | None:
    """The largest value; NaN is worse than any number."""
    known = list(values)
    if any(math.isnan(v) for v in known):
        return math.nan
    return max(known, default=None)


def rows(report: Report) -> list[Row]:
    """One row per operator, in the order of the run."""
    found: dict[str, Row] = {}
    for case in report.cases:
        name = case.op or case.level
        found.setdefault(name, Row(name)).cases.append(case)
    return list(found.values())


def facts(report: Report) -> list[tuple[str, str]]:
    """What ran, where, with what: label and text, for the head of a report."""
    info = report.info
    device, plugin = info.get("device") or {}, info.get("plugin") or {}
    versions = info.get("versions") or {}
    lines = [
        ("backend", str(info.get("backend", ""))),
        ("plugin", f"{plugin.get('dist', '')} {plugin.get('version', '')}".strip()),
        ("device", _device(device)),
        ("arch", str(device.get("arch", ""))),
        ("driver", str(device.get("driver", ""))),
        ("versions", ", ".join(f"{k} {v}" for k, v in versions.items() if v)),
        ("suite", report.suite),
        ("case list sha256", str(info.get("list_sha256") or "")),
        ("level", str(info.get("level", ""))),
        ("size", str(info.get("size", ""))),
        ("seed", str(info.get("seed", ""))),
        ("date", str(info.get("date", ""))),
        ("duration", seconds(float(info["seconds"])) if "seconds" in info else ""),
        *(("note", str(note)) for note in info.get("notes") or ()),
    ]
    return [(label, one_line(text)) for label, text in lines if text]


def _device(device: Mapping[str, Any]) -> str:
    family = str(device.get("family", ""))
    place = f"{family}:{device['index']}" if family and family != "cpu" and "index" in device else family
    words = [place, str(device.get("name", ""))]
    if device.get("memory"):
        words.append(f"{int(device['memory']) / 2**30:.0f} GiB")
    if device.get("emulated"):
        words.append("emulated: run by an interpreter; proves values and indexing, not the rounding of matrix units")
    return ", ".join(w for w in words if w)


def where(case: CaseResult) -> str:
    """`output o, index (3, 17)` of the worst element, "" if the case names none."""
    parts = []
    if case.details.get("output") not in (None, ""):
        parts.append(f"output {case.details['output']}")
    index = case.details.get("index")
    if index not in (None, "", [], ()):
        inside = ", ".join(str(i) for i in index) if isinstance(index, list | tuple) else str(index)
        parts.append(f"index ({inside})" if not inside.startswith("(") else f"index {inside}")
    return ", ".join(parts)
