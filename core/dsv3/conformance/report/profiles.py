"""Profiles: named parts of the suite that a backend passes, such as core or int8. The files in configs say what they hold."""

from __future__ import annotations

import json
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from dsv3.conformance.report import suite
from dsv3.conformance.result import Report
from dsv3.resources import resources

# Operators that run through their parts where a backend does not claim them. Written out, so that a certificate is checked
# without importing torch; a test holds it to the specifications.
COMPOSITES = frozenset(
    (
        "add_rms_norm", "rms_norm_quant", "silu_mul_quant", "rope_cache_write", "mla_prolog", "mtp_combine", "grouped_linear",
        "fused_experts", "moe", "block_scaled_mm", "int8_scaled_mm", "quant_linear", "route",
    )
)  # fmt: skip


def read(version: str, folder: Path | None = None) -> dict[str, Any]:
    """The profiles of a suite version, in the order of the badge: name -> text, requires, operators, cases."""
    path = folder / version / "profiles.json" if folder else resources("configs", "conformance", version, "profiles.json")
    return dict(json.loads(path.read_text(encoding="utf-8")))


def passed(report: Report, folder: Path | None = None) -> list[str]:
    """The profiles that the report proves: all of those they require; every operator claimed with a case that passed, or
    composed of its parts; a case that passed for every pattern of cases; and no failure in any of these."""
    found: list[str] = []
    for name, profile in read(suite.version(report.suite), folder).items():
        if set(profile["requires"]) <= set(found) and _proved(report, profile):
            found.append(name)
    return found


def _proved(report: Report, profile: Mapping[str, Any]) -> bool:
    claims = report.info.get("claims", {})
    for op in profile["operators"]:
        statuses = {c.status for c in report.cases if c.op == op and c.level != "L0"}
        through_parts = op in COMPOSITES and not claims.get(op)
        if "failed" in statuses or not (through_parts or (claims.get(op) and "passed" in statuses)):
            return False
    for pattern in profile["cases"]:
        statuses = {c.status for c in report.cases if fnmatchcase(c.id, pattern)}
        if "failed" in statuses or "passed" not in statuses:
            return False
    return True
