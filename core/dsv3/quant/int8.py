"""INT8 weights, symmetric, one float32 scale per output channel; -128 is never used."""

from __future__ import annotations

import torch
from torch import Tensor


def quantize_channel(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight [N, K] -> i8 codes in [-127, 127], f32 scale [N, 1] = max|row| / 127 (1 for an all-zero row)."""
    work = weight.to(torch.float32)
    amax = work.abs().amax(dim=-1, keepdim=True)
    tiny = torch.finfo(torch.float32).tiny
    scale = torch.where(amax > 0, amax / 127, torch.ones_like(amax)).clamp_min(tiny)
    codes = torch.round(work / scale).clamp_(-127, 127).to(torch.int8)
    return codes, scale


def dequantize_channel(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """i8 [.., N, K] times scale [.., N, 1] in float32 (float64 if dtype is), rounded once to dtype."""
    work = torch.float64 if dtype == torch.float64 else torch.float32
    return (weight.to(work) * scale.to(work)).to(dtype)
