"""The first start on a machine: kernels that will be needed are compiled by other processes while this one loads and compiles.

numba compiles on one core. Which programs a process takes on shows in marker files beside the cache; who finds another's
marker waits for it, rather than doing the same work.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dsv3_cpu.objects import cache_folder, is_there

COMMON = Path(__file__).with_name("common.json")
_MOST_HELPERS = 3
_WAIT = 60.0  # seconds
_helping = False
_helpers: list[subprocess.Popen[bytes]] = []


def common(*of: str) -> list[tuple[str, str]]:
    """(kernel, signature) of programs that models use, those first that take longest. "short": for prompts of up to 32 tokens
    and decoding, in FP8 and bfloat16; "long": what else longer prompts need; "int8", "int4": what else such weights need."""
    lists = json.loads(COMMON.read_text(encoding="utf-8"))
    return [(kernel, signature) for name in of or lists for kernel, signature in lists[name]]


def missing() -> list[tuple[str, str]]:
    """Those for short prompts that are not in a file yet."""
    from dsv3_cpu.programs import program_name

    return [entry for entry in common("short") if not is_there(program_name(*entry))]


def no_helpers() -> None:
    """This process starts none, whatever it has to compile."""
    global _helping
    _helping = True


def is_taken(name: str) -> bool:
    """Whether a process is compiling this program."""
    folder = cache_folder()
    return folder is not None and _marker(folder, name).exists()


def _marker(folder: Path, name: str) -> Path:
    import hashlib

    return folder / f"{hashlib.sha256(name.encode()).hexdigest()[:16]}.compiling"


def _take(marker: Path) -> bool:
    """Whether this process is the one that compiles it."""
    try:
        with open(marker, "x", encoding="ascii") as file:
            file.write(str(os.getpid()))
    except FileExistsError:
        return False
    except OSError:
        return True
    return True


def _left_behind(marker: Path) -> bool:
    """Whether the process that took it on is gone."""
    if sys.platform == "win32":  # where this question would end the process
        return False
    try:
        os.kill(int(marker.read_text(encoding="ascii")), 0)
    except ProcessLookupError:
        return True
    except (OSError, ValueError):
        pass
    return False


@contextmanager
def alone(name: str) -> Iterator[None]:
    """While open, other processes that want this program wait for it; on entry this one waits for one that is at it."""
    folder = cache_folder()
    if folder is None:
        yield
        return
    marker = _marker(folder, name)
    deadline = time.monotonic() + _WAIT
    while not _take(marker) and time.monotonic() < deadline:
        if _left_behind(marker):
            with suppress(OSError):
                marker.unlink()
        else:
            time.sleep(0.02)
    try:
        yield
    finally:
        with suppress(OSError):
            marker.unlink()


def start() -> None:
    """Start helpers for the common programs, once, where there are cores for them and a cache to meet in."""
    global _helping
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if _helping or cores < 2 or getattr(sys, "frozen", False) or cache_folder() is None or not missing():
        return
    _helping = True
    for _ in range(min(_MOST_HELPERS, cores - 1)):
        with suppress(OSError):
            _helpers.append(
                subprocess.Popen(
                    [sys.executable, "-c", "from dsv3_cpu.ahead import main; main()"],
                    stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                )
            )  # fmt: skip


@atexit.register
def _stop() -> None:
    for helper in _helpers:
        helper.terminate()
    for helper in _helpers:
        with suppress(subprocess.TimeoutExpired):
            helper.wait(1)


def main() -> None:
    """What a helper does: compile what nobody else is at."""
    from dsv3_cpu.programs import Kernel, program_name

    no_helpers()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # not without what `alone` leaves behind
    for kernel, signature in missing():
        if not is_taken(program_name(kernel, signature)):
            Kernel(kernel).program(signature)
