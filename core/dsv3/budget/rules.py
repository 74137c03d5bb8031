"""The budget of every operator: a sentence for people, and a function from a call to what its outputs should be."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dsv3.budget.approx import Approx
from dsv3.budget.expectation import Expectation, Real, rounded
from dsv3.budget.units import nmse_cap, tiny
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
         spread: Tensor | None = None, squares: Tensor | None = None) -> Real:  # fmt: skip
    """A rounded output. spread and squares: sums of the magnitudes and of the squares of its terms; with them there is a cap on
    the squared error."""
    tolerance = rounded(made.value, made.radius, dtype, tiny(dtype))
    if numerics == "exact" and dtype != torch.float64:  # nothing but the output's own rounding
        tolerance = rounded(made.value, torch.zeros_like(made.radius), dtype, tiny(dtype))
    cap = None if spread is None or squares is None else _cap(made, spread, squares, nmse_cap(numerics, dtype))
    return Real(name, index, made.value, tolerance, cap, skip)


def _cap(made: Approx, spread: Tensor, squares: Tensor, plain: float) -> float | None:
    """The cap of a class, where the data do not cancel (relative errors of the whole say nothing there). A few outputs may be
    small by chance beside the root of the squares of their terms, which is what errors go by, and their squared error scatters
    by sqrt(2 / n), of which four are allowed. Codes that fall to their neighbour at a tie add their own share."""

    def total(t: Tensor) -> float:
        return float(torch.where(torch.isfinite(t), t, torch.zeros_like(t)).sum())

    power = total(made.value.square())
    if power == 0 or power < 1e-3 * total(spread.square()):
        return None
    scatter = 1 + 4 * (2 / made.value.numel()) ** 0.5
    return plain * scatter * max(1.0, total(squares) / power) + FACTOR * total(made.loose.square()) / power


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
