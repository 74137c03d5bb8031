"""Products of few rows with weights of any format: one weight, or many experts', in one call."""

from __future__ import annotations

import numpy as np
from numba import prange

from dsv3_cpu.compile import inner, kernel
from dsv3_cpu.kernels.numbers import put, widen
from dsv3_cpu.kernels.rows import decode, dot4, dot_row, fold

TILE = 32  # rows of a weight that one thread takes at a time; divides 128, so that FP8's scales are those of one block


@inner
def product_tile(w, s, e, first, x, start, end, y):
    """y[start:end, first : first + TILE] = x[start:end] @ w[e, the same]^T. x [M, K] and y [M, N] float32 or bfloat16.

    One row of x: its weights are decoded in registers. More: every row of the weight is decoded once.
    """
    width, rows = x.shape[1], end - start
    last = min(w.shape[1], first + TILE)
    if rows == 1:
        folded = np.empty(width + 1, np.float32)
        fold(w, s, e, first, x, start, folded)
        for n in range(first, last):
            put(y, (start, n), dot_row(w, s, e, n, folded))
        return
    wide = np.empty((rows, width), np.float32)
    for i in range(rows):
        for k in range(width):
            wide[i, k] = widen(x[start + i, k])
    row = np.empty((1, width), np.float32)
    for n in range(first, last):
        decode(w, s, e, n, row, 0)
        for i in range(0, rows, 4):
            dot4(row, wide, i, min(4, rows - i), y, start, n)


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


@kernel
def heads(x, flat, sh, sa, sc, y):
    """y[t, h] = x[t, h] @ w[h], w [Nh, A, C] in flat storage with these strides, of which sa or sc is 1."""
    tokens, width, depth = x.shape[0], y.shape[2], x.shape[2]
    for h in prange(x.shape[1]):
        row = np.empty(depth, np.float32)
        total = np.empty(width, np.float32)
        for t in range(tokens):
            for a in range(depth):
                row[a] = widen(x[t, h, a])
            if sc == 1:
                total[:] = 0
                for a in range(depth):
                    v, base = row[a], h * sh + a * sa
                    for c in range(width):
                        total[c] += v * widen(flat[base + c])
                for c in range(width):
                    put(y, (t, h, c), total[c])
            else:
                for c in range(width):
                    base, part = h * sh + c * sc, np.float32(0)
                    for a in range(depth):
                        part += row[a] * widen(flat[base + a])
                    put(y, (t, h, c), part)
