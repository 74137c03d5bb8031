"""Slots of the paged latent cache, read inside a kernel as they are stored, and as products take them."""

from __future__ import annotations

import triton
import triton.language as tl

from dsv3_triton.numbers import decode_fp8


@triton.jit
def page_of(table_ptr, at, high, PAGE: tl.constexpr):
    """Page that holds slot `at`; what is past the end is not looked up."""
    return tl.load(table_ptr + at // PAGE, mask=at < high, other=0).to(tl.int64)


@triton.jit
def read_slots(
    ckv_ptr, kpe_ptr, scale_ptr, table_ptr, page, at, low, high, R, P,
    ckv_page, ckv_row, kpe_page, kpe_row, scale_page, scale_row,
    PAGE: tl.constexpr, ONE_PAGE: tl.constexpr, FP8: tl.constexpr, CHUNKS: tl.constexpr, CHUNK: tl.constexpr,
    ROPE: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """BLOCK_N slots from `at`, as stored: CHUNKS parts of the latent [slots, CHUNK], the rotated key [slots, ROPE], CHUNKS
    scales [slots] (1 where there are none). Slots before low and from high on are not read. page: that of `at`."""
    position = at + tl.arange(0, BLOCK_N)
    there = (position >= low) & (position < high)
    if ONE_PAGE:
        offset = at % PAGE + tl.arange(0, BLOCK_N)
    else:
        page = tl.load(table_ptr + position // PAGE, mask=there, other=0).to(tl.int64)
        offset = position % PAGE
    ckv_row_ptr = ckv_ptr + page * ckv_page + offset * ckv_row
    kpe_row_ptr = kpe_ptr + page * kpe_page + offset * kpe_row
    scale_row_ptr = scale_ptr + page * scale_page + offset * scale_row
    parts = ()
    for g in tl.static_range(CHUNKS):
        column = g * CHUNK + tl.arange(0, CHUNK)
        parts += (tl.load(ckv_row_ptr[:, None] + column[None, :], mask=there[:, None] & (column < R)[None, :], other=0),)
    column = tl.arange(0, ROPE)
    parts += (tl.load(kpe_row_ptr[:, None] + column[None, :], mask=there[:, None] & (column < P)[None, :], other=0),)
    for g in tl.static_range(CHUNKS):
        parts += (tl.load(scale_row_ptr + g, mask=there, other=0.0) if FP8 else 1.0,)
    return parts


@triton.jit
def operand_of(x, FP8: tl.constexpr, FNUZ: tl.constexpr, NATIVE: tl.constexpr, WIDE: tl.constexpr):
    """What is stored, as products take it; FP8 as the numbers of its codes."""
    if FP8 and NATIVE:
        x = x.to(tl.float8e4b8 if FNUZ else tl.float8e4nv, bitcast=True)
    elif FP8:
        x = decode_fp8(x, FNUZ)
    return x.to(tl.float32 if WIDE else tl.bfloat16)
