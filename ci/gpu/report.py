"""The job's result: one JSON file, replaced as a whole whenever there is more to tell, and a table for people."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import tempfile
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

import torch

from dsv3.plugin import Device

NO_TIMES = "emulated: times mean nothing"
_DRIVERS = {"/proc/driver/nvidia/version": r"\s(\d+\.\d+(?:\.\d+)?)\s", "/sys/module/amdgpu/version": r"(\S+)"}
_HERE = Path(__file__).resolve().parent


def blank(device: Device, backend: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The result before anything ran: every key that it will have."""
    return {
        "finished": False,
        "note": NO_TIMES if device.emulated else "",
        "emulated": device.emulated,
        "device": device.name, "arch": device.arch, "memory": device.memory, "backend": backend,
        "driver": "" if device.emulated else driver(), "runtime": device.driver,
        "torch": torch.__version__, "triton": _version("triton", "triton-rocm", "pytorch-triton-rocm", "pytorch-triton"),
        "python": platform.python_version(), "dsv3": _dsv3(), "commit": _commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"), "arguments": dict(arguments), "seconds": None,
        "ceilings": {}, "conformance": None, "rows": [], "left_out": [],
    }  # fmt: skip


def driver() -> str:
    """The kernel driver's version, "" if it does not tell."""
    for path, pattern in _DRIVERS.items():
        try:
            found = re.search(pattern, Path(path).read_text())
        except OSError:
            continue
        if found:
            return found[1]
    return ""


def _version(*names: str) -> str:
    for name in names:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return ""


def _dsv3() -> str:
    import dsv3

    return dsv3.__version__


def _commit() -> str:
    """What is measured, where git can tell; with "+" if files differ."""
    try:
        describe = ["describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"]
        git = ["git", "-c", "safe.directory=*", "-C", str(_HERE), *describe]
        return subprocess.run(git, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def place(device: Device, out: str | None) -> Path:
    """Where the result goes: `out`, a .json file or a folder; else $OUT; else results/, or the system's folder for temporary
    files where the device is emulated."""
    card = re.sub(r"[^a-z0-9]+", "-", device.name.lower()).strip("-")
    name = f"emulated-{device.arch}.json" if device.emulated else f"{card}.json"
    folder = out or os.environ.get("OUT")
    if folder and folder.endswith(".json"):
        return Path(folder)
    if folder:
        return Path(folder) / name
    return (Path(tempfile.gettempdir()) / "dsv3-gpu" if device.emulated else _HERE / "results") / name


def save(result: Mapping[str, Any], path: Path) -> None:
    """Written beside it under another name, then renamed: a reader sees the last whole result or the next."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w") as file:
            json.dump(result, file, indent=1, allow_nan=False)
            file.write("\n")
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _number(value: float | None, form: str = "{:.1f}") -> str:
    return "" if value is None else form.format(value)


def show(result: Mapping[str, Any], stream: TextIO) -> None:
    """The table: a line per row, by operator, then what was left out by reason."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(file=stream, width=None if stream.isatty() else 200, highlight=False)
    table = Table(title=escape(f"{result['device']} ({result['arch']}) {result['note']}".strip()), show_edge=False)
    right = ("T", "us", "spread", "copy", "matmul", "ratio")
    for name in ("operator", "variant", "T", "kernel", "config", "us", "spread", "copy", "matmul", "torch offers", "ratio"):
        table.add_column(name, justify="right" if name in right else "left", overflow="fold")
    order = {op: i for i, op in enumerate(dict.fromkeys(row["op"] for row in result["rows"]))}
    for row in sorted(result["rows"], key=lambda r: (order[r["op"]], r["variant"], r["tokens"])):
        best = min((p for p in row["peers"] if not p["error"]), key=lambda p: p["us"] or 0, default=None)
        share = [_number(row.get(name), "{:.0%}") for name in ("share_of_copy", "share_of_matmul")]
        cells = [row["op"], row["variant"], str(row["tokens"]), row["kernel"], row["config"]]
        cells += [_number(row["us"]), _number(row.get("spread"), "{:.1%}"), *share]
        cells += [best["what"] if best else "", _number(best["ratio"] if best else None, "{:.2f}")]
        if row["error"]:
            cells[9] = "FAILED: " + row["error"][:120]
        table.add_row(*map(escape, cells), style="red" if row["error"] else None)
    console.print(table)
    for name, found in result["ceilings"].items():
        rate = _number(found["value"] and found["value"] / 1e12, "{:.3g} T" + found["unit"])
        console.print(escape(f"{name}: {rate or '-'}  {found['what']}{found.get('error', '')}"))
    _show_rest(result, lambda line: console.print(escape(line), soft_wrap=True))


def _show_rest(result: Mapping[str, Any], line: Any) -> None:
    if (suite := result["conformance"]) is not None:
        counts = "; ".join(f"{level} {n}" for level, n in suite["counts"].items())
        line(f"conformance {suite['suite']}: {suite['failed']} failed{'' if suite['complete'] else ', incomplete'}: {counts}")
        for failure in suite["failures"][:20]:
            line(f"  FAILED {failure['id']} {failure['kernel']}: {failure['message'][:160]}")
        if suite["error"]:
            line(f"  it ended early: {suite['error']}")
    reasons: dict[str, list[str]] = {}
    for entry in result["left_out"]:
        reasons.setdefault(entry["why"], []).append(entry["what"])
    for why, what in reasons.items():
        line(f"left out, {why}: {', '.join(what[:40])}{f' and {len(what) - 40} more' if len(what) > 40 else ''}")
