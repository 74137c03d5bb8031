"""How a continuation is asked for, checked. No torch: the command line checks before it loads anything."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from dsv3.errors import UsageError

MAX_BATCH = 32  # sequences generated together


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. temperature 0 is greedy; the noise depends on seed and position only."""

    max_new_tokens: int
    temperature: float
    top_p: float
    stop: tuple[str, ...]
    ignore_eos: bool


def check_options(
    *,
    max_new_tokens: Any = 200,
    temperature: Any = 0.0,
    top_p: Any = 1.0,
    seed: Any = None,
    stop: Any = (),
    ignore_eos: Any = False,
    draft: Any = None,
) -> Sampling:
    """The options of `Model.generate`; UsageError names the one that is wrong."""
    if not is_integer(max_new_tokens) or max_new_tokens < 0:
        raise UsageError(f"max_new_tokens is {max_new_tokens!r}; expected a non-negative integer")
    if not (isinstance(temperature, int | float) and math.isfinite(temperature) and temperature >= 0):
        raise UsageError(f"temperature is {temperature!r}; expected a finite number of at least 0")
    if not (isinstance(top_p, int | float) and 0 < top_p <= 1):
        raise UsageError(f"top_p is {top_p!r}; expected a number above 0 and at most 1")
    if seed is not None and not is_integer(seed):
        raise UsageError(f"seed is {seed!r}; expected an integer")
    if draft not in (None, "mtp"):
        raise UsageError(f"draft is {draft!r}; expected 'mtp' or nothing")
    stops = (stop,) if isinstance(stop, str) else tuple(stop) if isinstance(stop, Iterable) else (None,)
    if not all(isinstance(s, str) and s for s in stops):
        raise UsageError(f"stop is {stop!r}; expected strings that are not empty")
    return Sampling(int(max_new_tokens), float(temperature), float(top_p), stops, bool(ignore_eos))


def is_integer(value: Any) -> bool:
    """An integer of Python, NumPy or torch (a tensor without dimensions); a bool is none."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        return False
    shape = getattr(value, "shape", ())
    try:
        value.__index__()
    except TypeError:  # a float or bool tensor
        return False
    return len(shape) == 0 and "bool" not in str(getattr(value, "dtype", ""))
