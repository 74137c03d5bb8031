"""Norms, the gated activation, rotation."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv3_cpu.kernels import pointwise as kernels
from dsv3_cpu.views import array, indices, kept

# How much more work a number is than the bytes it takes, where an activation or a rotation is computed.
ACTIVATION = 8


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    y = torch.empty(x.shape, dtype=x.dtype)
    values = array(x)
    kernels.rms_norm(values.nbytes, values, kept(weight), eps, array(y))
    return y


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    y, total = torch.empty(x.shape, dtype=x.dtype), torch.empty(x.shape, dtype=x.dtype)
    values = array(x)
    kernels.add_rms_norm(values.nbytes, values, array(residual), kept(weight), eps, array(y), array(total))
    return y, total


def silu_mul(x: Tensor) -> Tensor:
    y = torch.empty(x.shape[0], x.shape[1] // 2, dtype=x.dtype)
    values = array(x)
    kernels.silu_mul(ACTIVATION * values.nbytes, values, array(y))
    return y


def apply_rope(x: Tensor, positions: Tensor, cos_sin: Tensor, interleaved: bool) -> Tensor:
    y = torch.empty(x.shape, dtype=x.dtype)
    values = array(x)
    kernels.rope(ACTIVATION * values.nbytes, values, indices(positions), kept(cos_sin), interleaved, array(y))
    return y
