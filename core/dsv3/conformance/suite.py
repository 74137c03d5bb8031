"""The suite's version and frozen lists, and what a report says about the run."""

from __future__ import annotations

import importlib.metadata
import platform
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from dsv3.conformance.report.installed import versions
from dsv3.conformance.report.suite import frozen
from dsv3.conformance.result import CaseResult, Size

if TYPE_CHECKING:
    from dsv3.conformance.run import Plan
    from dsv3.conformance.target import Target

VERSION = "v1"


def suite_name(size: Size) -> str:
    """ "v1 full 1a2b3c4d": version, size and the beginning of the list's hash."""
    return f"{VERSION} {size} {frozen(VERSION, size).sha256[:12]}"


def header(plan: Plan, target: Target | None, results: Sequence[CaseResult], seconds: float) -> dict[str, Any]:
    """What a report records about the run: see `Report.info`."""
    name = plan.backend if isinstance(plan.backend, str) else plan.backend.name
    claims = target.claims() if target else {}
    return {
        "backend": name,
        "level": plan.level,
        "levels": list(plan.levels),
        "size": plan.size,
        "seed": plan.seed,
        "filter": {"ops": plan.ops, "cases": plan.cases},
        "device": asdict(target.source.device) if target else {},
        "capability": sorted(target.source.capability.dtypes) if target else [],
        "plugin": plugin_of(plan.backend),
        "versions": {**versions(), "system": f"{platform.system()} {platform.machine()}"},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": seconds,
        "list_sha256": frozen(VERSION, plan.size).sha256,
        "claims": claims,
        "notes": _never_eligible(claims, results),
        "unmatched_waivers": [],
        "unexpected_passes": [],
    }


def _never_eligible(claims: dict[str, list[str]], results: Sequence[CaseResult]) -> list[str]:
    """Kernels that no case could be run on: a claim that this run says nothing about."""
    ran = Counter((r.op, r.kernel) for r in results if r.status != "absent")
    asked = {(r.op, r.kernel): r.message for r in results if r.status == "absent" and r.kernel}
    return [
        f"kernel {kernel} for {op} took none of the cases, so nothing is known about it; for instance: {asked[op, kernel]}"
        for op, kernels in claims.items()
        for kernel in kernels
        if (op, kernel) in asked and not ran[op, kernel]
    ]


def plugin_of(backend: Any) -> dict[str, Any]:
    """{"dist", "version", "files": {name: sha256}} of the distribution that a backend came from."""
    from dsv3.conformance.report.installed import plugin
    from dsv3.dispatch.plugins import discover

    if not isinstance(backend, str):
        return {"dist": "", "version": str(backend.version), "files": {}}
    found = next((p for p in discover() if p.name == backend), None)
    try:
        return plugin(found.dist) if found else {"dist": "", "version": "", "files": {}}
    except importlib.metadata.PackageNotFoundError:
        return {"dist": found.dist if found else "", "version": "", "files": {}}
