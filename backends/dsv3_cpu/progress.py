"""Says why the first start takes a while: kernels are being compiled for this processor."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

_PATIENCE = 1.0  # seconds of compiling before a word about it
_spent = 0.0
_said = False


@contextmanager
def compiling(name: str) -> Iterator[None]:
    """Counts the time; on a terminal or not, one line on stderr once it is more than a moment."""
    global _spent, _said
    started = time.perf_counter()
    try:
        yield
    finally:
        _spent += time.perf_counter() - started
        if _spent > _PATIENCE and not _said:
            _said = True
            print(
                "dsv3: compiling kernels for this processor, once (they are kept for later starts) ..",
                file=sys.stderr,
                flush=True,
            )
