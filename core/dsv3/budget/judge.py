"""From a call and its outputs to a verdict."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from dsv3.budget import attention, cache, experts, linear, pointwise  # noqa: F401  they register their rules
from dsv3.budget.expectation import Expectation, combine
from dsv3.budget.rules import RULES
from dsv3.budget.verdict import Verdict
from dsv3.ops import spec
from dsv3.plugin import LatentCache


def rule(op: str) -> str:
    """The budget of an operator in words; u is the half-ulp of the output's format, g the growth of the numerics class."""
    return RULES[spec(op).name].text


def expect(op: str, arguments: Mapping[str, Any], numerics: str = "f32") -> list[Expectation]:
    """What the outputs of a call should be. arguments: by name, on the CPU, weights canonical, the cache as before the call;
    what has a default may be left out."""
    known = spec(op)
    given = {**known.defaults, **arguments}
    known.bind(given)
    with torch.inference_mode():
        return RULES[op].expect(given, numerics)


def judge(
    op: str,
    arguments: Mapping[str, Any],
    outputs: Any,
    *,
    numerics: str = "f32",
    after: LatentCache | None = None,
    expected: list[Expectation] | None = None,
) -> Verdict:
    """Compare what a kernel returned with its budget.

    arguments: as for `expect`. outputs: as returned, on the CPU. numerics: the class that the kernel declares. after: the
    cache after the call, for operators that mutate it. expected: from `expect`, if it is at hand.
    """
    found = outputs if isinstance(outputs, tuple | list) else () if outputs is None else (outputs,)
    if mistake := structure_mistake(op, arguments, outputs):
        return Verdict(math.inf, 0.0, mistake)
    made = expect(op, arguments, numerics) if expected is None else expected
    if after is not None:
        found = (*found, after)
    with torch.inference_mode():
        verdict = combine([e.check(found) for e in made])
    return Verdict(verdict.margin, verdict.nmse, verdict.message, verdict.details)


def structure_mistake(op: str, arguments: Mapping[str, Any], outputs: Any) -> str:
    """What is wrong with the number, types, shapes or dtypes of a call's outputs; "" if nothing is."""
    known = spec(op)
    wanted = known.meta({**known.defaults, **arguments})
    wanted = wanted if isinstance(wanted, tuple) else () if wanted is None else (wanted,)
    found = tuple(outputs) if isinstance(outputs, tuple | list) else () if outputs is None else (outputs,)
    names = [t.path for t in known.line.outputs]
    if len(found) != len(wanted):
        return f"{op} returned {len(found)} outputs; expected {len(wanted)} ({', '.join(names) or 'none'})"
    for name, want, is_ in zip(names, wanted, found, strict=True):
        if not isinstance(is_, torch.Tensor):
            return f"{name}: expected a tensor {list(want.shape)} {_dtype(want)}, found {type(is_).__name__}"
        if is_.shape != want.shape or is_.dtype != want.dtype:
            return f"{name}: expected {list(want.shape)} {_dtype(want)}, found {list(is_.shape)} {_dtype(is_)}"
    return ""


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
