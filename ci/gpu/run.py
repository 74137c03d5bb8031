"""One job on one GPU: is dsv3 right on it, how fast are its kernels, and how fast could they be?

Ceilings, then conformance, then kernels with what torch offers beside each; one JSON file and a table. See README.md.
"""

from __future__ import annotations

import argparse
import faulthandler
import importlib
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import report
from ceilings import ceilings
from conform import conform
from kernels import Rows, failed
from timing import Clock

from dsv3.bench.calls.shapes import TINY, V3

BUDGET, EMULATED_BUDGET = 470.0, 45.0
# How much of the budget is gone when a section must end. Ceilings take some seconds and have no limit.
CONFORMANCE_ENDS, ROWS_END = 0.45, 0.97
SECTIONS = ("ceilings", "conformance", "kernels")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="ci/gpu/run.py", description=__doc__)
    parser.add_argument("--emulate", metavar="ARCH", help="tiny sizes in Triton's interpreter, on the CPU: proves this script")
    limits = f"seconds for everything; {BUDGET:.0f}, emulated {EMULATED_BUDGET:.0f}"
    parser.add_argument("--budget", type=float, metavar="S", help=limits)
    parser.add_argument("--out", metavar="PATH", help="a folder or a .json file; else $OUT, else ci/gpu/results")
    parser.add_argument("--ops", metavar="OP,OP", help="only these operators' kernels")
    parser.add_argument("--only", metavar="SECTION,..", help=f"of {', '.join(SECTIONS)}")
    found = parser.parse_args(argv)
    found.budget = found.budget if found.budget is not None else EMULATED_BUDGET if found.emulate else BUDGET
    found.ops = found.ops.split(",") if found.ops else None
    found.only = found.only.split(",") if found.only else list(SECTIONS)
    if unknown := [s for s in found.only if s not in SECTIONS]:
        parser.error(f"no section is called {', '.join(unknown)}; there are {', '.join(SECTIONS)}")
    if found.ops:
        from dsv3.ops import names

        if unknown := [op for op in found.ops if op not in names()]:
            parser.error(f"no operator is called {', '.join(unknown)}")
    return found


def backend_of(emulate: str | None) -> Any:
    """The backend's name if it is installed; from a plain checkout its instance, which runs all but the entry-point cases."""
    import torch

    from dsv3.dispatch.plugins import discover

    amd = emulate.startswith("gfx") if emulate else torch.version.hip is not None
    name = "rocm" if amd else "cuda"
    if any(plugin.name == name for plugin in discover()):
        return name
    return importlib.import_module(f"dsv3_{name}").backend


class Job:
    """The sections in order; the result is saved after each, and in the end whatever happens."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        from dsv3.conformance.target import Target, source_of
        from dsv3_triton.facts import ARCHITECTURES

        self.begun = time.monotonic()
        self.arguments, self.backend = arguments, backend_of(arguments.emulate)
        source = source_of(self.backend, arguments.emulate or False)
        self.target, self.encoding = Target(source), ARCHITECTURES[source.device.arch].fp8
        self.clock = Clock(self.target.device, source.device.arch, source.device.emulated)
        given = {name: v for name, v in vars(arguments).items() if name != "out"}
        self.result = report.blank(source.device, source.name, given)
        self.path = report.place(source.device, arguments.out)
        self.section = "start"

    def until(self, share: float) -> float:
        """When a section must have ended."""
        return self.begun + share * self.arguments.budget

    def run(self) -> int:
        """1 if a conformance case failed or a kernel raised, else 0."""
        say(f"{self.target.source.device}, {self.result['device']}: {self.arguments.budget:.0f} s, result in {self.path}")
        watchdog = threading.Timer(1.1 * self.arguments.budget + 60, self.give_up)
        watchdog.daemon = True
        watchdog.start()
        for section in SECTIONS:
            self.section = section
            if section in self.arguments.only:
                getattr(self, section)()
            else:
                self.result["left_out"].append({"what": section, "why": "not asked for"})
            self.save()
        watchdog.cancel()
        self.section, self.result["finished"] = "end", True
        self.save()
        report.show(self.result, sys.stdout)
        return self.code()

    def code(self) -> int:
        suite = self.result["conformance"]
        bad = suite is not None and bool(suite["failed"] or suite["error"])
        return int(bad or any(failed(self.result["rows"])))

    def save(self) -> None:
        self.result["seconds"] = round(time.monotonic() - self.begun, 1)
        report.save(self.result, self.path)

    def ceilings(self) -> None:
        self.result["ceilings"] = ceilings(self.clock, self.encoding)
        say(f"ceilings known after {time.monotonic() - self.begun:.0f} s")

    def conformance(self) -> None:
        emulate = self.arguments.emulate
        folder = None if emulate else str(self.path.with_suffix("")) + "-conformance"
        seconds = max(0.0, self.until(CONFORMANCE_ENDS) - time.monotonic())
        size = "quick" if emulate else "small"
        self.result["conformance"], left = conform(self.backend, size, emulate, seconds, folder, say)
        self.result["left_out"] += left

    def kernels(self) -> None:
        model = TINY if self.arguments.emulate else V3
        encoding = self.encoding or "float8_e4m3fn"
        rows = Rows(self.target, self.clock, model, encoding, self.result["ceilings"], say)
        before, rows.rows = self.result["left_out"], self.result["rows"]
        try:
            rows.run(self.until(ROWS_END), self.arguments.ops)
        finally:
            self.result["left_out"] = before + rows.left_out

    def give_up(self) -> None:
        """Something hangs, on the device or off it: what is known is saved, and the process ends."""
        faulthandler.dump_traceback(file=sys.stderr)
        say(f"gave up in section {self.section}: far over the budget")
        self.result["left_out"].append({"what": f"the rest of {self.section}, and what follows it", "why": "it hung"})
        self.save()
        os._exit(1)


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    from dsv3.errors import BackendUnavailable

    try:
        job = Job(arguments)
    except BackendUnavailable as error:
        say(f"error: {error}")
        return 3
    return job.run()


if __name__ == "__main__":
    sys.exit(main())
