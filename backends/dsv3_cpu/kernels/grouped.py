"""Products of few rows with weights of any format: one weight, or many experts', in one call."""

from __future__ import annotations

import numpy as np
from numba import prange

from dsv3_cpu.compile import inner, kernel
from dsv3_cpu.kernels.rows import decode, dot4, dot_row, fold

TILE = 32  # rows of a weight that one thread takes at a time; divides 128, so that FP8's scales are those of one block


@inner
def product_tile(w, s, e, first, x, start, end, y):
    """y[start:end, first : first + TILE] = x[start:end] @ w[e, the same]^T. x float32 [M, K], y float32 [M, N].

    One row of x: its weights are decoded in registers. More: every row of the weight is decoded once.
    """
    width = x.shape[1]
    last = min(w.shape[1], first + TILE)
    if end - start == 1:
        folded = np.empty(width + 1, np.float32)
        fold(w, s, e, first, x, start, folded)
        for n in range(first, last):
            y[start, n] = dot_row(w, s, e, n, folded)
        return
    row = np.empty((1, width), np.float32)
    for n in range(first, last):
        decode(w, s, e, n, row, 0)
        for i in range(start, end, 4):
            dot4(row, x, i, min(4, end - i), y, n)


@kernel
def grouped(w, s, experts, offsets, x, y):
    """y[offsets[j] : offsets[j + 1]] = x[the same] @ w[experts[j]]^T for every j."""
    tiles = (w.shape[1] + TILE - 1) // TILE
    for p in prange(experts.shape[0] * tiles):
        j = p // tiles
        product_tile(w, s, experts[j], (p - j * tiles) * TILE, x, offsets[j], offsets[j + 1], y)


@kernel
def decoded(w, s, e, first, out):
    """out[i] = row first + i of expert e as real numbers, float32 [rows, K]."""
    for i in prange(out.shape[0]):
        decode(w, s, e, first + i, out, i)
