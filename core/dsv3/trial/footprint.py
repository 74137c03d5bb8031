"""What importing a plugin changes in the process: modules, threads, environment, signals, files, streams."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsv3.settings import environment
from dsv3.trial.findings import Answer

# Slow to import, or they take hold of a device or of threads.
HEAVY = frozenset(
    (
        *("cuda", "cupy", "jax", "llvmlite", "numba", "numpy", "onnx", "onnxruntime", "openvino", "pandas", "pynvml", "scipy"),
        *("tensorflow", "torch", "torch_npu", "transformers", "triton", "tvm"),
    )
)
MANY_MODULES = 200
_TRIES = 10


@dataclass(frozen=True)
class Footprint:
    """The state of the process at one moment."""

    modules: frozenset[str]
    threads: frozenset[str]
    native_threads: int
    environment: dict[str, str]
    signals: dict[str, Any]
    cwd: str
    files: frozenset[str]
    path: tuple[str, ...]
    hooks: dict[str, int]
    logging: tuple[int, int]


def footprint() -> Footprint:
    """Taken now."""
    tasks = Path("/proc/self/task")
    return Footprint(
        modules=frozenset(sys.modules),
        threads=frozenset(f"{t.name}" for t in threading.enumerate()),
        native_threads=len(os.listdir(tasks)) if tasks.exists() else threading.active_count(),
        environment=environment(),
        signals={s.name: signal.getsignal(s) for s in signal.valid_signals() if isinstance(s, signal.Signals)},
        cwd=os.getcwd(),
        files=frozenset(os.listdir()),
        path=tuple(sys.path),
        hooks={name: id(getattr(sys, name)) for name in ("stdout", "stderr", "excepthook", "displayhook")},
        logging=(len(logging.root.handlers), logging.root.level),
    )


def settled(before: Footprint) -> Footprint:
    """Taken once the thread that did the import is gone from the system's list, which takes it a moment."""
    after = footprint()
    for _ in range(_TRIES):
        if after.native_threads <= before.native_threads:
            break
        time.sleep(0.02)
        after = footprint()
    return after


def changes(before: Footprint, after: Footprint) -> Answer:
    """What lies between the two: a mistake where it changes how others run, else a warning."""
    answer = Answer()
    for name in sorted(before.environment.keys() | after.environment.keys()):
        old, new = before.environment.get(name), after.environment.get(name)
        if old != new:
            how = "unsets" if new is None else f"sets to {new!r}"
            answer.mistakes.append(f"its import {how} the environment variable {name}: that changes every other backend")
    for name, old in before.signals.items():
        if after.signals.get(name) != old:
            answer.mistakes.append(f"its import replaces the handler of {name}")
    if after.cwd != before.cwd:
        answer.mistakes.append(f"its import changes the working directory to {after.cwd}")
    replaced = [name for name, old in before.hooks.items() if after.hooks[name] != old]
    answer.mistakes += [f"its import replaces sys.{name}" for name in replaced]
    answer.warnings += _costs(before, after)
    return answer


def _costs(before: Footprint, after: Footprint) -> list[str]:
    found = []
    new = after.modules - before.modules
    if heavy := sorted({name.partition(".")[0] for name in new} & HEAVY):
        found.append(f"its import imports {', '.join(heavy)} ({len(new)} modules); import such packages inside functions")
    elif len(new) > MANY_MODULES:
        found.append(f"its import imports {len(new)} modules; import what kernels need inside functions")
    if files := sorted(after.files - before.files):
        found.append(f"its import creates {', '.join(files)} in the working directory")
    started = sorted(after.threads - before.threads)
    if started or after.native_threads > before.native_threads:
        count = max(len(started), after.native_threads - before.native_threads)
        found.append(f"its import leaves {count} threads running ({', '.join(started) or 'native'})")
    if added := [p for p in after.path if p not in before.path]:
        found.append(f"its import adds {', '.join(added)} to sys.path")
    if after.logging != before.logging:
        found.append("its import configures the root logger; leave that to the application")
    return found
