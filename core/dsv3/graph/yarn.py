"""Rotary angles: plain RoPE, and YaRN (Peng et al. 2023) as DeepSeek uses it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dsv3.graph.config import ModelConfig, Yarn

_ROWS = 1 << 14


def _mscale(factor: float, k: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * k * math.log(factor) + 1.0


def _correction(rotations: float, dim: int, theta: float, length: int) -> float:
    """The dimension that turns `rotations` times over `length` positions."""
    return dim * math.log(length / (2 * math.pi * rotations)) / (2 * math.log(theta))


def inverse_frequencies(dim: int, theta: float, yarn: Yarn | None) -> Tensor:
    """Radians per position of each pair, float64 [dim / 2]. YaRN leaves fast dimensions, divides slow ones by the factor, and
    blends linearly in between. It acts at every length, not only past the original one."""
    inverse = theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    if yarn is None:
        return inverse
    low = _correction(yarn.beta_fast, dim, theta, yarn.original_max_position_embeddings)
    high = _correction(yarn.beta_slow, dim, theta, yarn.original_max_position_embeddings)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(dim // 2, dtype=torch.float64) - low) / (high - low)).clamp(0, 1)
    return inverse * ((1 - ramp) + ramp / yarn.factor)


def cos_sin_table(c: ModelConfig, device: torch.device | str, length: int | None = None) -> Tensor:
    """f32 [L, P]: P/2 cosines then P/2 sines per position, angles in float64; L defaults to max_position_embeddings."""
    length = length or c.max_position_embeddings
    if torch.device(device).type == "meta":
        return torch.empty(length, c.qk_rope_head_dim, dtype=torch.float32, device="meta")
    inverse = inverse_frequencies(c.qk_rope_head_dim, c.rope_theta, c.rope_scaling)
    factor, half = _table_factor(c.rope_scaling), c.qk_rope_head_dim // 2
    table = torch.empty(length, 2 * half, dtype=torch.float32)
    for first in range(0, length, _ROWS):  # a slice at a time: float64 angles of a long table are as much again
        angles = torch.outer(torch.arange(first, min(first + _ROWS, length), dtype=torch.float64), inverse)
        table[first : first + _ROWS, :half] = angles.cos() * factor
        table[first : first + _ROWS, half:] = angles.sin() * factor
    return table.to(device)


def _table_factor(yarn: Yarn | None) -> float:
    if yarn is None:
        return 1.0
    if yarn.attention_factor is not None:
        return yarn.attention_factor
    return _mscale(yarn.factor, yarn.mscale) / _mscale(yarn.factor, yarn.mscale_all_dim)


def softmax_scale(c: ModelConfig) -> float:
    """(Dn + P)^-1/2, times m(factor, mscale_all_dim)^2 under YaRN where mscale_all_dim is set."""
    scale = c.qk_head_dim**-0.5
    if c.rope_scaling is not None and c.rope_scaling.mscale_all_dim:
        scale *= _mscale(c.rope_scaling.factor, c.rope_scaling.mscale_all_dim) ** 2
    return scale
