"""What one output should be, and the check of what it is."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dsv3.budget.units import half_ulp


@dataclass(frozen=True)
class Finding:
    """Outcome of one check: `Verdict` without the operator's other outputs."""

    margin: float = 0.0
    nmse: float = 0.0
    message: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)


class Expectation(ABC):
    """One output, or a pair that can only be judged together. `reference` and `tolerance` are for export: the value, and
    what it may be off by elementwise (None where the rule is not elementwise)."""

    name: str
    reference: Tensor
    tolerance: Tensor | None = None

    @abstractmethod
    def check(self, outputs: Sequence[Any]) -> Finding:
        """Judge the outputs of the call, of which this one is known by its index."""


def locate(flat: int, shape: Sequence[int]) -> list[int]:
    """The index of a flat position."""
    index = []
    for size in reversed(shape):
        index.append(flat % size)
        flat //= size
    return index[::-1]


def wrong(name: str, index: list[int], expected: Any, found: Any, why: str) -> Finding:
    """An output that no budget covers."""
    where = f"{name}{index}"
    details = {"output": name, "index": index, "expected": _plain(expected), "found": _plain(found)}
    return Finding(math.inf, 0.0, f"{where}: expected {expected}, found {found}: {why}", details)


def _plain(value: Any) -> Any:
    return value if isinstance(value, int | float | str | bool) or value is None else str(value)


def within(name: str, found: Tensor, value: Tensor, tolerance: Tensor, cap: float | None = None) -> Finding:
    """|found - value| <= tolerance for every element; NaN and infinities must agree. value, tolerance float64."""
    seen = found.to(torch.float64)
    error = (seen - value).abs()
    same = (seen == value) | (torch.isnan(seen) & torch.isnan(value))
    overflow = torch.isinf(value.to(found.dtype)) & (seen == value.sign() * math.inf)  # beyond the format's largest
    error = torch.where(same | overflow, torch.zeros_like(error), error)
    # The margin counts what is beyond the half-ulp that rounding to the format costs at best; over 1 says the same either way.
    free = torch.minimum(_nearest_rounding(value, found.dtype), 0.999 * tolerance)
    ratio = (error - free).clamp_min(0) / (tolerance - free)
    ratio = torch.where(error == 0, error, torch.where(torch.isnan(ratio), torch.full_like(ratio, math.inf), ratio))
    if ratio.numel() == 0:
        return Finding()
    worst = int(ratio.argmax())
    margin = float(ratio.flatten()[worst])
    finite = torch.isfinite(value) & torch.isfinite(error)
    power = float((value[finite] ** 2).sum())
    nmse = float((error[finite] ** 2).sum()) / power if power > 0 else 0.0
    at = locate(worst, value.shape)
    expected, was = float(value.flatten()[worst]), float(seen.flatten()[worst])
    details = {
        "output": name, "index": at, "expected": expected, "found": was, "error": float(error.flatten()[worst]),
        "budget": float(tolerance.flatten()[worst]),
    }  # fmt: skip
    if not margin <= 1:
        many = int((ratio > 1).sum())
        text = (
            f"{name}{at}: expected {expected:.9g}, found {was:.9g}, off by {details['error']:.3g} with a budget of "
            f"{details['budget']:.3g} ({many} of {ratio.numel()} elements over theirs)"
        )
        return Finding(margin, nmse, text, details)
    if cap is not None and nmse > cap:
        text = f"{name}: squared error {nmse:.3g} of the squared value; the class allows {cap:.3g}, worst at {at}"
        return Finding(max(margin, nmse / cap), nmse, text, details)
    return Finding(margin, nmse, "", details)


def _nearest_rounding(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Half an ulp of the format at the value."""
    if dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        return torch.zeros_like(value)
    _, exponent = torch.frexp(value)
    finite = torch.where(torch.isfinite(value), exponent, torch.zeros_like(exponent))
    return torch.exp2(finite.to(torch.float64) - 1) * half_ulp(dtype)


@dataclass
class Real(Expectation):
    """A floating-point output within an elementwise budget. skip: elements whose value is unspecified."""

    name: str
    index: int
    reference: Tensor
    tolerance: Tensor
    cap: float | None = None
    skip: Tensor | None = None

    def check(self, outputs: Sequence[Any]) -> Finding:
        found, value, tolerance = outputs[self.index], self.reference, self.tolerance
        if self.skip is not None:
            skip = self.skip.expand(value.shape)
            value = torch.where(skip, torch.zeros_like(value), value)
            found = torch.where(skip, torch.zeros_like(found), found)
        return within(self.name, found, value, tolerance, self.cap)


@dataclass
class Exact(Expectation):
    """An output of which every bit is determined; -0 equals 0 and NaN equals NaN unless `bits`."""

    name: str
    index: int
    reference: Tensor
    bits: bool = False

    def __post_init__(self) -> None:
        self.tolerance = torch.zeros(self.reference.shape, dtype=torch.float64)

    def check(self, outputs: Sequence[Any]) -> Finding:
        return same_values(self.name, outputs[self.index], self.reference, self.bits)


def same_values(name: str, found: Tensor, reference: Tensor, bits: bool = False) -> Finding:
    """Equal element by element."""
    if bits:
        kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[reference.element_size()]
        differs = found.contiguous().view(kind) != reference.contiguous().view(kind)
    elif reference.is_floating_point():
        a, b = found.to(torch.float64), reference.to(torch.float64)
        differs = ~((a == b) | (torch.isnan(a) & torch.isnan(b)))
    else:
        differs = found != reference
    if not bool(differs.any()):
        return Finding()
    first = int(differs.flatten().to(torch.int8).argmax())
    at = locate(first, reference.shape)
    shown = [t.flatten()[first].to(torch.float64 if t.is_floating_point() else torch.int64).item() for t in (reference, found)]
    many = int(differs.sum())
    return wrong(name, at, shown[0], shown[1], f"must be equal; {many} of {differs.numel()} elements differ")


def rounded(value: Tensor, radius: Tensor, dtype: torch.dtype, floor: float) -> Tensor:
    """Tolerance of a value computed within radius and then rounded once to dtype, as large as it then is."""
    return half_ulp(dtype) * (value.abs() + radius) + radius + floor


def combine(findings: Sequence[Finding]) -> Finding:
    """The first failure, with the largest margin and nmse of all; without one, the details of the largest margin."""
    if not findings:
        return Finding()
    margin, nmse = max(f.margin for f in findings), max(f.nmse for f in findings)
    worst = next((f for f in findings if f.message), max(findings, key=lambda f: f.margin))
    return Finding(margin, nmse, worst.message, worst.details)
