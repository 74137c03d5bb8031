"""numba's decorators as the kernels use them: compiled on the first call, kept in the user's cache, as parallel as torch is.

A kernel is compiled without threads where torch has one, else with them; little work gets one all the same, because waking the
others would take longer. Work is split over outputs only, so that results do not depend on how many there are.
"""

from __future__ import annotations

import functools
import hashlib
import os
import threading
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import torch
from numba.core import config as _config

# Sums may be reordered and products contracted; NaN, infinity and -0 keep their meaning.
_SUMS = frozenset({"reassoc", "contract", "arcp"})
# numba makes its settings when it is imported; their types are not known before.
config: Any = _config
_OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy", "boundscheck": False}
# Bytes read, or their equivalent in arithmetic, from which threads pay.
_WORTH_THREADS = 1 << 20


@functools.cache
def cache_folder() -> Path | None:
    """Where compiled kernels are kept: NUMBA_CACHE_DIR, else dsv3/numba in the user's cache, by the hash of this package's
    sources (numba itself does not see that a function which a kernel calls has changed). None if it cannot be written."""
    if chosen := os.environ.get("NUMBA_CACHE_DIR"):
        root = Path(chosen)
    else:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dsv3" / "numba"
    sources = sorted(Path(__file__).parent.rglob("*.py"))
    digest = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:16]
    folder = root / f"dsv3-cpu-{digest}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return folder if os.access(folder, os.W_OK) else None


def _compiled(function: Callable[..., Any], **options: Any) -> Any:
    """Decorated, with the cache at `cache_folder`: numba reads its setting while it decorates."""
    folder, before = cache_folder(), config.CACHE_DIR
    if folder is None:
        return numba.njit(**_OPTIONS, **options)(function)
    config.CACHE_DIR = str(folder)
    try:
        return numba.njit(cache=True, **_OPTIONS, **options)(function)
    finally:
        config.CACHE_DIR = before


def inner(function: Callable[..., Any]) -> Any:
    """A function that kernels call, with sums in any order."""
    return _compiled(function, fastmath=set(_SUMS))


def strict(function: Callable[..., Any]) -> Any:
    """A function that kernels call, whose order of operations is kept."""
    return _compiled(function, fastmath={"contract"})


def overloads(stub: Callable[..., Any]) -> Callable[[Callable[..., Any]], Any]:
    """numba's `overload`, with sums in any order: the decorated function gets types, and returns what is compiled for them."""
    from numba.extending import overload

    options = {**_OPTIONS, "fastmath": set(_SUMS)}
    decorate: Any = overload
    return decorate(stub, jit_options=options, inline="never")


class Launch:
    """A kernel. Called with how much work it is (bytes that it reads, about) and its arguments."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    @functools.cached_property
    def _serial(self) -> Any:
        return _compiled(self._named("serial"), fastmath=set(_SUMS))

    @functools.cached_property
    def _parallel(self) -> Any:
        return _compiled(self._named("parallel"), fastmath=set(_SUMS), parallel=True)

    def _named(self, suffix: str) -> Callable[..., Any]:
        """The function under a name of its own, by which numba's cache tells the two apart."""
        f = self._function
        made = types.FunctionType(f.__code__, f.__globals__, f"{f.__name__}_{suffix}", f.__defaults__, f.__closure__)
        made.__qualname__ = f"{f.__qualname__}_{suffix}"
        made.__module__ = f.__module__
        return made

    def __call__(self, work: int, *arguments: Any) -> Any:
        threads = torch.get_num_threads()
        if threads == 1:
            return self._serial(*arguments)
        before = numba.get_num_threads()
        numba.set_num_threads(min(threads, config.NUMBA_NUM_THREADS) if work >= _WORTH_THREADS else 1)
        try:
            with _one_at_a_time:
                return self._parallel(*arguments)
        finally:
            numba.set_num_threads(before)


# One of numba's threading layers breaks when two threads of Python enter it at once.
_one_at_a_time = threading.Lock()


def kernel(function: Callable[..., Any]) -> Launch:
    """The decorated function of arrays, with `prange` over its outputs, as a kernel."""
    return Launch(function)
