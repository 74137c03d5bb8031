"""Says why the first start takes a while: kernels are being compiled for this processor."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from dsv3_cpu import ahead

# Seconds after which it is worth a line: a single small kernel takes less, once numba is there.
_PATIENCE = 0.25
_TEXT = "dsv3: compiling kernels for this processor, once; they are kept for later starts\n"
_said = False


def _slow() -> None:
    global _said
    ahead.start()
    if not _said:
        _said = True
        sys.stderr.write(_TEXT)
        sys.stderr.flush()


@contextmanager
def compiling() -> Iterator[None]:
    """While a program is compiled: if that takes a while, helpers are started, and a line on stderr says why."""
    if _said:
        yield
        return
    watch = threading.Timer(_PATIENCE, _slow)
    watch.daemon = True
    watch.start()
    try:
        yield
    finally:
        watch.cancel()
