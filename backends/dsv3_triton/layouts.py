"""Weights as gfx942 reads them: FP8 as e4m3fnuz. The same bits mean half as much there, so scales are doubled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from dsv3.plugin import Prepared

FNUZ = "fnuz"


def to_fnuz(weight: Prepared) -> Prepared:
    """A canonical FP8 weight, experts or not, as {"weight" e4m3fnuz, "scale" doubled}: every code times its scale is unchanged.

    -0 becomes 0. NaN codes have no equivalent: ValueError says how many there are.
    """
    codes = weight.tensors["weight"]
    if codes.dtype != torch.float8_e4m3fn:
        raise ValueError(f"layout {FNUZ!r} is for float8_e4m3fn weights; this one is {codes.dtype} ({weight.quant})")
    bits = codes.contiguous().view(torch.uint8)
    if not bits.is_meta and (bad := int(((bits & 0x7F) == 0x7F).sum())):
        raise ValueError(f"{bad} of the weight's {bits.numel()} FP8 codes are NaN, which layout {FNUZ!r} cannot hold")
    changed = torch.where(bits == 0x80, torch.zeros_like(bits), bits).view(torch.float8_e4m3fnuz)
    return replace(weight, layout=FNUZ, tensors=_with(weight, changed, 2.0))


def from_fnuz(weight: Prepared) -> Prepared:
    """The inverse of `to_fnuz`, but for -0, which stays 0."""
    codes = weight.tensors["weight"].view(torch.uint8).clone().view(torch.float8_e4m3fn)
    return replace(weight, layout="canonical", tensors=_with(weight, codes, 0.5))


def _with(weight: Prepared, codes: Tensor, factor: float) -> Mapping[str, Tensor]:
    return {**weight.tensors, "weight": codes, "scale": weight.tensors["scale"] * factor}
