"""Threads that run a kernel together.

Workers are threads of Python that hold no lock of it while they work or wait: between kernels they watch a word of memory for
a moment, so that the next kernel of a step starts on all threads within a microsecond, and then sleep.
"""

from __future__ import annotations

import os
import threading
from array import array as words
from collections.abc import Callable

import numpy as np

from dsv3_cpu.compile import called
from dsv3_cpu.kernels.atoms import (
    ARGUMENTS,
    COUNTERS,
    DONE,
    GENERATION,
    LINE,
    MOST_WORKERS,
    PARKED,
    PHASES,
    PROGRAM,
    RUNNING,
    STATUS,
    STOPPED,
    WORDS,
    call,
    exchange,
    load,
    rest,
    store,
    word,
)
from dsv3_cpu.kernels.atoms import add as add_to

# Bytes read, or their equivalent in arithmetic, from which threads pay.
WORTH_THREADS = 1 << 16
_IDLE = 6000  # looks at the word before a worker sleeps: about a millisecond


@called("intp(intp, intp, intp, intp)")
def _publish(team, program, arguments, crew):
    """Shows the workers a program -> how many of them sleep."""
    for phase in range(PHASES):
        store(word(team, COUNTERS + phase * LINE), 0)
    store(word(team, DONE), 0)
    store(word(team, PROGRAM), program)
    store(word(team, ARGUMENTS), arguments)
    store(word(team, GENERATION), load(word(team, GENERATION)) + 1)
    asleep = 0
    for worker in range(crew - 1):
        asleep += load(word(team, STATUS + worker * LINE)) != RUNNING
    return asleep


@called("void(intp, intp, intp, intp)")
def _join(team, program, arguments, crew):
    """The caller's share of what was published, and then the wait for the others'."""
    call(program, arguments, team, 0, crew)
    spins = 0
    while load(word(team, DONE)) != crew - 1:
        spins += 1
        rest(spins)


@called("intp(intp, intp, intp, intp)")
def _run(team, program, arguments, crew):
    """`_publish` and `_join`, unless workers sleep."""
    asleep = _publish(team, program, arguments, crew)
    if asleep == 0:
        _join(team, program, arguments, crew)
    return asleep


@called("void(intp, intp, intp)")
def _alone(team, program, arguments):
    for phase in range(PHASES):
        store(word(team, COUNTERS + phase * LINE), 0)
    call(program, arguments, team, 0, 1)


@called("intp(intp, intp, intp, intp)")
def _work(team, me, crew, seen):
    """Runs every program after generation `seen` -> the last generation, when there was none for a while or it was stopped."""
    mine = word(team, STATUS + (me - 1) * LINE)
    spins = 0
    while True:
        if load(word(team, GENERATION)) != seen:
            seen += 1
            spins = 0
            call(load(word(team, PROGRAM)), load(word(team, ARGUMENTS)), team, me, crew)
            add_to(word(team, DONE), 1)
            continue
        if load(mine) == STOPPED:
            return seen
        spins += 1
        rest(spins)
        if spins > _IDLE:
            if exchange(mine, PARKED) == STOPPED:
                store(mine, STOPPED)
                return seen
            # A program may have been shown in between: whoever changes the word back is the one that wakes this thread.
            if load(word(team, GENERATION)) == seen or exchange(mine, RUNNING) != PARKED:
                return seen
            spins = 0


@called("intp(intp)")
def _wake(status):
    """Whether this worker slept, and is now to be woken by the caller."""
    if load(status) != PARKED:
        return 0
    return exchange(status, RUNNING) == PARKED


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
        status = (self.address + 8 * (STATUS + n * LINE) - self.memory.ctypes.data) // 8
        seen = 0
        while True:
            seen = _work(self.address, n + 1, self.crew, seen)
            if self.memory[status] == STOPPED:
                return
            bed.acquire()

    def run(self, program: int, arguments: int) -> None:
        """One program, on all threads."""
        if _run(self.address, program, arguments, self.crew):
            for n, bed in enumerate(self._beds):
                if _wake(self.address + 8 * (STATUS + n * LINE)):
                    bed.release()
            _join(self.address, program, arguments, self.crew)

    def stop(self) -> None:
        """Ends the workers, at the latest when they next look."""
        for n, bed in enumerate(self._beds):
            self.memory[(self.address - self.memory.ctypes.data) // 8 + STATUS + n * LINE] = STOPPED
            bed.release()


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


def run(program: int, work: int, arguments: tuple[int, ...]) -> None:
    """Runs a program over the words of its arguments. work: bytes that it reads, about; little is done by the caller alone."""
    global _team
    block = words("q", arguments)
    address = block.buffer_info()[0]
    if work >= WORTH_THREADS and (crew := crew_size()) > 1 and _in_use.acquire(blocking=False):
        try:
            if _team is None or _team.crew != crew:
                if _team is not None:
                    _team.stop()
                _team = Team(crew)
            _team.run(program, address)
        finally:
            _in_use.release()
        return
    _alone(_solo.address, program, address)


def _forget() -> None:
    """After a fork there are no workers."""
    global _team, _in_use
    _team, _in_use = None, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
