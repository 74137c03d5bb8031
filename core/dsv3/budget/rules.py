"""The budget of every operator: a sentence for people, and a function from a call to what its outputs should be."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dsv3.budget.approx import Approx
from dsv3.budget.expectation import Expectation, Real, rounded
from dsv3.budget.units import half_ulp, nmse_cap, tiny
from dsv3.ops import spec

Arguments = Mapping[str, Any]
Expect = Callable[[Arguments, str], list[Expectation]]
FACTOR = 4.0  # a composite taken whole may err this many times what its own decomposition errs


@dataclass(frozen=True)
class Rule:
    """text: for the documentation. expect: (arguments, numerics class) -> expectations, one or more per output."""

    text: str
    expect: Expect


RULES: dict[str, Rule] = {}


def rule(*ops: str, text: str) -> Callable[[Expect], Expect]:
    """Register the decorated function as the budget of operators."""

    def register(expect: Expect) -> Expect:
        for op in ops:
            spec(op)
            RULES[op] = Rule(text, expect)
        return expect

    return register


def real(name: str, index: int, made: Approx, dtype: torch.dtype, numerics: str, skip: Tensor | None = None,
         spread: Tensor | None = None) -> Real:  # fmt: skip
    """A rounded output. spread: sum of magnitudes where data may cancel, so that the squared-error cap is left out there."""
    tolerance = rounded(made.value, made.radius, dtype, tiny(dtype))
    if numerics == "exact" and dtype != torch.float64:  # nothing but the output's own rounding
        tolerance = rounded(made.value, torch.zeros_like(made.radius), dtype, tiny(dtype))
    cap = nmse_cap(numerics, dtype) if spread is not None and not _cancels(made.value, spread) else None
    return Real(name, index, made.value, tolerance, cap, skip)


def _cancels(value: Tensor, spread: Tensor) -> bool:
    """Whether sums are far smaller than their terms: relative errors of the whole then say nothing."""
    finite = torch.isfinite(value) & torch.isfinite(spread)
    power, terms = float(value[finite].square().sum()), float(spread[finite].square().sum())
    return power < 1e-3 * terms


def against_decomposition(
    op: str, arguments: Arguments, expectations: list[Expectation], numerics: str, always: bool
) -> list[Expectation]:
    """Widen real outputs to FACTOR times the largest error per row of the decomposition in torch at the same dtypes: always,
    or only where the decomposition itself is outside the budget of a single operator."""
    if numerics == "exact":
        return expectations
    outputs = _decomposed(op, arguments)
    for e in expectations:
        if not isinstance(e, Real) or e.index >= len(outputs) or e.reference.numel() == 0:
            continue
        error = (outputs[e.index].to(torch.float64) - e.reference).abs()
        error = torch.where(torch.isfinite(error), error, torch.zeros_like(error))
        if e.skip is not None:
            error = torch.where(e.skip.expand(error.shape), torch.zeros_like(error), error)
        if not always and bool((error <= e.tolerance).all()):
            continue
        e.tolerance = torch.maximum(e.tolerance, FACTOR * error.amax(dim=-1, keepdim=True))
        if e.cap is not None:
            power = float(e.reference[torch.isfinite(e.reference)].square().sum())
            e.cap = max(e.cap, FACTOR**2 * float(error.square().sum()) / power if power > 0 else 0.0)
    return expectations


def _decomposed(op: str, arguments: Arguments) -> tuple[Any, ...]:
    """Outputs of the decomposition over the references; a mutated cache is a copy's."""
    from dsv3.budget.tensors import clone_cache

    given = {k: clone_cache(v) if k in spec(op).mutates else v for k, v in arguments.items()}
    outputs = spec(op).reference(**given)
    return outputs if isinstance(outputs, tuple) else (outputs,)


def activation_ulp(dtype: torch.dtype) -> float:
    """Relative rounding of an intermediate kept in 16 bits; 0 where it is kept in what is computed in."""
    return half_ulp(dtype) if dtype in (torch.bfloat16, torch.float16) else 0.0
