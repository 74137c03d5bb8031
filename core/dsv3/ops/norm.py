"""RMS normalisation: alone, after a residual addition, before quantisation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dsv3.ops.spec import composite, primitive


def work_dtype(x: Tensor) -> torch.dtype:
    """float64 for float64, else float32: what references compute in."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


@primitive("x[T,D] weight[D] -> y[T,D]")
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """y = x / sqrt(mean(x^2) + eps) * weight over the last dimension.

    x [T, D] (rows may be strided), weight [D] -> y [T, D] in x.dtype. Statistics and the product with the weight in
    float32, one rounding at the end. Source: Zhang and Sennrich 2019, equation 4; the rounding order is DeepSeek-V3.2's.

    Invariants:
    - x = 0 gives 0, whatever eps is above 0
    - scaling the weight by a power of two scales y by it exactly
    - a row depends on no other row
    """
    work = work_dtype(x)
    v = x.to(work)
    v = v * torch.rsqrt(v.square().mean(dim=-1, keepdim=True) + eps)
    return (v * weight.to(work)).to(x.dtype)


@composite("x[T,D] residual[T,D] weight[D] -> y[T,D] residual'[T,D]")
def add_rms_norm(ops: Any, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """residual' = x + residual rounded once to x.dtype; y = rms_norm(residual') from the rounded value.

    Invariants:
    - residual' does not depend on weight or eps
    - y = rms_norm(residual') of the rounded residual', not of the sum before rounding
    """
    # On meta, where this is traced at every start, torch's addition would import its compiler.
    total = x if x.is_meta else x.to(work_dtype(x), copy=True).add_(residual).to(x.dtype)
    return ops.rms_norm(x=total, weight=weight, eps=eps), total


@composite("x[T,D] weight[D] -> q[T,D]:dtype scale[T,ceil(D/group)]:F32")
def rms_norm_quant(
    ops: Any, x: Tensor, weight: Tensor, eps: float, group: int, dtype: str, scale_fmt: str
) -> tuple[Tensor, Tensor]:
    """act_quant(rms_norm(x)). A building block for backends: no decomposition of version 1 calls it.

    Invariants:
    - equal to its two parts called one after the other
    """
    y = ops.rms_norm(x=x, weight=weight, eps=eps)
    return ops.act_quant(x=y, group=group, dtype=dtype, scale_fmt=scale_fmt, amax_floor=1e-4)
