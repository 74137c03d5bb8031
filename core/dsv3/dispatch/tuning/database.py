"""The tuning database: one JSON object per line, one file per architecture, `<folder>/<arch>.jsonl`.

A line is {"format": 1, "key": {..}, "value": {..}}. The key says what was measured (operator, dimensions, dtypes, kernel,
configuration, tokens, device) and under which conditions (memory, compute units, hash of the source, versions, layouts). The
value is {"median_us", "spread", "margin", "repeats", "when"}, or {"wrong", "when"} for a kernel whose result was not right.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dsv3.errors import UsageError

FORMAT = 1
# Fields of a measurement's key that say what was measured; the others say under which circumstances.
IDENTITY = ("op", "dims", "dtypes", "quant", "tokens", "family", "arch", "emulated", "kernel", "config")
_KEY = {
    "op": str, "dims": dict, "dtypes": dict, "quant": str, "tokens": list, "family": str, "arch": str, "emulated": bool,
    "kernel": str, "config": (dict, type(None)), "memory": int, "versions": dict, "layouts": dict,
}  # fmt: skip


@dataclass(frozen=True)
class Record:
    """One measurement."""

    key: dict[str, Any]
    value: dict[str, Any]

    @property
    def identity(self) -> str:
        """Equal for measurements of the same thing, under whatever conditions."""
        return json.dumps([self.key.get(name) for name in IDENTITY], sort_keys=True)

    @property
    def wrong(self) -> str:
        """Why the result was not right; "" if it was."""
        return str(self.value.get("wrong", ""))

    @property
    def median_us(self) -> float:
        return float(self.value["median_us"])

    def line(self) -> str:
        return json.dumps({"format": FORMAT, "key": self.key, "value": self.value}, allow_nan=False)


@dataclass
class Contents:
    """What a file holds: its records in order, and a note for each line that is none."""

    records: list[Record] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    lines: list[tuple[str, Record | None]] = field(default_factory=list)


class Database:
    """The file of one architecture. Reading never fails for what a line holds; writing is atomic, and safe beside others."""

    def __init__(self, folder: Path, arch: str) -> None:
        self.path = folder / f"{re.sub(r'[^A-Za-z0-9_.-]', '_', arch).lstrip('.') or '_'}.jsonl"

    def read(self) -> Contents:
        """All records; malformed lines as notes with file and line. UsageError if the file is there but cannot be read."""
        found = Contents()
        try:
            raw = self.path.read_bytes()
        except FileNotFoundError:
            return found
        except OSError as error:
            raise UsageError(f"tuning measurements: {error}; make the file readable or remove it") from error
        for number, line in enumerate(raw.decode("utf-8", errors="replace").split("\n"), 1):
            if not line.strip():
                continue
            try:
                record = _parse(line)
                found.records.append(record)
                found.lines.append((line, record))
            except (ValueError, RecursionError) as error:
                found.lines.append((line, None))
                found.notes.append(f"{self.path}, line {number}: ignored: {error}")
        return found

    def add(self, records: list[Record]) -> None:
        """Write records beside those that are there, in place of earlier ones with the same key."""
        fresh = {json.dumps(r.key, sort_keys=True) for r in records}

        def merged(contents: Contents) -> list[str]:
            kept = [line for line, r in contents.lines if r is None or json.dumps(r.key, sort_keys=True) not in fresh]
            return [*kept, *(r.line() for r in records)]

        self._rewrite(merged)

    def clear(self, unwanted: Callable[[Record], bool]) -> int:
        """Remove these records, and lines that are none; returns how many lines went."""
        removed = 0

        def kept(contents: Contents) -> list[str]:
            nonlocal removed
            lines = [line for line, record in contents.lines if record is not None and not unwanted(record)]
            removed = len(contents.lines) - len(lines)
            return lines

        if self.path.exists():
            self._rewrite(kept)
        return removed

    def _rewrite(self, change: Callable[[Contents], list[str]]) -> None:
        """Read, change and replace the file while holding its lock: nobody's lines are lost, nobody sees half a file."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with _locked(self.path.with_suffix(".lock")):
                lines = change(self.read())
                temporary = self.path.with_suffix(".tmp")  # one name is enough: we hold the lock
                temporary.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
                os.replace(temporary, self.path)
        except OSError as error:
            raise UsageError(f"cannot write tuning measurements: {error}; set DSV3_TUNING_DIR to a folder of yours") from error


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock that the system takes back if we die. The file stays: removing it would let two hold "the" lock."""
    with open(path, "a+b") as handle:
        if sys.platform == "win32":
            import msvcrt

            handle.seek(0)
            msvcrt.locking(handle.fileno(), msvcrt.LK_LOCK, 1)
        else:
            import fcntl

            fcntl.flock(handle.fileno(), fcntl.LOCK_EX)
        yield


def _parse(line: str) -> Record:
    """ValueError says what is wrong with a line."""
    try:
        found = json.loads(line)
    except ValueError as error:
        raise ValueError(f"not JSON ({error})") from error
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ValueError(f"not a record of format {FORMAT}")
    key, value = found.get("key"), found.get("value")
    if not isinstance(key, dict) or not isinstance(value, dict):
        raise ValueError("key or value is missing")
    for name, kind in _KEY.items():
        if not isinstance(key.get(name), kind):  # type: ignore[arg-type]
            raise ValueError(f"key {name!r} is {key.get(name)!r}")
    tokens = key["tokens"]
    if len(tokens) != 2 or not all(type(t) is int for t in tokens) or not 1 <= tokens[0] <= tokens[1]:
        raise ValueError(f"key 'tokens' is {tokens!r}")
    median = value.get("median_us")
    measured = isinstance(median, int | float) and not isinstance(median, bool) and math.isfinite(median) and median > 0
    if not measured and not (isinstance(value.get("wrong"), str) and value["wrong"]):
        raise ValueError(f"value 'median_us' is {median!r}")
    return Record(key, value)
