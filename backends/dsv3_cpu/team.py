"""Threads that run a kernel together.

Workers are threads of Python that hold no lock of it while they work or wait: between kernels they watch a word of memory for
a moment, so that the next kernel of a step starts on all threads within a microsecond, and then sleep.
"""

from __future__ import annotations

import functools
import os
import threading
from array import array as words
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np

from dsv3_cpu.constants import LINE, MOST_WORKERS, STATUS, STOPPED, WORDS

_NO_MEMORY = "a kernel found no memory for its intermediate results"
# Bytes read, or their equivalent in arithmetic, from which threads pay.
WORTH_THREADS = 1 << 16
_MOST_ROWS = 256


class _Native:
    """The functions of kernels/crew.py, callable."""

    def __init__(self) -> None:
        from dsv3_cpu.programs import exported

        self.run_all, self.join, self.work = (exported(f"crew.{name}") for name in ("run_all", "join", "work"))
        self.alone, self.wake = exported("crew.alone"), exported("crew.wake")


@functools.cache
def _native() -> _Native:
    return _Native()


class Team:
    """A crew of `crew` threads, the caller being one."""

    def __init__(self, crew: int) -> None:
        self.crew = crew
        self.memory = np.zeros(WORDS + LINE, np.int64)
        self.address = (self.memory.ctypes.data + 63) & ~63
        self._beds = [threading.Lock() for _ in range(crew - 1)]
        for n, bed in enumerate(self._beds):
            bed.acquire()
            threading.Thread(target=self._live, args=(n, bed), name=f"dsv3-cpu-{n + 1}", daemon=True).start()

    def _live(self, n: int, bed: threading.Lock) -> None:
        _pin(n + 1)
        status = (self.address + 8 * (STATUS + n * LINE) - self.memory.ctypes.data) // 8
        seen, native = 0, _native()
        while True:
            seen = native.work(self.address, n + 1, self.crew, seen)
            if self.memory[status] == STOPPED:
                return
            bed.acquire()

    def run(self, program: int, arguments: int) -> None:
        """One program, on all threads. Raises MemoryError, for all that it can fail for."""
        native = _native()
        state = native.run_all(self.address, program, arguments, self.crew)
        if state > 0:
            for n, bed in enumerate(self._beds):
                if native.wake(self.address + 8 * (STATUS + n * LINE)):
                    bed.release()
            state = native.join(self.address, program, arguments, self.crew)
        if state:
            raise MemoryError(_NO_MEMORY)

    def stop(self) -> None:
        """Ends the workers, at the latest when they next look."""
        for n, bed in enumerate(self._beds):
            self.memory[(self.address - self.memory.ctypes.data) // 8 + STATUS + n * LINE] = STOPPED
            bed.release()


def _pin(number: int) -> None:
    """With DSV3_CPU_PIN set, thread `number` of a team stays on one processor: of those that the process may use, the one of
    that place. The caller's own thread, number 0, is left where it is."""
    if os.environ.get("DSV3_CPU_PIN") and hasattr(os, "sched_setaffinity"):
        allowed = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(threading.get_native_id(), {allowed[number % len(allowed)]})


class _Solo(threading.local):
    """The memory of a crew of one, for every thread of Python its own."""

    def __init__(self) -> None:
        self.memory = np.zeros(WORDS + LINE, np.int64)
        self.address = (self.memory.ctypes.data + 63) & ~63


_solo = _Solo()
_team: Team | None = None
_in_use = threading.Lock()  # a team runs one program at a time; who comes second works alone


_asked: Callable[[], int] | None = None


def crew_size() -> int:
    """Threads that a kernel may use: torch's number."""
    global _asked
    if _asked is None:
        import torch  # not by processes that only compile

        _asked = torch.get_num_threads
    return min(_asked(), MOST_WORKERS + 1)


def tile_of(rows: int, most: int | None) -> int:
    """Rows of a weight that a thread takes at a time, a power of two: many, since memory is read fastest in long runs and x is
    prepared for each, but no more than `most`, and few enough for threads to end together. rows: in all."""
    tile, fair = 16, rows // (4 * crew_size())
    while 2 * tile <= fair and tile < (most or _MOST_ROWS):
        tile *= 2
    return tile


class Call(NamedTuple):
    """A program over a block of its arguments' words. size: bytes that it reads, about."""

    program: int
    size: int
    block: words[int]


_recorder: Any = None


@contextmanager
def recording(recorder: Any) -> Iterator[None]:
    """While open, recorder.note(call) hears of all calls of recorder.thread, and recorder.held gets what `hold` is given."""
    global _recorder
    with _recording:
        _recorder = recorder
        try:
            yield
        finally:
            _recorder = None


_recording = threading.Lock()


def hold(*made: Any) -> None:
    """Memory that a program is about to be given the address of, and that may be gone when a recording runs it again."""
    if _recorder is not None and _recorder.thread == threading.get_ident():
        _recorder.held += made


def run(program: int, size: int, arguments: tuple[int, ...]) -> None:
    """Runs a program over the words of its arguments. size: bytes that it reads, about; little is done by the caller alone."""
    call = Call(program, size, words("q", arguments))
    if _recorder is not None and _recorder.thread == threading.get_ident():
        _recorder.note(call)
    run_all((call,))


def run_all(calls: tuple[Call, ...]) -> None:
    """Runs one after the other."""
    global _team
    crew, solo, native = crew_size(), _solo.address, _native()
    shared = crew > 1 and any(call.size >= WORTH_THREADS for call in calls) and _in_use.acquire(blocking=False)
    try:
        if shared and (_team is None or _team.crew != crew):
            if _team is not None:
                _team.stop()
            _team = Team(crew)
        for program, size, block in calls:
            address = block.buffer_info()[0]
            if shared and size >= WORTH_THREADS and _team is not None:
                _team.run(program, address)
            elif native.alone(solo, program, address):
                raise MemoryError(_NO_MEMORY)
    finally:
        if shared:
            _in_use.release()


def _forget() -> None:
    """After a fork there are no workers."""
    global _team, _in_use
    _team, _in_use = None, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
