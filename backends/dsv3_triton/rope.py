"""Rotary position embedding: alone, and together with writing the latent cache."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv3.plugin import LatentCache
from dsv3_triton.cache_write import store_latent
from dsv3_triton.launch import launch


@triton.jit
def rotate(x_ptr, y_ptr, cos, sin, start, out, pairs, inside, INTERLEAVED: tl.constexpr, half):
    """Rotate the pairs of rows that start at `start` and store them from `out` on. cos, sin, inside: [rows, pairs]."""
    if INTERLEAVED:
        first, second = 2 * pairs, 2 * pairs + 1
    else:
        first, second = pairs, pairs + half
    a = tl.load(x_ptr + start + first, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(x_ptr + start + second, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + out + first, (a * cos - b * sin).to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(y_ptr + out + second, (a * sin + b * cos).to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def angles(table_ptr, positions_ptr, token, here, pairs, half, stride_table):
    """Cosines and sines [rows, pairs] of the tokens' positions."""
    position = tl.load(positions_ptr + token, mask=here, other=0).to(tl.int64)
    inside = here[:, None] & (pairs < half)[None, :]
    at = table_ptr + position[:, None] * stride_table + pairs[None, :]
    return tl.load(at, mask=inside, other=0.0), tl.load(at + half, mask=inside, other=0.0)


@triton.jit(do_not_specialize=["rows"])
def rope_kernel(
    x_ptr, positions_ptr, table_ptr, y_ptr, rows, heads, half, stride_t, stride_h, stride_table,
    PAIRS: tl.constexpr, BLOCK: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK (token, head) rows."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    pairs = tl.arange(0, PAIRS)
    here = row < rows
    token, head = (row // heads).to(tl.int64), row % heads
    cos, sin = angles(table_ptr, positions_ptr, token, here, pairs, half, stride_table)
    start = (token * stride_t + head * stride_h)[:, None]
    out = row.to(tl.int64)[:, None] * (2 * half)
    rotate(x_ptr, y_ptr, cos, sin, start, out, pairs[None, :], here[:, None] & (pairs < half)[None, :], INTERLEAVED, half)


def apply_rope(x: Tensor, positions: Tensor, cos_sin: Tensor, interleaved: bool, config: Mapping[str, Any]) -> Tensor:
    """`dsv3.ops.apply_rope`; x may be a strided view."""
    t, heads, width = x.shape
    y = torch.empty(t, heads, width, dtype=x.dtype, device=x.device)
    x = x if x.stride(2) == 1 else x.contiguous()
    launch(
        rope_kernel, (triton.cdiv(t * heads, config["BLOCK"]),),
        x, positions, cos_sin, y, t * heads, heads, width // 2, x.stride(0), x.stride(1), cos_sin.stride(0),
        PAIRS=triton.next_power_of_2(width // 2), BLOCK=config["BLOCK"], INTERLEAVED=interleaved,
        num_warps=config["num_warps"],
    )  # fmt: skip
    return y


@triton.jit(do_not_specialize=["T"])
def rope_cache_write_kernel(
    q_ptr, kpe_ptr, ckv_ptr, positions_ptr, table_ptr, slots_ptr, y_ptr, cache_ckv_ptr, cache_kpe_ptr, cache_scale_ptr,
    T, heads, half, R, page_size, stride_qt, stride_qh, stride_kpe, stride_ckv, stride_table,
    page_ckv, row_ckv, page_kpe, row_kpe, page_scale, row_scale,
    PAIRS: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr, GROUP: tl.constexpr, INTERLEAVED: tl.constexpr,
    FP8: tl.constexpr, FNUZ: tl.constexpr,
):  # fmt: skip
    """One program: one token. Its queries are rotated in any case; key and latent go to its slot unless that is -1."""
    token = tl.program_id(0).to(tl.int64)
    pairs = tl.arange(0, PAIRS)
    one = tl.zeros([1], tl.int64)
    cos, sin = angles(table_ptr, positions_ptr, token + one, one == 0, pairs, half, stride_table)
    for start in range(0, heads, HEADS):
        head = start + tl.arange(0, HEADS)
        inside = (head < heads)[:, None] & (pairs < half)[None, :]
        source = token * stride_qt + (head * stride_qh)[:, None]
        target = (token * heads + head)[:, None] * (2 * half)
        rotate(q_ptr, y_ptr, cos, sin, source, target, pairs[None, :], inside, INTERLEAVED, half)
    slot = tl.load(slots_ptr + token).to(tl.int64)
    if slot >= 0:
        page, offset = slot // page_size, slot % page_size
        at = page * page_kpe + offset * row_kpe
        key = (one + token * stride_kpe)[:, None]
        rotate(kpe_ptr, cache_kpe_ptr, cos, sin, key, (one + at)[:, None], pairs[None, :], (pairs < half)[None, :],
               INTERLEAVED, half)  # fmt: skip
        store_latent(ckv_ptr + token * stride_ckv, cache_ckv_ptr + page * page_ckv + offset * row_ckv,
                     cache_scale_ptr + page * page_scale + offset * row_scale, R, WIDTH, GROUP, FP8, FNUZ)  # fmt: skip


def rope_cache_write(
    q_pe: Tensor, kpe: Tensor, ckv: Tensor, positions: Tensor, cos_sin: Tensor, slots: Tensor, cache: LatentCache,
    interleaved: bool, config: Mapping[str, Any],
) -> Tensor:  # fmt: skip
    """`dsv3.ops.rope_cache_write` in one kernel."""
    t, heads, width = q_pe.shape
    y = torch.empty(t, heads, width, dtype=q_pe.dtype, device=q_pe.device)
    rank = ckv.shape[1]
    fp8 = cache.scale is not None
    codes = cache.ckv.view(torch.uint8) if fp8 else cache.ckv
    scale = cache.scale if cache.scale is not None else cache.kpe
    launch(
        rope_cache_write_kernel, (t,),
        q_pe, kpe, ckv, positions, cos_sin, slots, y, codes, cache.kpe, scale,
        t, heads, width // 2, rank, codes.shape[1], q_pe.stride(0), q_pe.stride(1), kpe.stride(0), ckv.stride(0),
        cos_sin.stride(0), codes.stride(0), codes.stride(1), cache.kpe.stride(0), cache.kpe.stride(1), scale.stride(0),
        scale.stride(1),
        PAIRS=triton.next_power_of_2(width // 2), HEADS=config["HEADS"], WIDTH=triton.next_power_of_2(rank), GROUP=128,
        INTERLEAVED=interleaved, FP8=fp8, FNUZ=cache.ckv.dtype == torch.float8_e4m3fnuz, num_warps=config["num_warps"],
    )  # fmt: skip
    return y
