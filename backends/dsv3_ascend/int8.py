"""Exact products of INT8 matrices on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

# 1024 products of two INT8 numbers sum to at most 2^24: float32 holds every partial sum exactly, in any order.
_SLAB = 1024


def has_int8_units() -> bool:
    """Whether the CPU multiplies INT8 itself (VNNI); torch._int_mm is right without, but slower than float32."""
    return bool(torch.cpu._is_vnni_supported())


def product(a: Tensor, b: Tensor) -> Tensor:
    """a i8 [T, K], b i8 [K, N] -> i32 [T, N], exact up to K = 2^17."""
    return torch._int_mm(a, b) if has_int8_units() else product_in_slabs(a, b)


def product_in_slabs(a: Tensor, b: Tensor) -> Tensor:
    """The same, over float32."""
    total = torch.zeros(a.shape[0], b.shape[1], dtype=torch.int32)
    for k in range(0, a.shape[1], _SLAB):
        x, w = a[:, k : k + _SLAB].to(torch.float32), b[k : k + _SLAB].to(torch.float32)
        total += torch.matmul(x, w).to(torch.int32)
    return total
