"""The suite's version and frozen lists, and what a report says about the run."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import platform
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from dsv3.conformance.result import CaseResult, Size
from dsv3.resources import resources

if TYPE_CHECKING:
    from dsv3.conformance.run import Plan
    from dsv3.conformance.target import Target

VERSION = "v1"


def list_path(size: Size) -> Any:
    """The frozen list of case ids of a size."""
    return resources("configs", "conformance", VERSION, f"{size}.txt")


@functools.cache
def list_sha256(size: Size) -> str:
    """Hash of the frozen list."""
    return hashlib.sha256(list_path(size).read_bytes()).hexdigest()


def listed(size: Size) -> list[str]:
    """The ids of the frozen list."""
    lines = list_path(size).read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def suite_name(size: Size) -> str:
    """ "v1 full 1a2b3c4d": version, size and the beginning of the list's hash."""
    return f"{VERSION} {size} {list_sha256(size)[:12]}"


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
        "plugin": plugin_files(plan.backend),
        "versions": versions(),
        "seconds": seconds,
        "list_sha256": list_sha256(plan.size),
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


def versions() -> dict[str, str]:
    """Of what the results depend on."""
    found = {"python": platform.python_version(), "system": f"{platform.system()} {platform.release()} {platform.machine()}"}
    for package in ("dsv3", "torch", "triton", "numpy"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def plugin_files(backend: Any) -> dict[str, Any]:
    """{"dist", "version", "files": {name: sha256}} of the distribution that a backend came from."""
    if not isinstance(backend, str):
        return {"dist": "", "version": str(backend.version), "files": {}}
    from dsv3.dispatch.plugins import discover

    plugin = next((p for p in discover() if p.name == backend), None)
    if plugin is None:
        return {"dist": "", "version": "", "files": {}}
    files = {}
    for path in importlib.metadata.files(plugin.dist) or ():
        where = path.locate()
        if path.suffix in (".py", ".json", ".so", ".txt", ".toml") and where.is_file():  # type: ignore[union-attr]
            files[str(path)] = hashlib.sha256(where.read_bytes()).hexdigest()  # type: ignore[union-attr]
    return {"dist": plugin.dist, "version": plugin.version, "files": files}
