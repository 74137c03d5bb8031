"""Kernels compiled when this package is built, so that a first start need not: into `_objects`, beside these sources.

    python -m dsv3_cpu.ship [--all]

compiles for processors of this machine's level (see `processor.LEVELS`) what the checkpoints of most people need; --all for
those of every level, and for weights in INT8 and INT4 too. No torch is needed, numba is. What is there already is left.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from dsv3_cpu import ahead, objects
from dsv3_cpu.processor import LEVELS, level
from dsv3_cpu.programs import EXPORTED, Kernel, exported, program_name


def wanted(everything: bool) -> list[tuple[str, str]]:
    """(kernel, signature) of the programs that are made, and (function, number of words) of those of EXPORTED."""
    programs = ahead.common() if everything else ahead.common("short", "long")
    return [*programs, *((function, str(words)) for function, words in EXPORTED.items())]


def make(name: str, everything: bool) -> int:
    """Compile what is not there yet for processors of a level; how many objects that were."""
    folder = objects.installed_folder(name)
    files = [objects.file_of(program_name(*entry)) for entry in wanted(everything)]
    if all((folder / file).exists() for file in files):
        return 0
    made_of = folder.name.rpartition("-")[2]
    for stale in folder.parent.glob("*-*"):
        if not stale.name.endswith(made_of):
            shutil.rmtree(stale, ignore_errors=True)
    with tempfile.TemporaryDirectory() as scratch:
        _compile(name, everything, scratch)
        made = {path.name: path for path in Path(scratch).rglob("*.o")}
        folder.mkdir(parents=True, exist_ok=True)
        for file in files:
            temporary = folder / f"{file}.{os.getpid()}.part"
            shutil.copyfile(made[file], temporary)
            os.replace(temporary, folder / file)
    return len(files)


def _compile(name: str, everything: bool, scratch: str) -> None:
    """All programs, by a process for each core, into a cache of their own."""
    features = ",".join(f"+{feature}" for feature in LEVELS[name])
    environment = {**os.environ, "NUMBA_CPU_NAME": name, "NUMBA_CPU_FEATURES": features, "NUMBA_CACHE_DIR": scratch}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    code = f"import sys; sys.path[:] = sys.argv[1:]; from dsv3_cpu import ship; ship.work({everything})"
    command = [sys.executable, "-c", code, *sys.path]
    workers = [subprocess.Popen(command, env=environment) for _ in range(min(cores, 8))]
    failed = [worker.wait() for worker in workers]
    if any(failed):
        raise RuntimeError(f"kernels for {name} could not be compiled: what failed is above")


def work(everything: bool) -> None:
    """What a process of `_compile` does: compile what no other is at, then wait for those."""
    ahead.no_helpers()
    entries = wanted(everything)
    for unclaimed in (True, False):
        for kernel, signature in entries:
            name = program_name(kernel, signature)
            if not (objects.is_there(name) or (unclaimed and ahead.is_taken(name))):
                exported(kernel) if kernel in EXPORTED else Kernel(kernel).program(signature)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m dsv3_cpu.ship", description="compile kernels ahead of installation")
    parser.add_argument("--all", action="store_true", help="for processors of every level, and all kinds of weights")
    everything = parser.parse_args().all
    here = level()
    if here is None:
        print("no kernels are compiled ahead for this kind of processor: a first start compiles them")
        return
    for name in LEVELS if everything else [here]:
        print(f"{name}: {make(name, everything)} kernels compiled for {sys.platform}")


if __name__ == "__main__":
    main()
