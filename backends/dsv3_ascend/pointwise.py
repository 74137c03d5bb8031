"""Norms, the gated activation, rotary positions, quantisation of activations."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv3_ascend import vendor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """In float32, and rounded once here: in bfloat16 the vendor rounds before it multiplies with the weight."""
    if x.shape[0] == 0:
        return torch.empty_like(x)
    work = x.to(torch.float32).contiguous()
    return vendor.of(x).rms_norm(work, weight.to(torch.float32), eps).to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """float32 only: whether the vendor's norm in bfloat16 sees the sum before or after rounding is not said."""
    if x.shape[0] == 0:
        return torch.empty_like(x), torch.empty_like(x)
    return vendor.of(x).add_rms_norm(x.contiguous(), residual.contiguous(), weight.to(x.dtype), eps)


def silu_mul(x: Tensor) -> Tensor:
    if x.shape[0] == 0:
        return x.new_empty(0, x.shape[1] // 2)
    return vendor.of(x).swiglu(x.contiguous())


def apply_rope(x: Tensor, positions: Tensor, cos_sin: Tensor, interleaved: bool = True) -> Tensor:
    """In float32: the tables are, and the vendor wants one dtype."""
    if x.numel() == 0:
        return torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows = cos_sin.index_select(0, positions.to(torch.int64)).to(torch.float32)
    cos, sin = (_spread(half, interleaved)[None, :, None] for half in rows.chunk(2, dim=-1))
    work = x.to(torch.float32).contiguous()[None]
    return vendor.of(x).rotary_mul(work, cos, sin, interleaved)[0].to(x.dtype)


def _spread(half: Tensor, interleaved: bool) -> Tensor:
    """One number per pair [T, P/2] -> one per element [T, P]."""
    return half.repeat_interleave(2, dim=-1) if interleaved else torch.cat((half, half), dim=-1)


def quant_int8(x: Tensor, amax_floor: float = 1e-10) -> tuple[Tensor, Tensor]:
    if x.numel() == 0:
        scale = torch.full((x.shape[0], 1), amax_floor / 127, dtype=torch.float32, device=x.device)
        return torch.empty(x.shape, dtype=torch.int8, device=x.device), scale
    q, scale = quantised(x, amax_floor)
    return q, scale[:, None]


def quantised(x: Tensor, amax_floor: float = 1e-10) -> tuple[Tensor, Tensor]:
    """x bf16 [T, K] -> i8 [T, K], f32 [T]. The vendor knows no floor: rows below it are quantised here."""
    q, scale = vendor.of(x).dynamic_quant(x.contiguous())
    least = torch.full((), amax_floor, dtype=torch.float32, device=x.device) / 127
    low = scale < least
    small = torch.round(x.to(torch.float32) / torch.where(least > 0, least, 1)).clamp(-127, 127).to(torch.int8)
    return torch.where(low[:, None], small, q), torch.where(low, least, scale)
