"""Norms, the gated activation and rotation, over float32 or bfloat16 rows; float32 inside, one rounding."""

from __future__ import annotations

import numpy as np

from dsv3_cpu.compile import inner
from dsv3_cpu.kernels.numbers import put, sigmoid, widen


@inner
def norm_row(x, t, weight, eps, y):
    """y[t] = x[t] / sqrt(mean(x[t]^2) + eps) * weight."""
    squares = np.float32(0)
    for i in range(x.shape[1]):
        v = widen(x[t, i])
        squares += v * v
    factor = np.float32(1) / np.sqrt(squares / np.float32(x.shape[1]) + np.float32(eps))
    for i in range(x.shape[1]):
        put(y, (t, i), (widen(x[t, i]) * factor) * widen(weight[i]))


def rms_norm(team, me, crew, x, weight, eps, y):
    for t in range(me, x.shape[0], crew):
        norm_row(x, t, weight, eps, y)


def add_rms_norm(team, me, crew, x, residual, weight, eps, y, total):
    """total = x + residual, rounded; y is its norm."""
    for t in range(me, x.shape[0], crew):
        for i in range(x.shape[1]):
            put(total, (t, i), widen(x[t, i]) + widen(residual[t, i]))
        norm_row(total, t, weight, eps, y)


def silu_mul(team, me, crew, x, y):
    width = y.shape[1]
    for t in range(me, x.shape[0], crew):
        for i in range(width):
            g = widen(x[t, i])
            put(y, (t, i), (g * sigmoid(g)) * widen(x[t, width + i]))


def rope(team, me, crew, x, positions, table, interleaved, y):
    """Every head of x [T, N, P] by the angles of its token's row of table, P / 2 cosines and then as many sines."""
    half = x.shape[2] // 2
    for t in range(me, x.shape[0], crew):
        place = np.int64(positions[t])
        for n in range(x.shape[1]):
            for j in range(half):
                a, b = (2 * j, 2 * j + 1) if interleaved else (j, j + half)
                c, s = table[place, j], table[place, half + j]
                u, v = widen(x[t, n, a]), widen(x[t, n, b])
                put(y, (t, n, a), u * c - v * s)
                put(y, (t, n, b), u * s + v * c)
