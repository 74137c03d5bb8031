"""`dsv3 doctor`: versions, devices, plugins, settings and where each came from."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import sys
from typing import Any

from dsv3 import __version__
from dsv3.cli import probe
from dsv3.cli.common import table
from dsv3.errors import UsageError
from dsv3.resources import resources
from dsv3.settings import config_path, resolve, tuning_folder

_PACKAGES = ("torch", "triton", "numpy", "safetensors", "tokenizers", "stevedore", "onnx", "torch-npu")


def main(arguments: argparse.Namespace) -> int:
    found = gather(arguments)
    if arguments.json:
        print(json.dumps(found, indent=2))
        return 0
    print(table([(name, value) for name, value in found["versions"].items()]))
    print("\nsettings")
    if found["settings_problem"]:
        print(f"  error: {found['settings_problem']}")
    rows = [(f"  {s['name']}", "-" if s["value"] is None else str(s["value"]), s["source"]) for s in found["settings"]]
    if rows:
        print(table(rows))
    print(f"  file: {found['config_file']}")
    print(f"\ntuning measurements: {found['tuning_folder']}")
    print(table([_measured(t) for t in found["tuning"]] or [("  none; `dsv3 tune` makes them", "", "")]))
    print("\nbackends")
    backends = [(f"  {b['backend']}", b["state"], b["package"], b["detail"] or (b["device"] or {}).get("text", ""))
            for b in found["backends"]]  # fmt: skip
    print(table(backends or [("  none", "", "", "no entry points: install dsv3 with pip")]))
    return 0


def gather(arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything as plain data."""
    problem = ""
    settings: list[dict[str, Any]] = []
    try:
        settings = [{"name": n, "value": r.value, "source": r.source} for n, r in resolve(vars(arguments)).items()]
    except UsageError as error:  # what doctor is for
        problem = str(error)
    return {
        "versions": _versions(),
        "settings": settings,
        "settings_problem": problem,
        "config_file": f"{config_path()} ({'read' if config_path().exists() else 'absent'})",
        "backends": probe.gather(),
        **_tuning(),
    }


def _measured(entry: dict[str, Any]) -> tuple[str, str, str]:
    """Measurements of one backend and device: how many are used, how many are not and why."""
    ignored = [f"{count} ignored: {reason}" for reason, count in entry["ignored"].items()]
    return f"  {entry['backend'] or entry['file']}", entry["device"], "; ".join([f"{entry['used']} used", *ignored])


def _tuning() -> dict[str, Any]:
    from dsv3.dispatch.tuning.status import status

    try:
        folder = tuning_folder()
    except UsageError as error:
        return {"tuning_folder": f"error: {error}", "tuning": []}
    return {"tuning_folder": str(folder), "tuning": status(folder)}


def _versions() -> dict[str, str]:
    found = {
        "dsv3": __version__,
        "python": f"{platform.python_version()} ({sys.executable})",
        "system": f"{platform.system()} {platform.release()} {platform.machine()}, {os.cpu_count()} CPUs",
        "shipped files": str(resources("configs")),
    }
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found
