"""FP8 e4m3 weights with one float32 scale per 128x128 block, as DeepSeek-V3 is released (technical report, 3.3.2)."""

from __future__ import annotations

import threading

import numpy as np
import torch
from torch import Tensor

BLOCK = 128
E4M3_MAX = 448.0
_UNDO = 2.0**8
_LARGE = 2.0**100
_CHECKED = 1 << 16  # codes looked at a time
_TILE = 2048  # columns


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

    On the CPU by integer arithmetic, or from a table, because torch's own conversion is ten times slower.
    """
    if codes.device.type != "cpu" or codes.numel() < 4096:
        return codes.to(torch.float32).to(dtype)
    if codes.dtype == torch.float8_e4m3fn and not has_nan(codes):
        half, real = torch.empty(codes.shape, dtype=torch.int16), torch.empty(codes.shape, dtype=torch.float32)
        return _moved(codes, half, real).mul_(_UNDO).to(dtype)
    table = torch.arange(256, dtype=torch.uint8).view(codes.dtype).to(torch.float32)
    flat = codes.contiguous().view(torch.uint8).reshape(-1)
    return torch.index_select(table, 0, flat.to(torch.int32)).view(codes.shape).to(dtype)


def has_nan(codes: Tensor) -> bool:
    """Whether any e4m3fn code on the CPU is NaN (0x7F or 0xFF). In numpy, which is ten times faster here than torch."""
    flat = codes.contiguous().view(torch.uint8).numpy().reshape(-1)
    parts = (flat[i : i + _CHECKED] for i in range(0, flat.size, _CHECKED))
    return any(int((part & 0x7F).max()) == 0x7F for part in parts)


def _moved(codes: Tensor, half: Tensor, out: Tensor) -> Tensor:
    """e4m3fn codes that are numbers, times 2^-8, in `out` (float32), exactly; half: scratch, int16 of the same shape.

    Their bits are moved to where float16 has sign, exponent and mantissa. By way of float16 and not of float32, because the
    processor converts its subnormals at full speed, and multiplies those of float32 a hundred times slower.
    """
    half.copy_(codes.view(torch.int8))  # the sign in the upper bits
    inner = half.numpy()
    np.multiply(inner, 128, out=inner)  # shifts, faster than numpy's own
    np.bitwise_and(inner, -0x4080, out=inner)  # 0xBF80
    return out.copy_(half.view(torch.float16))


class _Scratch(threading.local):
    """A thread's buffers for one tile. Kept, because fresh memory costs more than the arithmetic: a page fault every 4 KiB."""

    def __init__(self) -> None:
        self.half = torch.empty(BLOCK * _TILE, dtype=torch.int16)
        self.real = torch.empty(BLOCK * _TILE, dtype=torch.float32)

    def tile(self, rows: int, cols: int) -> tuple[Tensor, Tensor]:
        """(int16, float32) [rows, cols]."""
        return self.half[: rows * cols].view(rows, cols), self.real[: rows * cols].view(rows, cols)


def expand_scale(scale: Tensor, rows: int, cols: int) -> Tensor:
    """Block scales [.., ceil(N/128), ceil(K/128)] repeated to [.., N, K]. Indexed by 128, never by N / scale rows:
    576 rows in 5 blocks are not 115.2 rows each."""
    tall = scale.repeat_interleave(BLOCK, dim=-2)[..., :rows, :]
    return tall.repeat_interleave(BLOCK, dim=-1)[..., :cols]


def dequantize_block(weight: Tensor, scale: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """W[n,k] = code[n,k] * scale[n // 128, k // 128], in float32 (float64 if dtype is), rounded once to dtype.

    weight float8 [.., N, K], scale f32 [.., ceil(N/128), ceil(K/128)]; out: where to put it, [.., N, K] in dtype.
    """
    if out is None:
        out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    on_cpu = weight.device.type == "cpu" and weight.dtype == torch.float8_e4m3fn and weight.dim() == 2
    if on_cpu and dtype != torch.float64 and not has_nan(weight):
        return dequantize_numbers(weight, scale.to(torch.float32), out)
    work = torch.float64 if dtype == torch.float64 else torch.float32
    values = decode(weight, work)
    n, k = weight.shape[-2:]
    scale = scale.to(work)
    if n % BLOCK == 0 and k % BLOCK == 0 and values.numel():
        grid = values.view(*weight.shape[:-2], n // BLOCK, BLOCK, k // BLOCK, BLOCK)
        grid *= scale[..., :, None, :, None]
        return out.copy_(values)
    return out.copy_(values.mul_(expand_scale(scale, n, k)))


_scratch = _Scratch()


def dequantize_numbers(weight: Tensor, scale: Tensor, out: Tensor) -> Tensor:
    """`dequantize_block` on the CPU of e4m3fn [N, K] without NaN codes into `out`, float32 or bfloat16 [N, K], in tiles
    that stay in a core's cache."""
    n, k = weight.shape
    for row in range(0, n, BLOCK):
        factors = scale[row // BLOCK].repeat_interleave(BLOCK)[:k]
        once = bool((factors < _LARGE).all())
        factors = factors * _UNDO if once else factors
        for col in range(0, k, _TILE):
            codes = weight[row : row + BLOCK, col : col + _TILE]
            half, real = _scratch.tile(*codes.shape)
            _moved(codes, half, real)
            if not once:  # scale * 2^8 would be infinite
                real.mul_(_UNDO)
            out[row : row + BLOCK, col : col + _TILE].copy_(real.mul_(factors[col : col + _TILE]))
    return out


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
