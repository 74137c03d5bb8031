"""Expectations as plain tensors: a value and an absolute tolerance per element, for those who compare without this package."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dsv3.budget.cache import CacheRows
from dsv3.budget.expectation import Exact, Expectation, Real
from dsv3.budget.quantised import Quantised
from dsv3.budget.routing import Routing, Sampled
from dsv3.budget.tensors import clone_cache
from dsv3.budget.units import half_ulp, tiny
from dsv3.ops import spec
from dsv3.plugin import LatentCache
from dsv3.quant.fp8 import BLOCK, decode

Pair = tuple[Tensor, Tensor | None]


def elementwise(op: str, arguments: Mapping[str, Any], expected: list[Expectation]) -> tuple[list[Pair], float | None]:
    """(value, tolerance or None for exact) of every output, then of the planes of a mutated cache; and the cap on the squared
    error, where all outputs have one. What depends on another output is stated for the expected one."""
    known = spec(op)
    found: dict[int, Pair] = {}
    planes: list[Pair] = []
    caps = []
    for e in expected:
        if isinstance(e, Real):
            tolerance = e.tolerance
            if e.skip is not None:
                tolerance = torch.where(e.skip.expand(tolerance.shape), torch.full_like(tolerance, math.inf), tolerance)
            found[e.index] = (e.reference, tolerance)
            caps.append(e.cap)
        elif isinstance(e, Exact):
            found[e.index] = (e.reference, None)
        elif isinstance(e, Quantised):
            found[e.index], found[e.index + 1] = _quantised(e)
        elif isinstance(e, Routing):
            found[0], found[1] = _routing(e)
        elif isinstance(e, Sampled):
            found[0] = (e.reference.to(torch.int32), None)
        elif isinstance(e, CacheRows):
            planes = _planes(op, arguments, e)
        else:  # y of add_rms_norm
            found[0] = (e.reference, e.tolerance)
    assert len(found) == len(known.line.outputs), op
    cap = min((c for c in caps if c is not None), default=None) if all(c is not None for c in caps) else None
    return [*(found[i] for i in sorted(found)), *planes], cap


def _quantised(e: Quantised) -> tuple[Pair, Pair]:
    """Codes with the distance to the farther code that is legal for the expected scale."""
    radius = (1 + e.rounding) * e.value.radius + e.rounding * e.value.value.abs()
    width = e.group or max(e.value.value.shape[1], 1)
    scale = e.reference.repeat_interleave(width, dim=-1)[:, : e.codes.shape[1]]
    divisor = torch.where(scale == 0, torch.ones_like(scale), scale)
    y, spread = e.value.value / divisor, radius / divisor + 2.0**-22 * (e.value.value / divisor).abs()
    exact = (torch.frexp(scale)[0] == 0.5) & (radius == 0)
    spread = torch.where(exact, torch.zeros_like(spread), spread)
    code = decode(e.codes, torch.float64) if e.codes.is_floating_point() else e.codes.to(torch.float64)
    if not e.codes.numel():
        return (e.codes, torch.zeros_like(code)), (e.reference, torch.zeros_like(e.reference))
    least, most = e.scale_range(radius)
    ratios = [(e.reference / end).repeat_interleave(width, dim=-1)[:, : y.shape[1]] for end in (least, most)]
    moved = [y * ratio for ratio in ratios]
    spread = spread * ratios[0]
    if bool((radius == 0).all()):
        moved = [y, y]  # what the division costs is in the spread
    ends = [e._round(torch.minimum(*moved) - spread), e._round(torch.maximum(*moved) + spread)]
    allowed = torch.maximum(*((end - code).abs() for end in ends)).nan_to_num(math.inf)
    return (e.codes, allowed), (e.reference, torch.maximum(most - e.reference, e.reference - least).clamp_min(0))


def _routing(e: Routing) -> tuple[Pair, Pair]:
    """Rows with another legal choice are not compared."""
    rows = e.near_ties()[:, None].expand(e.ids.shape) if e.ids.shape[0] else torch.zeros(e.ids.shape, dtype=torch.bool)
    assert e.tolerance is not None
    free = torch.where(rows, torch.full_like(e.tolerance, math.inf), e.tolerance)
    return (e.reference, free), (e.ids, torch.where(rows, math.inf, 0.0).to(torch.float64))


def _planes(op: str, arguments: Mapping[str, Any], e: CacheRows) -> list[Pair]:
    """The planes of the cache after the call: the reference's, exact outside the named slots."""
    given = {**spec(op).defaults, **arguments, "cache": clone_cache(arguments["cache"])}
    spec(op).reference(**given)
    after: LatentCache = given["cache"]
    keep = e.slots >= 0
    slots = e.slots.to(torch.int64)[keep]
    page = after.ckv.shape[1]
    at = (slots // page, slots % page)
    kpe = _plane(after.kpe, at, e.kpe.rows(keep), e.exact_kpe, e.rounding, None if e.extra is None else e.extra[1][keep])
    if after.scale is None:
        latent = _plane(after.ckv, at, e.ckv.rows(keep), e.exact_ckv, e.rounding, None if e.extra is None else e.extra[0][keep])
        return [latent, kpe]
    rows = e.ckv.rows(keep)
    if e.extra is not None:
        rows.radius = rows.radius + e.extra[0][keep]
    encoding = str(after.ckv.dtype).removeprefix("torch.")
    codes, scales = _quantised(Quantised("ckv", 0, rows, BLOCK, encoding, rounding=e.rounding))
    allowed = torch.zeros(after.ckv.shape, dtype=torch.float64)
    plane = after.ckv.view(torch.uint8).clone()
    plane[at] = codes[0].view(torch.uint8)
    assert codes[1] is not None and scales[1] is not None
    allowed[at] = codes[1]
    scale, free = after.scale.to(torch.float64), torch.zeros(after.scale.shape, dtype=torch.float64)
    scale[at], free[at] = scales[0], scales[1]
    return [(plane.view(after.ckv.dtype), allowed), kpe, (scale, free)]


def _plane(plane: Tensor, at: tuple[Tensor, Tensor], rows: Any, exact: bool, rounding: float, extra: Tensor | None) -> Pair:
    value, allowed = plane.to(torch.float64), torch.zeros(plane.shape, dtype=torch.float64)
    if exact:
        return value, allowed
    value[at] = rows.value
    unit = half_ulp(plane.dtype) + rounding
    tolerance = unit * rows.value.abs() + (1 + unit) * rows.radius + tiny(plane.dtype)
    allowed[at] = tolerance if extra is None else torch.maximum(tolerance, extra.expand(tolerance.shape))
    return value, allowed
