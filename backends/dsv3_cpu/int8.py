"""Products of INT8 activations and weights: exact sums in int32, then both scales in float32."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dsv3_cpu.facts import features
from dsv3_cpu.kernels.int8 import grouped_int8, quantize
from dsv3_cpu.views import FIRST, Array, array, made

_FLOOR = 1e-10


def quant_int8(x: Tensor, amax_floor: float) -> tuple[Tensor, Tensor]:
    q, scale = torch.empty(x.shape, dtype=torch.int8), torch.empty(x.shape[0], 1)
    values = array(x)
    quantize(4 * values.nbytes, values, amax_floor, array(q), array(scale))
    return q, scale


def int8_scaled_mm(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, out_dtype: str) -> Tensor:
    y, out = made((a.shape[0], b.shape[0]))
    _product(y, out, a, a_scale, array(b), array(b_scale)[:, 0])
    return y.to(getattr(torch, out_dtype))


def rows_into(y: Array, x: Array, w: Array, s: Array, experts: Array, offsets: Array) -> None:
    """Rows offsets[j] to offsets[j + 1] of y [M, N]: those of x [M, K], quantised, by expert experts[j]; both float32."""
    q, scale = np.empty(x.shape, np.int8), np.empty((x.shape[0], 1), np.float32)
    # Rows of no expert are quantised too, and not used: they may be anything.
    quantize(4 * x.nbytes, x, _FLOOR, q, scale)
    _codes_into(y, q, scale, w, s, experts, offsets)


def many_into(y: Tensor, x: Tensor, w: Array, s: Array) -> None:
    """y [T, N] = x [T, K], quantised, by w [N, K] with scales s [N]."""
    q, scale = quant_int8(x.to(torch.float32), _FLOOR)
    out, sums = made((y.shape[0], y.shape[1]))
    _product(out, sums, q, scale, w, s)
    y.copy_(out)


def _product(y: Tensor, out: Array, a: Tensor, a_scale: Tensor, w: Array, s: Array) -> None:
    """y [T, N] float32, whose array is out: by torch where the processor has instructions for it, else by our own loops."""
    t = a.shape[0]
    if t > 1 and "int8_mm" in features():
        sums = torch._int_mm(a.contiguous(), torch.from_numpy(w).t())
        torch.mul(sums.to(torch.float32).mul_(a_scale), torch.from_numpy(np.ascontiguousarray(s)), out=y)
        return
    _codes_into(out, array(a), array(a_scale), w[None], s[None], FIRST, np.array([0, t]))


def _codes_into(y: Array, a: Array, a_scale: Array, w: Array, s: Array, experts: Array, offsets: Array) -> None:
    work = (w.nbytes // max(1, w.shape[0])) * max(experts.shape[0], a.shape[0] // 4)
    grouped_int8(work, w, s, experts, offsets, a, a_scale, np.empty(y.shape, np.int32), y)
