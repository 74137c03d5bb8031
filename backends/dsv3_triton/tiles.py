"""What the kernels of products share: which tile a program computes, and how tiles of operands are read."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile_of(program, T, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BAND: tl.constexpr):
    """Program -> tile row and column. BAND tile rows go through the columns together, so that what they read stays in L2."""
    tall = tl.cdiv(T, BLOCK_M)
    wide = tl.cdiv(N, BLOCK_N)
    first = program // (BAND * wide) * BAND
    height = tl.minimum(tall - first, BAND)
    inside = program % (BAND * wide)
    return first + inside % height, inside // height


@triton.jit
def read(ptr, rows, stride, columns, height, width):
    """[rows, columns] of a matrix whose columns are adjacent; zeros outside. Rows count in 64 bits."""
    inside = (rows < height)[:, None] & (columns < width)[None, :]
    return tl.load(ptr + rows.to(tl.int64)[:, None] * stride + columns[None, :], mask=inside, other=0.0)


@triton.jit
def write(ptr, rows, stride, columns, height, width, values):
    """The counterpart of `read`, rounded to what is stored."""
    inside = (rows < height)[:, None] & (columns < width)[None, :]
    at = ptr + rows.to(tl.int64)[:, None] * stride + columns[None, :]
    tl.store(at, values.to(ptr.dtype.element_ty), mask=inside)
