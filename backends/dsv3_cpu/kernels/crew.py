"""How a crew meets: a program is shown to the workers, every thread runs it, and the caller waits for all."""

from __future__ import annotations

from dsv3_cpu.compile import strict
from dsv3_cpu.constants import (
    ARGUMENTS,
    COUNTERS,
    DONE,
    FAILED,
    GENERATION,
    LINE,
    PARKED,
    PHASES,
    PROGRAM,
    RUNNING,
    STATUS,
    STOPPED,
)
from dsv3_cpu.kernels.atoms import add, call, exchange, load, rest, store, word

_IDLE = 6000  # looks at the word before a worker sleeps: about a millisecond


@strict
def publish(team, program, arguments, crew):
    """Shows the workers a program -> how many of them sleep."""
    for phase in range(PHASES):
        store(word(team, COUNTERS + phase * LINE), 0)
    store(word(team, DONE), 0)
    store(word(team, FAILED), 0)
    store(word(team, PROGRAM), program)
    store(word(team, ARGUMENTS), arguments)
    store(word(team, GENERATION), load(word(team, GENERATION)) + 1)
    asleep = 0
    for worker in range(crew - 1):
        asleep += load(word(team, STATUS + worker * LINE)) != RUNNING
    return asleep


@strict
def share(team, program, arguments, crew):
    """The caller's share of what was published, and then the wait for the others' -> whether one failed."""
    failed = call(program, arguments, team, 0, crew)
    spins = 0
    while load(word(team, DONE)) != crew - 1:
        spins += 1
        rest(spins)
    return failed | load(word(team, FAILED))


# The functions below are called from Python, by address: see team.py.


def join(team, program, arguments, crew):
    """See `share`."""
    return share(team, program, arguments, crew)


def run_all(team, program, arguments, crew):
    """`publish` and `share`, unless workers sleep -> how many sleep; below 0 if the program failed."""
    asleep = publish(team, program, arguments, crew)
    if asleep == 0 and share(team, program, arguments, crew) != 0:
        return -1
    return asleep


def alone(team, program, arguments):
    """The program on the caller's thread -> whether it failed."""
    for phase in range(PHASES):
        store(word(team, COUNTERS + phase * LINE), 0)
    return call(program, arguments, team, 0, 1)


def work(team, me, crew, seen):
    """Runs every program after generation `seen` -> the last generation, when there was none for a while or it was stopped."""
    mine = word(team, STATUS + (me - 1) * LINE)
    spins = 0
    while True:
        if load(word(team, GENERATION)) != seen:
            seen += 1
            spins = 0
            if call(load(word(team, PROGRAM)), load(word(team, ARGUMENTS)), team, me, crew) != 0:
                store(word(team, FAILED), 1)
            add(word(team, DONE), 1)
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


def wake(status):
    """Whether this worker slept, and is now to be woken by the caller."""
    if load(status) != PARKED:
        return 0
    return 1 if exchange(status, RUNNING) == PARKED else 0
