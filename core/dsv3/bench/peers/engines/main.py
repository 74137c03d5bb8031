"""`python main.py ENGINE JOB OUT`: run the workloads of JOB through an engine, and write to OUT what they took.

JOB is JSON: model, threads, dtype, repeats, workloads of {name, tokens, prompts}, and options of dsv3. OUT is JSON: version,
load_s, and for each workload the seconds of every repeat and the ids of the last, or the error. An engine's module has a class
Engine: made with the job it loads the model; prefill(prompts) gives seconds to the first token of all prompts, and the tokens;
decode(prompts, tokens, repeats) gives, for each repeat, the seconds of so many steps behind the prompts, and then the ids.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def peak() -> int | None:
    """Bytes, the most that was ever resident in this process and in those it started, each by itself; mapped files among them,
    and pages that two of them share twice."""
    parents: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*/status"):
        parents[int(path.parent.name)] = _status(path, "PPid:") or 0
    ours = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in ours} - ours:
        ours |= more
    found = [_status(Path(f"/proc/{pid}/status"), "VmHWM:") for pid in ours]
    sizes = [kilobytes for kilobytes in found if kilobytes is not None]
    return sum(sizes) * 1024 if sizes else None


def _status(path: Path, name: str) -> int | None:
    """A number of a process; None where it is not told, or the process has gone."""
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith(name)), None)


def measured(engine: Any, workload: dict[str, Any], repeats: int) -> dict[str, Any]:
    """One workload, after a turn that is not counted."""
    prompts, tokens = workload["prompts"], workload["tokens"]
    if tokens:
        seconds, ids = engine.decode(prompts, tokens, repeats + 1)
        return {"seconds": seconds[1:], "ids": ids}
    engine.prefill(prompts)
    runs = [engine.prefill(prompts) for _ in range(repeats)]
    return {"seconds": [s for s, _ in runs], "ids": [[token] for token in runs[-1][1]]}


def run(name: str, job: dict[str, Any], keep: Callable[[dict[str, Any]], None]) -> None:
    """Run everything. keep: called with all there is to tell, after each workload, so that a process that is ended before its
    end leaves what it had."""
    sys.path.insert(0, str(Path(__file__).parent))
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        return keep({"missing": f"{error} ({sys.executable})"})
    start = time.perf_counter()
    engine = module.Engine(job)
    found: dict[str, Any] = {"version": engine.version, "load_s": time.perf_counter() - start, "workloads": {}}
    for workload in job["workloads"]:
        try:
            found["workloads"][workload["name"]] = measured(engine, workload, job["repeats"])
        except Exception as error:  # one workload that an engine cannot do is no reason to lose the others
            found["workloads"][workload["name"]] = {"error": said(error)}
        keep({**found, "peak_bytes": peak()})


def said(error: Exception) -> str:
    """In one line."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]


def main() -> None:
    name, job, out = sys.argv[1:]

    def keep(found: dict[str, Any]) -> None:
        part = Path(out + ".part")
        part.write_text(json.dumps(found))
        os.replace(part, out)

    try:
        run(name, json.loads(Path(job).read_text()), keep)
    except Exception as error:  # its text is what the one who asked has to go by
        keep({"error": said(error)})


if __name__ == "__main__":
    main()
