"""Products of INT8 activations and weights: exact sums in int32, then both scales in float32."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dsv3_cpu.facts import features
from dsv3_cpu.programs import Kernel
from dsv3_cpu.views import FIRST, Array, Weight, array

_FLOOR = 1e-10
_grouped_int8, _quantize = Kernel("int8.grouped_int8"), Kernel("int8.quantize")


def quant_int8(x: Tensor, amax_floor: float) -> tuple[Tensor, Tensor]:
    q, scale = torch.empty(x.shape, dtype=torch.int8), torch.empty(x.shape[0], 1)
    values = array(x)
    _quantize(4 * values.nbytes, values, amax_floor, array(q), array(scale))
    return q, scale


def int8_scaled_mm(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, out_dtype: str) -> Tensor:
    y = torch.empty(a.shape[0], b.shape[0])
    _product(y, a, a_scale, array(b), array(b_scale)[:, 0])
    return y.to(getattr(torch, out_dtype))


def rows_into(y: Tensor, x: Tensor, w: Weight, experts: Array, offsets: Array) -> None:
    """Rows offsets[j] to offsets[j + 1] of y [M, N]: those of x [M, K], quantised, by expert experts[j]; both of one dtype."""
    # Rows of no expert are quantised too, and not used: they may be anything.
    q, scale = quant_int8(x, _FLOOR)
    _codes_into(array(y), array(q), array(scale), w.values, w.scales, experts, offsets)


def many_into(y: Tensor, x: Tensor, w: Array, s: Array) -> None:
    """y [T, N] float32 = x [T, K], quantised, by w [N, K] with scales s [N]."""
    q, scale = quant_int8(x.to(torch.float32), _FLOOR)
    out = y if y.is_contiguous() else torch.empty(y.shape)
    _product(out, q, scale, w, s)
    if out is not y:
        y.copy_(out)


def _product(y: Tensor, a: Tensor, a_scale: Tensor, w: Array, s: Array) -> None:
    """y [T, N] float32: by torch where the processor has instructions for it, else by our own loops."""
    t = a.shape[0]
    if t > 1 and "int8_mm" in features():
        sums = torch._int_mm(a.contiguous(), torch.from_numpy(w).t())
        torch.mul(sums.to(torch.float32).mul_(a_scale), torch.from_numpy(np.ascontiguousarray(s)), out=y)
        return
    _codes_into(array(y), array(a), array(a_scale), w[None], s[None], FIRST, np.array([0, t]))


def _codes_into(y: Array, a: Array, a_scale: Array, w: Array, s: Array, experts: Array, offsets: Array) -> None:
    work = (w.nbytes // max(1, w.shape[0])) * max(experts.shape[0], a.shape[0] // 4)
    _grouped_int8(work, w, np.ascontiguousarray(s), experts, offsets, a, a_scale, 16, y)
