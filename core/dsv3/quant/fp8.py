"""FP8 e4m3 weights with one float32 scale per 128x128 block, as DeepSeek-V3 is released (technical report, 3.3.2)."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 128
E4M3_MAX = 448.0


def blocks(n: int) -> int:
    """Number of 128-wide blocks that cover n; the last may be ragged."""
    return -(-n // BLOCK)


def power_of_two_at_least(x: Tensor) -> Tensor:
    """The smallest power of two >= x, exactly, for finite positive x; NaN and infinity are kept."""
    mantissa, exponent = torch.frexp(x)
    exponent = torch.where(mantissa == 0.5, exponent - 1, exponent)
    rounded = torch.ldexp(torch.ones_like(x), exponent)
    return torch.where(torch.isfinite(x), rounded, x)


def decode(codes: Tensor, dtype: torch.dtype) -> Tensor:
    """FP8 codes (any torch float8 type) as `dtype`, exactly; NaN codes become NaN.

    A 256-entry table, because torch converts FP8 to float32 on the CPU ten times slower than it gathers.
    """
    if codes.device.type != "cpu" or codes.numel() < 4096:
        return codes.to(torch.float32).to(dtype)
    table = torch.arange(256, dtype=torch.uint8).view(codes.dtype).to(torch.float32)
    flat = codes.contiguous().view(torch.uint8).reshape(-1)
    return torch.index_select(table, 0, flat.to(torch.int32)).view(codes.shape).to(dtype)


def expand_scale(scale: Tensor, rows: int, cols: int) -> Tensor:
    """Block scales [.., ceil(N/128), ceil(K/128)] repeated to [.., N, K]. Indexed by 128, never by N / scale rows:
    576 rows in 5 blocks are not 115.2 rows each."""
    tall = scale.repeat_interleave(BLOCK, dim=-2)[..., :rows, :]
    return tall.repeat_interleave(BLOCK, dim=-1)[..., :cols]


def dequantize_block(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """W[n,k] = code[n,k] * scale[n // 128, k // 128], in float32 (float64 if dtype is), rounded once to dtype.

    weight float8 [.., N, K], scale f32 [.., ceil(N/128), ceil(K/128)].
    """
    work = torch.float64 if dtype == torch.float64 else torch.float32
    values = decode(weight, work)
    n, k = weight.shape[-2:]
    scale = scale.to(work)
    if n % BLOCK == 0 and k % BLOCK == 0 and values.numel():
        grid = values.view(*weight.shape[:-2], n // BLOCK, BLOCK, k // BLOCK, BLOCK)
        grid *= scale[..., :, None, :, None]
        return values.to(dtype)
    return values.mul_(expand_scale(scale, n, k)).to(dtype)


def quantize_block(weight: Tensor, scale_fmt: str = "float32") -> tuple[Tensor, Tensor]:
    """weight [N, K] -> e4m3fn codes [N, K], f32 scales [ceil(N/128), ceil(K/128)].

    scale = max|block| / 448 (1 for an all-zero block), rounded up to a power of two for "ue8m0"; code = w / scale rounded
    to nearest even and saturated.
    """
    n, k = weight.shape
    rows, cols = blocks(n), blocks(k)
    work = torch.zeros(rows * BLOCK, cols * BLOCK, dtype=torch.float32, device=weight.device)
    work[:n, :k] = weight
    grid = work.view(rows, BLOCK, cols, BLOCK)
    amax = grid.abs().amax(dim=(1, 3))
    smallest = torch.finfo(torch.float32).tiny
    scale = torch.where(amax > 0, amax / E4M3_MAX, torch.ones_like(amax)).clamp_min(smallest)
    if scale_fmt == "ue8m0":
        scale = power_of_two_at_least(scale)
    grid /= scale[:, None, :, None]
    codes = work[:n, :k].clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return codes, scale
