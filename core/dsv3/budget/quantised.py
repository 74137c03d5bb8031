"""Codes and their scales, judged together: the scale by its formula, the codes by the scale that came with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dsv3.budget.approx import Approx, fp8_step
from dsv3.budget.expectation import Expectation, Finding, combine, locate, within, wrong
from dsv3.ops.quantize import FP8_MAX
from dsv3.quant.fp8 import decode, power_of_two_at_least

_DIVISION = 2.0**-22  # x / scale, x * (1 / scale), amax / 448 or amax * (1 / 448): all within this


@dataclass
class Quantised(Expectation):
    """q [T, K] and scale [T, ceil(K/group)] of values known within a radius (that of x's own rounding, 0 for an input).

    A code is right if it lies between the roundings of the ends of the interval that its value may be in; where the scale
    is a power of two and the value exact, that is one code, ties included. int8: group 0, one scale per row.
    """

    name: str
    index: int
    value: Approx
    group: int
    encoding: str
    scale_fmt: str = "float32"
    floor: float = 1e-4
    rounding: float = 0.0  # relative rounding of the value before it is quantised, where that is allowed
    skip: Tensor | None = None  # rows [T] that are not judged

    def __post_init__(self) -> None:
        from dsv3.ops import act_quant, quant_int8

        x = self.value.value.to(torch.float32)
        if self.encoding == "int8":
            self.codes, self.reference = quant_int8(x, self.floor)
        else:
            self.codes, self.reference = act_quant(x, self.group, self.encoding, self.scale_fmt, self.floor)
        self.reference = self.reference.to(torch.float64)
        self.tolerance = None if self.scale_fmt == "ue8m0" else _DIVISION * self.reference

    @property
    def largest(self) -> float:
        return 127.0 if self.encoding == "int8" else FP8_MAX[self.encoding]

    def check(self, outputs: Sequence[Any]) -> Finding:
        q, s = outputs[self.index], outputs[self.index + 1].to(torch.float64)
        if q.numel() == 0:
            return Finding()
        radius = (1 + self.rounding) * self.value.radius + self.rounding * self.value.value.abs()
        found = [self._scale(s, radius)]
        if not found[0].message:
            found.append(self._codes(q, s, radius))
        return combine(found)

    def _groups(self, x: Tensor) -> Tensor:
        width = self.group or x.shape[1]
        groups = -(-x.shape[1] // width)
        return torch.nn.functional.pad(x, (0, groups * width - x.shape[1])).view(x.shape[0], groups, width)

    def scale_range(self, radius: Tensor) -> tuple[Tensor, Tensor]:
        """The least and the largest legal scale of each group, values being known within a radius."""
        size = self.value.value.abs()
        low = self._groups((size - radius).clamp_min(0)).amax(dim=-1).clamp_min(self.floor) / self.largest
        high = self._groups(size + radius).amax(dim=-1).clamp_min(self.floor) / self.largest
        low, high = low * (1 - _DIVISION), high * (1 + _DIVISION)
        if self.scale_fmt == "ue8m0":
            # A quotient that is a power of two comes out exactly, divided or multiplied by the reciprocal: 448 = 7 * 2^6.
            plain = self._groups(size).amax(dim=-1).clamp_min(self.floor) / self.largest
            sure = (torch.frexp(plain)[0] == 0.5) & (self._groups(radius).amax(dim=-1) == 0)
            low, high = (power_of_two_at_least(torch.where(sure, plain, end)) for end in (low, high))
        return low, high

    def _scale(self, s: Tensor, radius: Tensor) -> Finding:
        low, high = self.scale_range(radius)
        nan = torch.isnan(self._groups(self.value.value)).any(dim=-1)
        if self.scale_fmt == "ue8m0":
            mantissa, _ = torch.frexp(s)
            odd = (mantissa != 0.5) & ~nan
            if bool(odd.any()):
                at = int(odd.flatten().to(torch.int8).argmax())
                where = locate(at, s.shape)
                return wrong(f"{self.name} scale", where, float(self.reference.flatten()[at]), float(s.flatten()[at]),
                             "a ue8m0 scale is a power of two")  # fmt: skip
        unjudged = nan if self.skip is None else nan | self.skip[:, None]
        if self.scale_fmt == "ue8m0":
            right = (s >= low) & (s <= high) | unjudged
            if bool(right.all()):
                return Finding()
            at = int((~right).flatten().to(torch.int8).argmax())
            why = "the smallest power of two that is at least amax / largest"
            return wrong(f"{self.name} scale", locate(at, s.shape), float(low.flatten()[at]), float(s.flatten()[at]), why)
        middle, half = (low + high) / 2, (high - low) / 2 + torch.finfo(torch.float32).tiny
        found, middle = (torch.where(unjudged, torch.zeros_like(t), t) for t in (s, middle))
        return within(f"{self.name} scale", found, middle, half)

    def _codes(self, q: Tensor, s: Tensor, radius: Tensor) -> Finding:
        codes = decode(q, torch.float64) if q.is_floating_point() else q.to(torch.float64)
        width = self.group or q.shape[1]
        scale = s.repeat_interleave(width, dim=-1)[:, : q.shape[1]]
        divisor = torch.where(scale == 0, torch.ones_like(scale), scale)
        y = self.value.value / divisor
        mantissa, _ = torch.frexp(scale)
        exact = (mantissa == 0.5) & (radius == 0)
        spread = torch.where(exact, torch.zeros_like(y), radius / divisor + _DIVISION * y.abs())
        low, high = self._round(y - spread), self._round(y + spread)
        nan = torch.isnan(y)
        group_nan = torch.isnan(self._groups(self.value.value)).any(dim=-1).repeat_interleave(width, dim=-1)[:, : q.shape[1]]
        right = torch.where(nan, torch.isnan(codes * scale), (codes >= low) & (codes <= high)) | (group_nan & ~nan)
        if self.skip is not None:
            right = right | self.skip[:, None]
        self_error = torch.where(right, (codes * scale - self.value.value).abs(), torch.zeros_like(y))
        finite = torch.isfinite(self_error)
        power = float((self.value.value[finite] ** 2).sum())
        loss = float((self_error[finite] ** 2).sum()) / power if power > 0 else 0.0
        if bool(right.all()):
            return Finding(0.0, 0.0, "", {"quantisation_nmse": loss})
        first = int((~right).flatten().to(torch.int8).argmax())
        at = locate(first, q.shape)
        expected, was = float(self._round(y).flatten()[first]), float(codes.flatten()[first])
        many = int((~right).sum())
        return wrong(f"{self.name}", at, expected, was, f"the code of x / scale = {float(y.flatten()[first]):.9g}; "
                     f"{many} of {q.numel()} codes are wrong")  # fmt: skip

    def _round(self, y: Tensor) -> Tensor:
        y = y.clamp(-self.largest, self.largest)
        if self.encoding == "int8":
            return torch.round(y)
        step = fp8_step(y, self.encoding)
        return (torch.round(y / step) * step).clamp(-self.largest, self.largest)
