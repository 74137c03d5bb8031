"""The fields of a certificate, computed from a report alone: what writes one and what verifies one must agree."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from dsv3.conformance.report import jsonl, profiles, suite
from dsv3.conformance.report.badge import badge
from dsv3.conformance.result import LEVELS, CaseResult, Report, Status

FORMAT = "dsv3-certificate/1"
RESULTS = "results.jsonl"
_ABOUT = "sha256 over the canonical JSON of all other fields; finds accidents and careless edits, and is no signature"


def body(report: Report, results_sha256: str, folder: Path | None = None) -> dict[str, Any]:
    """All fields but the digest."""
    info = report.info
    level = str(info.get("level", ""))
    by_level = {lv: [c for c in report.cases if suite.level_of(c.id) == lv] for lv in LEVELS[: LEVELS.index(level) + 1]}
    given = info.get("profiles")
    return {
        "format": FORMAT,
        "badge": badge(report, folder).text,
        "suite": {
            "version": suite.version(report.suite),
            "list_sha256": info.get("list_sha256"),
            "level": level,
            "size": info.get("size"),
            "seed": info.get("seed"),
        },
        "date": info.get("date", ""),
        "backend": info.get("backend", ""),
        "profiles": list(given) if given is not None else profiles.passed(report, folder),
        "counts": {lv: _counts(cases) for lv, cases in by_level.items()} | {"total": _counts(report.cases)},
        "waivers": [_waiver(c) for c in report.cases if c.status == "waived"],
        "device": jsonl.plain(info.get("device") or {}),
        "plugin": jsonl.plain(info.get("plugin") or {}),
        "versions": jsonl.plain(info.get("versions") or {}),
        "results": {"file": RESULTS, "sha256": results_sha256},
        "about_digest": _ABOUT,
    }


def canonical_digest(certificate: Mapping[str, Any]) -> str:
    """sha256 of the certificate without its digest, as JSON with sorted keys, no spaces, ASCII."""
    rest = {k: v for k, v in certificate.items() if k != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _counts(cases: list[CaseResult]) -> dict[str, int]:
    return {status: sum(c.status == status for c in cases) for status in get_args(Status)}


def _waiver(case: CaseResult) -> dict[str, str]:
    waiver = case.details.get("waiver") or {}
    return {
        "case": case.id,
        "kernel": case.kernel,
        "reason": str(waiver.get("reason") or case.message),
        "url": str(waiver.get("url", "")),
    }
