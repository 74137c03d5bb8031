"""Writing latents and rotated keys into the paged cache, quantised if the cache is FP8."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv3.plugin import LatentCache
from dsv3_triton.launch import launch
from dsv3_triton.quantize import quantize_group


@triton.jit
def store_latent(
    row_ptr, out_ptr, scale_ptr, R, WIDTH: tl.constexpr, GROUP: tl.constexpr, FP8: tl.constexpr, FNUZ: tl.constexpr
):
    """One latent of R numbers in WIDTH lanes; FP8: as codes, with a scale per GROUP of them."""
    lane = tl.arange(0, WIDTH)
    x = tl.load(row_ptr + lane, mask=lane < R, other=0.0).to(tl.float32)
    if FP8:
        lanes: tl.constexpr = min(WIDTH, GROUP)
        count: tl.constexpr = WIDTH // lanes
        q, scale = quantize_group(tl.reshape(x, (count, lanes)), 1e-4, 224.0 if FNUZ else 448.0, False, FNUZ)
        tl.store(out_ptr + lane, tl.reshape(q, (WIDTH,)), mask=lane < R)
        group = tl.arange(0, count)
        tl.store(scale_ptr + group, scale, mask=group * GROUP < R)
    else:
        tl.store(out_ptr + lane, x.to(out_ptr.dtype.element_ty), mask=lane < R)


@triton.jit(do_not_specialize=["T"])
def kv_cache_write_kernel(
    kpe_ptr, ckv_ptr, slots_ptr, cache_ckv_ptr, cache_kpe_ptr, cache_scale_ptr,
    T, P, R, page_size, stride_kpe, stride_ckv, page_ckv, row_ckv, page_kpe, row_kpe, page_scale, row_scale,
    ROPE: tl.constexpr, WIDTH: tl.constexpr, GROUP: tl.constexpr, FP8: tl.constexpr, FNUZ: tl.constexpr,
):  # fmt: skip
    """One program: one token."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + token).to(tl.int64)
    if slot >= 0:
        page, offset = slot // page_size, slot % page_size
        lane = tl.arange(0, ROPE)
        key = tl.load(kpe_ptr + token * stride_kpe + lane, mask=lane < P, other=0.0)
        tl.store(
            cache_kpe_ptr + page * page_kpe + offset * row_kpe + lane, key.to(cache_kpe_ptr.dtype.element_ty), mask=lane < P
        )
        store_latent(ckv_ptr + token * stride_ckv, cache_ckv_ptr + page * page_ckv + offset * row_ckv,
                     cache_scale_ptr + page * page_scale + offset * row_scale, R, WIDTH, GROUP, FP8, FNUZ)  # fmt: skip


def kv_cache_write(ckv: Tensor, kpe: Tensor, slots: Tensor, cache: LatentCache, config: Mapping[str, Any]) -> None:
    """`dsv3.ops.kv_cache_write`."""
    t, rank = ckv.shape
    rope = kpe.shape[1]
    fp8 = cache.scale is not None
    codes = cache.ckv.view(torch.uint8) if fp8 else cache.ckv
    scale = cache.scale if cache.scale is not None else cache.kpe
    launch(
        kv_cache_write_kernel, (t,), kpe, ckv, slots, codes, cache.kpe, scale,
        t, rope, rank, codes.shape[1], kpe.stride(0), ckv.stride(0), codes.stride(0), codes.stride(1), cache.kpe.stride(0),
        cache.kpe.stride(1), scale.stride(0), scale.stride(1),
        ROPE=triton.next_power_of_2(rope), WIDTH=triton.next_power_of_2(rank), GROUP=128, FP8=fp8,
        FNUZ=cache.ckv.dtype == torch.float8_e4m3fnuz, num_warps=config["num_warps"],
    )  # fmt: skip
