"""Weights as gfx942 reads them: FP8 as e4m3fnuz. The same bits mean half as much there, so scales are doubled."""

from __future__ import annotations

from dataclasses import replace

import torch

from dsv3.ops import fn_to_fnuz
from dsv3.plugin import Prepared

FNUZ = "fnuz"


def to_fnuz(weight: Prepared) -> Prepared:
    """A canonical FP8 weight, experts or not, as {"weight" e4m3fnuz, "scale" doubled}: every code times its scale is unchanged.

    -0 becomes 0. NaN codes have no equivalent: the error says how many there are.
    """
    codes, scale = fn_to_fnuz(weight=weight.tensors["weight"], scale=weight.tensors["scale"])
    return replace(weight, layout=FNUZ, tensors={**weight.tensors, "weight": codes, "scale": scale})


def from_fnuz(weight: Prepared) -> Prepared:
    """The inverse of `to_fnuz`, but for -0, which stays 0."""
    codes = weight.tensors["weight"].view(torch.uint8).clone().view(torch.float8_e4m3fn)
    return replace(
        weight, layout="canonical", tensors={**weight.tensors, "weight": codes, "scale": weight.tensors["scale"] * 0.5}
    )
