"""Norms, the gated activation, rotation."""

from __future__ import annotations

from torch import Tensor

from dsv3_cpu.kernels import pointwise as kernels
from dsv3_cpu.views import array, indices, kept, made

# How much more work a number is than the bytes it takes, where an activation or a rotation is computed.
ACTIVATION = 8


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    y, out = made(tuple(x.shape), x.dtype)
    values = array(x)
    kernels.rms_norm(values.nbytes, values, kept(weight), eps, out)
    return y


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    y, out = made(tuple(x.shape), x.dtype)
    total, sums = made(tuple(x.shape), x.dtype)
    values = array(x)
    kernels.add_rms_norm(values.nbytes, values, array(residual), kept(weight), eps, out, sums)
    return y, total


def silu_mul(x: Tensor) -> Tensor:
    y, out = made((x.shape[0], x.shape[1] // 2), x.dtype)
    values = array(x)
    kernels.silu_mul(ACTIVATION * values.nbytes, values, out)
    return y


def apply_rope(x: Tensor, positions: Tensor, cos_sin: Tensor, interleaved: bool) -> Tensor:
    y, out = made(tuple(x.shape), x.dtype)
    values = array(x)
    kernels.rope(ACTIVATION * values.nbytes, values, indices(positions), kept(cos_sin), interleaved, out)
    return y
