"""What is in the folder of tuning measurements, and how much of it counts on this machine today: for `dsv3 doctor`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dsv3.dispatch.choose import named
from dsv3.dispatch.registration import registered_kernels
from dsv3.dispatch.tuning.database import Database, Record
from dsv3.dispatch.tuning.tuned import Tuned
from dsv3.errors import Dsv3Error


def status(folder: Path) -> list[dict[str, Any]]:
    """Per file, backend and device: {"file", "backend", "device", "used", "ignored": {reason: count}}; malformed lines are
    ignored ones of no backend. Loads the backends that were measured, and nothing if nothing was."""
    found: list[dict[str, Any]] = []
    for path in sorted(folder.glob("*.jsonl")):
        try:
            contents = Database(folder, path.stem).read()
        except Dsv3Error as error:
            found.append(_entry(path, "", "", 0, {str(error): 1}))
            continue
        groups: dict[tuple[str, str, str, bool], list[Record]] = {}
        for record in contents.records:
            key = record.key
            backend = key["kernel"].partition(".")[0]
            groups.setdefault((backend, key["family"], key["arch"], key["emulated"]), []).append(record)
        for (backend, family, arch, emulated), records in groups.items():
            device = f"{family} ({arch}{', emulated' if emulated else ''})"
            used, ignored = _counted(backend, family, arch, emulated, records)
            found.append(_entry(path, backend, device, used, ignored))
        if contents.notes:
            found.append(_entry(path, "", "", 0, Counter(note.partition("ignored: ")[2] for note in contents.notes)))
    return found


def _entry(path: Path, backend: str, device: str, used: int, ignored: dict[str, int]) -> dict[str, Any]:
    return {"file": str(path), "backend": backend, "device": device, "used": used, "ignored": dict(ignored)}


def _counted(backend: str, family: str, arch: str, emulated: bool, records: Iterable[Record]) -> tuple[int, dict[str, int]]:
    """(how many count, the others by reason)."""
    records = list(records)
    try:
        source = named(backend, None if emulated else family, arch if emulated else None)
        if source.device.arch != arch:
            return 0, {f"this machine has {source.device}": len(records)}
        tuned = Tuned(source, registered_kernels(source.backend, source.device), records)
    except Dsv3Error as error:
        return 0, {str(error): len(records)}
    return len(tuned.fresh), Counter(s.reason for s in tuned.stale)
