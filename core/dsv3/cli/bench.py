"""`dsv3 bench`: speed beside what the machine can do, and what dsv3 itself costs."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsv3.cli.common import load_model, settings_of, table
from dsv3.errors import UsageError

if TYPE_CHECKING:
    from dsv3.bench.dispatch import Figures


def main(arguments: argparse.Namespace) -> int:
    if arguments.bench in ("dispatch", "aot"):
        return {"dispatch": _dispatch, "aot": _aot}[arguments.bench](arguments)
    if arguments.bench == "peers":
        from dsv3.cli.bench_peers import main as peers

        return peers(arguments)
    if arguments.bench == "serve":
        from dsv3.cli.bench_serve import main as serve

        return serve(arguments)
    from dsv3.cli.bench_run import main as workload

    return workload(arguments)


def _dispatch(arguments: argparse.Namespace) -> int:
    """1 if a bound call costs more than the bar, or a step selects anything."""
    from dsv3.bench.dispatch import measure

    settings = {**settings_of(arguments), "check": False}  # what is measured is the path without it
    figures = measure(lambda: load_model(arguments, settings))
    print(_text(figures))
    if arguments.json:
        _write(Path(arguments.json), figures)
    return 1 if figures.failures else 0


def _aot(arguments: argparse.Namespace) -> int:
    """1 if a binary breaks an expectation."""
    from dsv3.bench.aot import jobs, run

    def words(text: str | None) -> list[str] | None:
        return text.split(",") if text else None

    backends = [arguments.backend] if arguments.backend else ["cuda", "rocm"]
    todo = jobs(backends, words(arguments.arch), arguments.full, words(arguments.ops))
    if not todo:
        raise UsageError(f"backend {', '.join(backends)} compiles nothing ahead of time")
    start = time.monotonic()

    def done(job: Any, rows: list[dict[str, Any]]) -> None:
        bad = sum(bool(r["violations"]) for r in rows)
        what = f"{len(rows)} binaries, {bad} against expectations" if bad else f"{len(rows)} binaries"
        print(f"{job.arch}: {what} ({time.monotonic() - start:.0f} s)", file=sys.stderr, flush=True)

    rows = run(todo, arguments.workers, done)
    print(_aot_text(rows, arguments.verbose))
    if arguments.json:
        _write_text(Path(arguments.json), json.dumps(rows, indent=1))
    return 1 if any(r["violations"] for r in rows) else 0


def _aot_text(rows: list[dict[str, Any]], verbose: bool) -> str:
    """A line per binary, or per kernel and architecture; then what is wrong."""
    head = ("arch", "kernel", "binaries", "registers", "spills", "shared", "occupancy", "matrix instructions", "loads, bytes")
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        key = (row["arch"], row["kernel"], *((row["call"], row["config"]) if verbose else ()))
        groups.setdefault(key, []).append(row)
    lines = [head]
    for key, found in groups.items():
        made = [r for r in found if "error" not in r]
        kinds = sorted({m for r in made for m in r["matrix"]})
        widths = sorted({int(w) for r in made for w in r["loads"]}, reverse=True)
        lines.append((
            key[0], " ".join(key[1:]), str(len(found)), _span(made, "registers"), str(sum(r["spills"] for r in made)),
            _span(made, "shared"), _span(made, "occupancy"), ", ".join(kinds[:4]) + (" .." if len(kinds) > 4 else "") or "-",
            ", ".join(map(str, widths[:3])) or "-",
        ))  # fmt: skip
    wrong = [
        f"{r['arch']} {r['kernel']} ({r['call']}; {r['config']}): {v}{': ' + r['error'] if 'error' in r else ''}"
        for r in rows for v in r["violations"]
    ]  # fmt: skip
    verdict = f"{len(rows)} binaries, all as expected" if not wrong else "FAILED:\n" + "\n".join(wrong)
    return table(lines) + "\n\n" + verdict


def _span(rows: list[dict[str, Any]], name: str) -> str:
    values = [r[name] for r in rows]
    if not values:
        return "-"
    return str(values[0]) if min(values) == max(values) else f"{min(values)}-{max(values)}"


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
    _write_text(
        path,
        json.dumps({**figures.to_json(), "python": platform.python_version(), "machine": platform.machine()}, indent=2),
    )


def _write_text(path: Path, text: str) -> None:
    part = path.with_name(f".{path.name}.part")
    part.write_text(text + "\n", encoding="utf-8")
    os.replace(part, path)
