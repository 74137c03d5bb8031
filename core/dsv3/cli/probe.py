"""`dsv3 probe`: every backend and device with its state, detail, remedy, and the package it came from."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import Any

from dsv3.cli.common import settings_of, table


def main(arguments: argparse.Namespace) -> int:
    settings_of(arguments)
    found = gather()
    if arguments.json:
        print(json.dumps(found, indent=2))
        return 0
    rows = [("backend", "device", "state", "package", "ABI", "detail")]
    for entry in found:
        detail = entry["detail"] + (f" -> {entry['remedy']}" if entry["remedy"] else "")
        device = entry["device"]["text"] if entry["device"] else "-"
        rows.append((entry["backend"], device, entry["state"], entry["package"], entry["abi"], detail))
    print(table(rows))
    return 0


def gather() -> list[dict[str, Any]]:
    """All probes as plain data."""
    from dsv3.dispatch.choose import probe_plugin
    from dsv3.dispatch.plugins import discover

    found = []
    for plugin in discover():
        for device, answer in probe_plugin(plugin):
            capability = answer.capability
            found.append(
                {
                    "backend": plugin.name,
                    "device": {**asdict(device), "text": str(device)} if device else None,
                    "state": answer.state,
                    "package": plugin.source,
                    "abi": plugin.group.removeprefix("dsv3.backends."),
                    "entry_point": plugin.value,
                    "dtypes": sorted(capability.dtypes) if capability else [],
                    "features": sorted(capability.features) if capability else [],
                    "detail": answer.detail,
                    "remedy": answer.remedy,
                    "import_s": round(plugin.load_seconds, 4),
                }
            )
    return found
