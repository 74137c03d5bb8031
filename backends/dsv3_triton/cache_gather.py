"""Reading all cached rows of some sequences back to back, dequantised if the cache is FP8."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv3.plugin import LatentCache
from dsv3_triton.launch import launch
from dsv3_triton.numbers import decode_fp8


@triton.jit(do_not_specialize=["S", "total", "start", "stride_table"])
def kv_cache_gather_kernel(
    cache_ckv_ptr, cache_kpe_ptr, cache_scale_ptr, table_ptr, lens_ptr, ckv_ptr, kpe_ptr,
    S, total, start, R, P, page_size, stride_table, page_ckv, row_ckv, page_kpe, row_kpe, page_scale, row_scale,
    SEQUENCES: tl.constexpr, WIDTH: tl.constexpr, ROPE: tl.constexpr, BLOCK: tl.constexpr, FP8: tl.constexpr,
    FNUZ: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK rows of the result. Each finds its sequence by counting how many end before it."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    sequence = tl.zeros([BLOCK], tl.int32)
    before = tl.zeros([BLOCK], tl.int32)
    ended = 0
    for first in range(0, S, SEQUENCES):
        s = first + tl.arange(0, SEQUENCES)
        length = tl.maximum(tl.load(lens_ptr + s, mask=s < S, other=0).to(tl.int32) - start, 0)
        end = ended + tl.cumsum(length, 0)
        past = (end[None, :] <= row[:, None]) & (s < S)[None, :]
        sequence += tl.sum(past.to(tl.int32), axis=1)
        before += tl.sum(tl.where(past, length[None, :], 0), axis=1)
        ended += tl.sum(length, 0)
    here = (row < total) & (sequence < S)
    position = row - before + start
    page = tl.load(table_ptr + sequence.to(tl.int64) * stride_table + position // page_size, mask=here, other=0).to(tl.int64)
    offset = (position % page_size).to(tl.int64)
    lane, rope = tl.arange(0, WIDTH)[None, :], tl.arange(0, ROPE)[None, :]
    out = row.to(tl.int64)[:, None]
    inside = here[:, None] & (lane < R)
    x = tl.load(cache_ckv_ptr + (page * page_ckv + offset * row_ckv)[:, None] + lane, mask=inside, other=0)
    if FP8:
        at = cache_scale_ptr + (page * page_scale + offset * row_scale)[:, None] + lane // 128
        x = decode_fp8(x, FNUZ) * tl.load(at, mask=inside, other=0.0)
    tl.store(ckv_ptr + out * R + lane, x.to(ckv_ptr.dtype.element_ty), mask=inside)
    some = here[:, None] & (rope < P)
    key = tl.load(cache_kpe_ptr + (page * page_kpe + offset * row_kpe)[:, None] + rope, mask=some, other=0.0)
    tl.store(kpe_ptr + out * P + rope, key, mask=some)


def kv_cache_gather(
    cache: LatentCache, block_table: Tensor, seq_lens: Tensor, total: int, start: int, config: Mapping[str, Any]
) -> tuple[Tensor, Tensor]:
    """`dsv3.ops.kv_cache_gather`."""
    rank, rope = cache.ckv.shape[2], cache.kpe.shape[2]
    ckv, kpe = (torch.empty(total, n, dtype=cache.kpe.dtype, device=cache.kpe.device) for n in (rank, rope))
    fp8 = cache.scale is not None
    codes = cache.ckv.view(torch.uint8) if fp8 else cache.ckv
    scale = cache.scale if cache.scale is not None else cache.kpe
    launch(
        kv_cache_gather_kernel, (triton.cdiv(total, config["BLOCK"]),),
        codes, cache.kpe, scale, block_table, seq_lens, ckv, kpe,
        len(seq_lens), total, start, rank, rope, codes.shape[1], block_table.stride(0), codes.stride(0), codes.stride(1),
        cache.kpe.stride(0), cache.kpe.stride(1), scale.stride(0), scale.stride(1),
        SEQUENCES=16, WIDTH=triton.next_power_of_2(rank), ROPE=triton.next_power_of_2(rope), BLOCK=config["BLOCK"], FP8=fp8,
        FNUZ=cache.ckv.dtype == torch.float8_e4m3fnuz, num_warps=config["num_warps"],
    )  # fmt: skip
    return ckv, kpe
