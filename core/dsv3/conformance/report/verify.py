"""Check a certificate against the results beside it, the shipped case list and what is installed."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dsv3.conformance.report import installed, jsonl, suite
from dsv3.conformance.report.badge import badge
from dsv3.conformance.report.contents import RESULTS, body, canonical_digest
from dsv3.conformance.report.text import one_line
from dsv3.conformance.result import Report
from dsv3.errors import UsageError

# Recorded beside package versions, and facts of the machine that ran, not of the one that verifies.
_MACHINE = frozenset(("driver", "system", "platform", "os", "kernel", "cuda", "hip", "rocm", "cann", "cpu"))


def verify(path: str | Path, folder: Path | None = None, *, check_installed: bool = True) -> list[str]:
    """The problems of a certificate, a line each: the field, what was expected, what was found; none: it is good.

    Every field must be what results.jsonl beside it gives, that file must be the one certified and hold every case of the
    shipped list, no failure among them, and the plugin's files and the packages' versions must be the installed ones
    (check_installed=False leaves these out, for a machine without the plugin). UsageError if the file cannot be read.
    folder: frozen lists other than the shipped.
    """
    path = Path(path)
    try:
        certificate = json.loads(path.read_bytes().decode("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"cannot read {path}: {error}; name a certificate.json that a conformance run wrote") from error
    if not isinstance(certificate, dict):
        return [f"format: expected an object, found {type(certificate).__name__}"]
    problems = [*_digest(certificate), *_results(certificate, path.parent, folder)]
    if check_installed:
        problems += [*_plugin(certificate), *_versions(certificate)]
    return list(dict.fromkeys(one_line(p) for p in problems))


def _digest(certificate: Mapping[str, Any]) -> Iterator[str]:
    computed = canonical_digest(certificate)
    if certificate.get("digest") != computed:
        yield f"digest: expected {computed} for what the file holds, found {certificate.get('digest')}: it was edited"


def _results(certificate: Mapping[str, Any], beside: Path, folder: Path | None) -> Iterator[str]:
    results = beside / RESULTS
    try:
        raw = results.read_bytes()
    except OSError as error:
        yield f"results: expected {RESULTS} beside the certificate, found none: {error.strerror}"
        return
    found = hashlib.sha256(raw).hexdigest()
    recorded = certificate.get("results")
    expected = recorded.get("sha256") if isinstance(recorded, dict) else recorded
    if found != expected:
        yield f"results.sha256: expected {expected}, found {found}: {RESULTS} is not the file that was certified"
    try:
        report = jsonl.read(results)
        yield from _suite(report, folder)
        yield from _differences(body(report, found, folder), certificate)
    except (UsageError, OSError) as error:
        yield f"results: expected the results of a run, found: {error}"
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        yield f"results: expected the facts of a run on line 1, found: {type(error).__name__}: {error}"


def _suite(report: Report, folder: Path | None) -> Iterator[str]:
    known = suite.frozen(report.suite, str(report.info.get("size", "")), folder)
    if report.info.get("list_sha256") != known.sha256:
        yield f"suite.list_sha256: expected {known.sha256}, as shipped, found {report.info.get('list_sha256')}"
    wanted, found = known.upto(str(report.info.get("level", ""))), {c.id for c in report.cases}
    for case_id in [i for i in wanted if i not in found]:
        yield f"results: expected case {case_id} of the frozen list, found no result"
    for case_id in sorted(found - set(wanted)):
        yield f"results: expected only cases of the frozen list, found {case_id}"
    for case in report.failed:
        yield f"results: {case.id}: expected passed, waived or absent, found failed on {case.kernel}"
    reason = badge(report, folder).refusal
    if reason:
        yield f"badge: expected a run that earns one, found: {reason}"


def _differences(expected: Any, found: Any, field: str = "") -> Iterator[str]:
    """The leaves in which the certificate is not what the results give."""
    if isinstance(expected, dict) and isinstance(found, dict):
        for key in sorted({*expected, *found} - ({"digest"} if not field else set())):
            inner = f"{field}.{key}" if field else str(key)
            if key in expected and key in found:
                yield from _differences(expected[key], found[key], inner)
            elif key in expected:
                yield f"{inner}: expected {expected[key]!r}, found no such field"
            else:
                yield f"{inner}: expected no such field, found {found[key]!r}"
    # 1, 1.0 and True are equal to Python, and different in a file.
    elif json.dumps(expected, sort_keys=True) != json.dumps(found, sort_keys=True):
        yield f"{field}: expected {expected!r}, found {found!r}"


def _plugin(certificate: Mapping[str, Any]) -> Iterator[str]:
    recorded = certificate.get("plugin")
    if not isinstance(recorded, dict) or not isinstance(recorded.get("files"), dict) or not recorded.get("dist"):
        yield f"plugin: expected dist, version and files, found {recorded!r}"
        return
    dist, version = str(recorded["dist"]), str(recorded.get("version"))
    try:
        now = installed.plugin(dist)
    except (importlib.metadata.PackageNotFoundError, ValueError, OSError) as error:
        yield f"plugin.dist: expected {dist} {version} installed, found: {type(error).__name__}: {error}"
        return
    if now["version"] != version:
        yield f"plugin.version: expected {version}, found {now['version']} installed"
    files = {str(k): str(v) for k, v in recorded["files"].items()}
    if not files:
        yield "plugin.files: expected the plugin's files, found none recorded"
    yield from installed.file_problems(files, now["files"])


def _versions(certificate: Mapping[str, Any]) -> Iterator[str]:
    recorded = certificate.get("versions")
    if not isinstance(recorded, dict) or not recorded:
        yield f"versions: expected versions of packages, found {recorded!r}"
        return
    for name, version in recorded.items():
        now = installed.installed_version(str(name)) or "not installed"
        if name not in _MACHINE and version not in (now, "", None):
            yield f"versions.{name}: expected {version}, found {now}"
