"""The kernels. Each takes its operator's arguments by keyword (see `dsv3 explain OP`) and returns fresh tensors."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """y = x / sqrt(mean(x^2) + eps) * weight. x [T, D], weight [D] -> [T, D]: float32 inside, one rounding at the end."""
    v = x.to(torch.float32)
    v = v * torch.rsqrt(v.square().mean(dim=-1, keepdim=True) + eps)
    return (v * weight.to(torch.float32)).to(x.dtype)
