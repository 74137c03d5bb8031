"""INT8 activations: their quantisation, and products of INT8 with exact int32 sums."""

from __future__ import annotations

import numpy as np
from numba import prange

from dsv3_cpu.compile import inner, kernel, strict
from dsv3_cpu.kernels.grouped import TILE
from dsv3_cpu.kernels.numbers import put, widen


@strict
def quantize_row(x, t, floor, q, scales):
    """x[t] / scale rounded half to even, scale = max(max|x[t]|, floor) / 127."""
    most = np.float32(floor)
    for k in range(x.shape[1]):
        size = abs(widen(x[t, k]))
        most = size if size > most else most
    scale = most / np.float32(127)
    scales[t, 0] = scale
    divisor = scale if scale != 0 else np.float32(1)
    for k in range(x.shape[1]):
        value = np.rint(widen(x[t, k]) / divisor)
        q[t, k] = np.int8(min(max(value, np.float32(-127)), np.float32(127)))


@kernel
def quantize(x, floor, q, scales):
    """Codes q [T, K] and scales [T, 1] of rows x [T, K]."""
    for t in prange(x.shape[0]):
        quantize_row(x, t, floor, q, scales)


@inner
def sum4(a, w, e, n, i, rows, y):
    """y[i + j, n] = a[i + j] . w[e, n] for j below rows, at most 4, in int32."""
    i1, i2, i3 = i + min(1, rows - 1), i + min(2, rows - 1), i + min(3, rows - 1)
    p, q, r, s = np.int32(0), np.int32(0), np.int32(0), np.int32(0)
    for k in range(w.shape[2]):
        v = np.int32(w[e, n, k])
        p = np.int32(p + v * np.int32(a[i, k]))
        q = np.int32(q + v * np.int32(a[i1, k]))
        r = np.int32(r + v * np.int32(a[i2, k]))
        s = np.int32(s + v * np.int32(a[i3, k]))
    y[i, n] = p
    y[i1, n] = q
    y[i2, n] = r
    y[i3, n] = s


@inner
def sum1(a, w, e, n, i):
    total = np.int32(0)
    for k in range(w.shape[2]):
        total = np.int32(total + np.int32(w[e, n, k]) * np.int32(a[i, k]))
    return total


@kernel
def grouped_int8(w, s, experts, offsets, a, a_scale, sums, y):
    """y[offsets[j] : offsets[j + 1]] = a[the same] @ w[experts[j]]^T for every j: int32 sums [M, N], then both scales."""
    tiles = (w.shape[1] + TILE - 1) // TILE
    for p in prange(experts.shape[0] * tiles):
        j = p // tiles
        e, first = experts[j], (p - j * tiles) * TILE
        for n in range(first, min(w.shape[1], first + TILE)):
            if offsets[j + 1] - offsets[j] == 1:
                sums[offsets[j], n] = sum1(a, w, e, n, offsets[j])
            else:
                for i in range(offsets[j], offsets[j + 1], 4):
                    sum4(a, w, e, n, i, min(4, offsets[j + 1] - i), sums)
            for i in range(offsets[j], offsets[j + 1]):
                put(y, (i, n), (np.float32(sums[i, n]) * a_scale[i, 0]) * s[e, n])
