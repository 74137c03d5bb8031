"""Numbers that kernels and their callers agree on, for callers who do not want what compiles kernels."""

from __future__ import annotations

# A team's memory is int64 words, eight to a cache line, so that no two words that different threads write share one.
LINE = 8  # words
LINE_BYTES = 8 * LINE
GENERATION, PROGRAM, ARGUMENTS, ARRIVED, PASSED, DONE, FAILED = (n * LINE for n in range(7))
STATUS = 7 * LINE  # of the first worker; RUNNING, PARKED or STOPPED
MOST_WORKERS = 255
COUNTERS = STATUS + (MOST_WORKERS + 1) * LINE
PHASES = 12
WORDS = COUNTERS + PHASES * LINE
RUNNING, PARKED, STOPPED = 0, 1, 2

GROUP = 128  # numbers under one scale
# Rows of activations for products in whole numbers: dtype, numbers of a block and of what a row has for it at its end, of INT8
# and of INT4 weights. See kernels/whole.py.
WHOLE = {"int8": ("i2", GROUP, 2), "int4": ("i1", 2 * GROUP, 8)}

# Of the router: how logits become scores, and how a group's score is made.
SIGMOID, SOFTMAX = 0, 1
TOP2_SUM, MAX = 0, 1

PART = 64  # keys of the first part of absorbed attention's
HEADS = 16  # that absorbed attention takes over the same keys together, at most
CHUNK = 4096  # tokens of the vocabulary that one thread takes at a time in sampling


def edge(part: int, each: int) -> int:
    """The place of the first key of a part in absorbed attention: 0, 64, 128, 256 and so on, twice as far each time, from
    `each` on, a power of two, as far again, and a 16th to a 32nd of the way where that is more. So few keys are split too,
    very many are not in too many parts, and what is in a part does not depend on how many follow.
    """
    at, width = 0, PART
    for _ in range(part):
        at += width
        if width < each:
            width = min(at, each)
        elif at >= 32 * width:
            width *= 2
    return at
