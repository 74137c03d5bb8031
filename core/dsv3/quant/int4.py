"""INT4 weights, symmetric, one float32 scale per group of 128 along K; two codes to a byte, low nibble first."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

GROUP = 128


def pack(codes: Tensor) -> Tensor:
    """Integers in [-8, 7], [.., K] -> u8 [.., ceil(K/2)]: nibble = q + 8, even k in the low nibble; an odd K is padded
    with q = 0."""
    if codes.shape[-1] % 2:
        codes = pad(codes, (0, 1))
    nibbles = (codes + 8).to(torch.uint8)
    return nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)


def unpack(packed: Tensor, k: int) -> Tensor:
    """u8 [.., ceil(K/2)] -> i8 [.., K] in [-8, 7]."""
    low, high = packed & 0xF, packed >> 4
    return torch.stack((low, high), dim=-1).flatten(-2)[..., :k].to(torch.int8) - 8


def quantize_group(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight [N, K] -> packed u8 [N, ceil(K/2)], f32 scale [N, ceil(K/128)].

    scale = max|group| / 7 (1 for an all-zero group), so that codes are in [-7, 7]; -8 is legal but not produced here.
    """
    n, k = weight.shape
    groups = -(-k // GROUP)
    work = pad(weight.to(torch.float32), (0, groups * GROUP - k)).view(n, groups, GROUP)
    amax = work.abs().amax(dim=-1)
    tiny = torch.finfo(torch.float32).tiny
    scale = torch.where(amax > 0, amax / 7, torch.ones_like(amax)).clamp_min(tiny)
    codes = torch.round(work / scale[..., None]).clamp_(-7, 7).view(n, groups * GROUP)[:, :k]
    return pack(codes.to(torch.int8)), scale


def dequantize_group(packed: Tensor, scale: Tensor, k: int, dtype: torch.dtype) -> Tensor:
    """u8 [.., N, ceil(K/2)], f32 [.., N, ceil(K/128)] -> [.., N, K], in float32 (float64 if dtype is), rounded once."""
    work = torch.float64 if dtype == torch.float64 else torch.float32
    codes = unpack(packed, k).to(work)
    return (codes * scale.to(work).repeat_interleave(GROUP, dim=-1)[..., :k]).to(dtype)
