"""results.jsonl: the run on the first line, then one line per case. What every other report can be made from again.

Lines are ASCII JSON. A float that JSON lacks is the string "inf", "-inf" or "nan" in `margin`, `nmse` and `seconds`, and
`{"$float": "inf"}` inside `details` and the run's facts, where a key that starts with "$" gets another "$". There, tuples
are written as lists, numbers of other libraries as plain numbers, and any other object as its text.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

from dsv3.conformance.report.files import write_text
from dsv3.conformance.result import LEVELS, CaseResult, Report, Status
from dsv3.errors import UsageError

FORMAT = "dsv3-results/1"
_FIELDS = tuple(f.name for f in fields(CaseResult))
_FLOATS = ("margin", "nmse", "seconds")


def write(report: Report, path: str | Path) -> None:
    """Write the report; the file is replaced whole. UsageError if it cannot be written."""
    write_text(path, dumps(report))


def read(path: str | Path) -> Report:
    """The report of a file that `write` wrote, equal to it. UsageError names the file and line of what is wrong."""
    try:
        text = Path(path).read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {path}: {error}; name a results.jsonl that a conformance run wrote") from error
    return loads(text, str(path))


def dumps(report: Report) -> str:
    """The text of the file."""
    head = {"type": "run", "format": FORMAT, "suite": report.suite, "info": plain(report.info)}
    return "".join(json.dumps(line, allow_nan=False) + "\n" for line in (head, *map(_line, report.cases)))


def loads(text: str, name: str = "results.jsonl") -> Report:
    """A report from the text of the file; `name` stands in errors."""
    lines = text.split("\n")
    if lines[-1]:
        raise UsageError(f"{name}:{len(lines)}: the last line has no end: the file was cut off; run the suite again")
    head = _object(lines[0], name, 1)
    if head.get("type") != "run" or head.get("format") != FORMAT or not isinstance(head.get("info"), dict):
        raise UsageError(f'{name}:1: expected {{"type": "run", "format": "{FORMAT}", "info": {{..}}}}, found {lines[0][:80]!r}')
    cases = [_case(_object(line, name, n), name, n) for n, line in enumerate(lines[1:-1], start=2)]
    return Report(cases, str(head.get("suite", "")), value_of(head["info"]))


def plain(value: Any) -> Any:
    """A value that JSON holds, as the module's docstring says."""
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"$float": str(float(value))}
    if isinstance(value, int):
        return int(value)
    if isinstance(value, Mapping):
        return {f"${k}" if str(k).startswith("$") else str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, set | frozenset):
        return sorted((plain(v) for v in value), key=str)
    # A scalar of numpy or torch; anything else is text.
    if hasattr(value, "item") and getattr(value, "shape", None) == ():
        return plain(value.item())
    return str(value)


def value_of(stored: Any) -> Any:
    """The inverse of `plain`. UsageError for a "$" key that it does not write."""
    if isinstance(stored, list):
        return [value_of(v) for v in stored]
    if not isinstance(stored, dict):
        return stored
    if set(stored) == {"$float"}:
        return _float(stored["$float"])
    return {k[1:] if k.startswith("$$") else k: value_of(v) for k, v in stored.items()}


def _line(case: CaseResult) -> dict[str, Any]:
    line: dict[str, Any] = {"type": "case"}
    for name in _FIELDS:
        value = getattr(case, name)
        if name in _FLOATS:
            line[name] = float(value) if math.isfinite(value) else str(float(value))
        else:
            line[name] = plain(value)
    return line


def _object(line: str, name: str, number: int) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{name}:{number}: no JSON: {error}; the file is damaged, run the suite again") from error
    if not isinstance(found, dict):
        raise UsageError(f"{name}:{number}: expected an object, found {line[:80]!r}")
    return found


def _case(line: dict[str, Any], name: str, number: int) -> CaseResult:
    values = {k: v for k, v in line.items() if k in _FIELDS}
    for field in _FIELDS:
        kind = "a number" if field in _FLOATS else "an object" if field == "details" else "text"
        value = line.get(field)
        if kind == "a number":
            value = values[field] = _float(value)
        good = {"a number": float, "an object": dict, "text": str}[kind]
        if not isinstance(value, good):
            raise UsageError(f"{name}:{number}: {field}: expected {kind}, found {line.get(field)!r}")
    if values["status"] not in get_args(Status) or values["level"] not in LEVELS:
        raise UsageError(f"{name}:{number}: unknown status {values['status']!r} or level {values['level']!r}")
    return CaseResult(**{**values, "details": value_of(values["details"])})


def _float(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    if isinstance(value, str) and value not in ("inf", "-inf", "nan"):
        return None
    return float(value)
