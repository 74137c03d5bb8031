"""certificate.json: what a backend proved, bound to the suite, the results beside it, the plugin's files and versions.

Its digest protects against accidents and careless edits. It is no signature: whoever can edit the file can compute a new
digest, so that a certificate is worth as much as the place it is published at.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from dsv3.conformance.report import jsonl
from dsv3.conformance.report.badge import badge
from dsv3.conformance.report.contents import RESULTS, body, canonical_digest
from dsv3.conformance.report.files import write_text
from dsv3.conformance.report.verify import verify
from dsv3.conformance.result import Report
from dsv3.errors import UsageError

__all__ = ["refusal", "verify", "write"]


def refusal(report: Report, folder: Path | None = None) -> str:
    """Why no certificate may be written; "" if it may: no failure, and every case of the level at its size was run.
    folder: frozen lists other than the shipped."""
    reason = badge(report, folder).refusal
    plugin = report.info.get("plugin") or {}
    return reason or ("" if plugin.get("dist") else "the backend comes from no installed distribution (plugin.dist is empty)")


def write(report: Report, path: str | Path, folder: Path | None = None) -> None:
    """Write the certificate, and results.jsonl beside it if there is none. UsageError with the reason where it is refused, and
    where results.jsonl holds another run."""
    path = Path(path)
    reason = refusal(report, folder)
    if reason:
        raise UsageError(f"no certificate: {reason}; it needs every case of its level to be run, and none to fail")
    results = path.parent / RESULTS
    text = jsonl.dumps(report)
    if not results.exists():
        write_text(results, text)
    elif results.read_bytes() != text.encode():
        raise UsageError(f"no certificate: {results} holds another run; write both into a new folder")
    certificate = body(report, hashlib.sha256(text.encode()).hexdigest(), folder)
    certificate["digest"] = canonical_digest(certificate)
    write_text(path, json.dumps(certificate, indent=2) + "\n")
