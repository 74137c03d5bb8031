"""numba's decorators as this backend uses them, and the cache on disk."""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
from numba.core import config as _config

from dsv3_cpu.parts import Part

# Sums may be reordered and products contracted; NaN, infinity and -0 keep their meaning.
_SUMS = frozenset({"reassoc", "contract", "arcp"})
# numba makes its settings when it is imported; their types are not known before.
config: Any = _config
_OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy", "boundscheck": False}
# Of functions that only kernels call: what Python would need to call them takes longer to compile than they do.
_INNER: dict[str, Any] = {**_OPTIONS, "no_cpython_wrapper": True, "no_cfunc_wrapper": True, "pipeline_class": Part}


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


def cached(decorate: Callable[..., Any], **options: Any) -> Any:
    """decorate(cache=..), with the cache at `cache_folder`: numba reads its setting while it decorates."""
    folder, before = cache_folder(), config.CACHE_DIR
    if folder is None:
        return decorate(cache=False, **options)
    config.CACHE_DIR = str(folder)
    try:
        return decorate(cache=True, **options)
    finally:
        config.CACHE_DIR = before


def inner(function: Callable[..., Any]) -> Any:
    """A function that kernels call, with sums in any order."""
    return numba.njit(fastmath=set(_SUMS), **_INNER)(function)


def strict(function: Callable[..., Any]) -> Any:
    """A function that kernels call, whose order of operations is kept."""
    return numba.njit(fastmath={"contract"}, **_INNER)(function)


def called(*signatures: str) -> Callable[[Callable[..., Any]], Any]:
    """A function that Python calls, of exactly these types."""
    return lambda function: cached(lambda cache: numba.njit(list(signatures), cache=cache, **_OPTIONS)(function))


def overloads(stub: Callable[..., Any]) -> Callable[[Callable[..., Any]], Any]:
    """numba's `overload`, with sums in any order: the decorated function gets types, and returns what is compiled for them."""
    from numba.extending import overload

    options = {**_INNER, "fastmath": set(_SUMS)}
    decorate: Any = overload
    return decorate(stub, jit_options=options, inline="never")
