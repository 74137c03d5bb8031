"""INT4 rounding whose errors cancel on a text: each column's error is made up for by the columns that are not rounded yet.

Source: Frantar et al. 2022, "GPTQ", equations 2 and 3, with the Cholesky form of section 3.3; blocks of columns are the groups
that share a scale.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from dsv3.checkpoint.calibrate.visitor import Visitor
from dsv3.quant.int4 import GROUP, dequantize_group, pack

_DAMP = 0.01  # of the Hessian's mean diagonal
_SHRINK = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)  # of a group's range: small numbers gain more than the largest lose


class Compensate(Visitor):
    """Rounds every linear. given(name, codes u8 [N, ceil(K/2)], scale f32 [N, ceil(K/128)]) is called for each."""

    def __init__(self, given: Callable[[str, Tensor, Tensor], None]) -> None:
        self._given = given

    def round(self, weights: Mapping[str, Tensor], inputs: Tensor, counts: Tensor | None = None) -> Mapping[str, Tensor]:
        inverse = inverse_factor(hessian(inputs, counts))
        rounded = {}
        for name, weight in weights.items():
            codes, scale = compensated(weight, inverse)
            self._given(name, codes, scale)
            rounded[name] = dequantize_group(codes, scale, weight.shape[1], torch.float32)
        return rounded


def hessian(inputs: Tensor, counts: Tensor | None) -> Tensor:
    """X^T X over rows of the inputs [T, K], weighed by counts [T], float64 [K, K]; damped, so that it can be inverted."""
    k = inputs.shape[1]
    total = torch.zeros(k, k, dtype=torch.float64)
    for at in range(0, inputs.shape[0], 1024):
        x = inputs[at : at + 1024].to(torch.float64)
        weighed = x if counts is None else x * counts[at : at + 1024, None]
        total.addmm_(weighed.T, x)
    mean = total.diagonal().mean()
    total.diagonal().add_(_DAMP * mean if mean > 0 else 1.0)
    return total


def inverse_factor(h: Tensor) -> Tensor:
    """The upper Cholesky factor of the inverse of h [K, K], float32."""
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(h))
    return torch.linalg.cholesky(inverse, upper=True).to(torch.float32)


def compensated(weight: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    """weight f32 [N, K], the factor of its inputs' Hessian [K, K] -> packed u8 [N, ceil(K/2)], scale f32 [N, ceil(K/128)]."""
    n, k = weight.shape
    left = weight.clone()
    codes = torch.empty(n, k, dtype=torch.int8)
    scales = torch.empty(n, -(-k // GROUP))
    for group, start in enumerate(range(0, k, GROUP)):
        stop = min(start + GROUP, k)
        block, factor = left[:, start:stop], inverse[start:stop, start:stop]
        scale = group_scale(block, factor.diagonal() ** -2)
        errors = torch.empty_like(block)
        for j in range(stop - start):
            column = block[:, j]
            q = torch.round(column / scale).clamp_(-8, 7)
            errors[:, j] = (column - q * scale) / factor[j, j]
            block[:, j + 1 :] -= errors[:, j, None] * factor[j, j + 1 :]
            codes[:, start + j] = q
        left[:, stop:] -= errors @ inverse[start:stop, stop:]
        scales[:, group] = scale
    return pack(codes), scales


def group_scale(block: Tensor, importance: Tensor) -> Tensor:
    """The scale [N] of a group of columns [N, g], out of a few, with the least squared error; importance [g] of the columns."""
    tiny = torch.finfo(torch.float32).tiny
    amax = block.abs().amax(dim=1)
    widest = torch.where(amax > 0, amax / 7, torch.ones_like(amax)).clamp_min(tiny)
    best, least = widest, torch.full_like(widest, torch.inf)
    for shrink in _SHRINK:
        scale = (widest * shrink).clamp_min(tiny)
        error = block - torch.round(block / scale[:, None]).clamp_(-8, 7) * scale[:, None]
        cost = error.square_() @ importance
        best = torch.where(cost < least, scale, best)
        least = torch.minimum(cost, least)
    return best
