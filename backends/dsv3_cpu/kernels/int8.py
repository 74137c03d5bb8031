"""INT8 activations: their quantisation, and products of INT8 with exact int32 sums."""

from __future__ import annotations

import numpy as np

from dsv3_cpu.compile import inner, strict
from dsv3_cpu.kernels.atoms import take
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


def quantize(team, me, crew, x, floor, q, scales):
    """Codes q [T, K] and scales [T, 1] of rows x [T, K]."""
    for t in range(me, x.shape[0], crew):
        quantize_row(x, t, floor, q, scales)


@inner
def sum4(a, w, e, n, i, rows, to, sums):
    """sums[to + j] = a[i + j] . w[e, n] for j below rows, at most 4, in int32."""
    i1, i2, i3 = i + min(1, rows - 1), i + min(2, rows - 1), i + min(3, rows - 1)
    p, q, r, s = np.int32(0), np.int32(0), np.int32(0), np.int32(0)
    for k in range(w.shape[2]):
        v = np.int32(w[e, n, k])
        p = np.int32(p + v * np.int32(a[i, k]))
        q = np.int32(q + v * np.int32(a[i1, k]))
        r = np.int32(r + v * np.int32(a[i2, k]))
        s = np.int32(s + v * np.int32(a[i3, k]))
    sums[to] = p
    sums[to + 1], sums[to + 2], sums[to + 3] = q, r, s


@inner
def sum1(a, w, e, n, i):
    total = np.int32(0)
    for k in range(w.shape[2]):
        total = np.int32(total + np.int32(w[e, n, k]) * np.int32(a[i, k]))
    return total


def grouped_int8(team, me, crew, w, s, experts, offsets, a, a_scale, tile, y):
    """y[offsets[j] : offsets[j + 1]] = a[the same] @ w[experts[j]]^T for every j: int32 sums, then both scales."""
    tiles = (w.shape[1] + tile - 1) // tile
    most = 0
    for j in range(experts.shape[0]):
        most = max(most, offsets[j + 1] - offsets[j])
    sums = np.empty(most + 3, np.int32)
    p = take(team, 0)
    while p < experts.shape[0] * tiles:
        j = p // tiles
        e, start, end = experts[j], offsets[j], offsets[j + 1]
        for n in range((p - j * tiles) * tile, min(w.shape[1], (p - j * tiles + 1) * tile)):
            if end - start == 1:
                sums[0] = sum1(a, w, e, n, start)
            else:
                for i in range(start, end, 4):
                    sum4(a, w, e, n, i, min(4, end - i), i - start, sums)
            for i in range(start, end):
                put(y, (i, n), (np.float32(sums[i - start]) * a_scale[i, 0]) * s[e, n])
        p = take(team, 0)
