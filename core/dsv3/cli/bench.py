"""`dsv3 bench`: what dsv3 itself costs."""

from __future__ import annotations

import argparse
import json
import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING

from dsv3.cli.common import load_model, settings_of, table

if TYPE_CHECKING:
    from dsv3.bench.dispatch import Figures


def main(arguments: argparse.Namespace) -> int:
    return {"dispatch": _dispatch}[arguments.bench](arguments)


def _dispatch(arguments: argparse.Namespace) -> int:
    """1 if a bound call costs more than the bar, or a step selects anything."""
    from dsv3.bench.dispatch import measure

    settings = {**settings_of(arguments), "check": False}  # what is measured is the path without it
    figures = measure(lambda: load_model(arguments, settings))
    print(_text(figures))
    if arguments.json:
        _write(Path(arguments.json), figures)
    return 1 if figures.failures else 0


def _text(figures: Figures) -> str:
    rows = [("bound as", "kernel", "direct call", "overhead (median)", "quartiles", "bar")]
    rows += [
        (r.what, r.kernel, f"{r.direct_ns:,.0f} ns", f"{r.overhead_ns:,.0f} ns", f"{r.low_ns:,.0f} to {r.high_ns:,.0f} ns",
         f"{figures.bar_ns:,.0f} ns" if r.judged else "not judged") for r in figures.rows
    ]  # fmt: skip
    work = [("selection work", "loading, warm-up", f"in {figures.steps} decode steps")]
    work += [(name, str(n), str(figures.decoding[name])) for name, n in figures.loading.items()]
    machine = f"{figures.placement}\n{platform.machine()}, Python {platform.python_version()}"
    verdict = "passed" if not figures.failures else "FAILED: " + "; ".join(figures.failures)
    return "\n\n".join([machine, table(rows), table(work), verdict])


def _write(path: Path, figures: Figures) -> None:
    text = json.dumps({**figures.to_json(), "python": platform.python_version(), "machine": platform.machine()}, indent=2)
    part = path.with_name(f".{path.name}.part")
    part.write_text(text + "\n", encoding="utf-8")
    os.replace(part, path)
