"""junit.xml, as Jenkins and GitLab read it: a suite per level, classname the operator, name the case."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path

from dsv3.conformance.report.files import write_text
from dsv3.conformance.report.rows import facts
from dsv3.conformance.report.terminal import failure
from dsv3.conformance.report.text import number, one_line, printable
from dsv3.conformance.result import LEVELS, CaseResult, Report


def write(report: Report, path: str | Path) -> None:
    """Write the report; the file is replaced whole. UsageError if it cannot be written.

    An absent or a waived case is skipped, with the reason as its message. Where several kernels share an id, the name ends
    in ` [backend.kernel]`: GitLab shows only the first of the cases with one name.
    """
    root = ET.Element(
        "testsuites", {"name": _clean(f"dsv3 conformance {report.info.get('backend', '')}"), **_counts(report.cases)}
    )
    shared = {i for i, n in Counter((c.level, c.op, c.id) for c in report.cases).items() if n > 1}
    for level in LEVELS:
        cases = [c for c in report.cases if c.level == level]
        if not cases:
            continue
        suite = ET.SubElement(root, "testsuite", {"name": level, **_counts(cases)})
        if stamp := str(report.info.get("date") or ""):
            suite.set("timestamp", _clean(stamp))
        _properties(suite, facts(report))
        for case in cases:
            _case(suite, case, report.info.get("seed", ""), (case.level, case.op, case.id) in shared)
    ET.indent(root)
    write_text(path, '<?xml version="1.0" encoding="UTF-8"?>\n' + ET.tostring(root, encoding="unicode") + "\n")


def _case(suite: ET.Element, case: CaseResult, seed: object, shared: bool) -> None:
    name = f"{case.id} [{case.kernel}]" if shared and case.kernel else case.id
    attributes = {"classname": _clean(case.op or case.level), "name": _clean(name), "time": _time(case.seconds)}
    element = ET.SubElement(suite, "testcase", attributes)
    _properties(
        element,
        [
            ("kernel", case.kernel),
            ("seed", str(seed)),
            ("margin", number(case.margin)),
            ("nmse", number(case.nmse)),
            ("numerics", case.numerics),
        ],
    )
    if case.status == "failed":
        text = "\n".join(f"{label}: {value}" for label, value in failure(case))
        body = ET.SubElement(element, "failure", {"message": one_line(case.message, 1000), "type": "conformance"})
        body.text = _clean(text)
    elif case.status in ("waived", "absent"):
        ET.SubElement(element, "skipped", {"message": _skip_reason(case)})


def _skip_reason(case: CaseResult) -> str:
    message = one_line(case.message, 2000) or "no reason given"
    waiver = case.details.get("waiver") or {}
    url = str(waiver.get("url", ""))
    return f"{message} {one_line(url)}" if url and url not in message else message


def _properties(parent: ET.Element, pairs: list[tuple[str, str]]) -> None:
    element = ET.SubElement(parent, "properties")
    for name, value in pairs:
        ET.SubElement(element, "property", {"name": _clean(name), "value": _clean(value)})


def _counts(cases: list[CaseResult]) -> dict[str, str]:
    return {
        "tests": str(len(cases)),
        "failures": str(sum(c.status == "failed" for c in cases)),
        "errors": "0",
        "skipped": str(sum(c.status in ("waived", "absent") for c in cases)),
        "time": _time(math.fsum(c.seconds for c in cases if math.isfinite(c.seconds))),
    }


def _time(seconds: float) -> str:
    return f"{seconds:.3f}" if math.isfinite(seconds) else "0.000"


def _clean(text: str) -> str:
    """What XML 1.0 may hold; ElementTree escapes the rest."""
    return printable(text)
