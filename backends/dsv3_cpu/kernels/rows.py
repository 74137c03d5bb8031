"""One row of a weight of any format: as float32 numbers, or straight into a dot product.

Weights are [E, N, ..], one expert where there are none. Which format it is shows in the types: (int8, scales of three axes) is
FP8, (int8, two) INT8, (uint8, three) INT4, uint16 bfloat16, and float32 itself. Rows are named by their indices, not sliced: a
slice costs numba more to compile than a loop, and a reference count.
"""

from __future__ import annotations

import numpy as np
from numba.core import types

from dsv3_cpu.compile import inner, overloads
from dsv3_cpu.kernels.numbers import fp8, put, widen

_UNDO = np.float32(256)  # of numbers.fp8
GROUP = 128


def kind(w, s) -> str:
    """The format of a weight with scales s, from their numba types."""
    if w.dtype == types.int8:
        return "fp8" if s.ndim == 3 else "int8"
    return {types.uint8: "int4", types.uint16: "bf16", types.float32: "f32"}[w.dtype]


def decode(w, s, e, n, out, i):
    """Row n of expert e as real numbers, in out[i]; out float32 [.., K]."""


@overloads(decode)
def _decode(w, s, e, n, out, i):
    def from_fp8(w, s, e, n, out, i):
        for g in range(s.shape[2]):
            factor = s[e, n >> 7, g]
            for k in range(g * GROUP, min((g + 1) * GROUP, out.shape[1])):
                out[i, k] = (fp8(w[e, n, k]) * _UNDO) * factor

    def from_int8(w, s, e, n, out, i):
        factor = s[e, n]
        for k in range(out.shape[1]):
            out[i, k] = np.float32(w[e, n, k]) * factor

    def from_int4(w, s, e, n, out, i):
        for g in range(s.shape[2]):
            factor = s[e, n, g]
            last = min((g + 1) * GROUP, out.shape[1])
            for j in range(g * (GROUP // 2), last // 2):
                code = np.int32(w[e, n, j])
                out[i, 2 * j] = np.float32((code & 15) - 8) * factor
                out[i, 2 * j + 1] = np.float32((code >> 4) - 8) * factor
            if last % 2:
                out[i, last - 1] = np.float32((np.int32(w[e, n, last // 2]) & 15) - 8) * factor

    def from_real(w, s, e, n, out, i):
        for k in range(out.shape[1]):
            out[i, k] = widen(w[e, n, k])

    return {"fp8": from_fp8, "int8": from_int8, "int4": from_int4}.get(kind(w, s), from_real)


def fold(w, s, e, n, x, i, out):
    """x[i] as `dot_row` wants it for the rows of a tile that begins with n, in out, float32 [K + 1]: FP8's block scales
    multiplied in; for INT4 the even elements first, then the odd ones."""


@overloads(fold)
def _fold(w, s, e, n, x, i, out):
    def blocks(w, s, e, n, x, i, out):
        for g in range(s.shape[2]):
            factor = s[e, n >> 7, g] * _UNDO
            for k in range(g * GROUP, min((g + 1) * GROUP, x.shape[1])):
                out[k] = widen(x[i, k]) * factor

    def halves(w, s, e, n, x, i, out):
        half = w.shape[2]
        out[2 * half - 1] = 0
        for j in range(half):
            out[j] = widen(x[i, 2 * j])
        for j in range(x.shape[1] // 2):
            out[half + j] = widen(x[i, 2 * j + 1])

    def same(w, s, e, n, x, i, out):
        for k in range(x.shape[1]):
            out[k] = widen(x[i, k])

    return {"fp8": blocks, "int4": halves}.get(kind(w, s), same)


def dot_row(w, s, e, n, x):
    """Row n of expert e times x, which `fold` has made."""


@overloads(dot_row)
def _dot_row(w, s, e, n, x):
    def with_fp8(w, s, e, n, x):
        total = np.float32(0)
        for k in range(w.shape[2]):
            total += fp8(w[e, n, k]) * x[k]
        return total

    def with_int8(w, s, e, n, x):
        total = np.float32(0)
        for k in range(w.shape[2]):
            total += np.float32(w[e, n, k]) * x[k]
        return total * s[e, n]

    def with_int4(w, s, e, n, x):
        half, total = w.shape[2], np.float32(0)
        for g in range(s.shape[2]):
            part = np.float32(0)
            for j in range(g * (GROUP // 2), min((g + 1) * (GROUP // 2), half)):
                code = np.int32(w[e, n, j])
                part += np.float32((code & 15) - 8) * x[j] + np.float32((code >> 4) - 8) * x[half + j]
            total += part * s[e, n, g]
        return total

    def with_real(w, s, e, n, x):
        total = np.float32(0)
        for k in range(w.shape[2]):
            total += widen(w[e, n, k]) * x[k]
        return total

    return {"fp8": with_fp8, "int8": with_int8, "int4": with_int4}.get(kind(w, s), with_real)


@inner
def dot4(a, x, i, rows, y, start, n):
    """y[start + i + j, n] = a[0] . x[i + j] for j below rows, at most 4; a float32 [1, K], x float32."""
    p, q, r, s = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
    # Rows past the last are read as the last: one loop for every count.
    i1, i2, i3 = i + min(1, rows - 1), i + min(2, rows - 1), i + min(3, rows - 1)
    for k in range(a.shape[1]):
        v = a[0, k]
        p += v * x[i, k]
        q += v * x[i1, k]
        r += v * x[i2, k]
        s += v * x[i3, k]
    put(y, (start + i, n), p)
    put(y, (start + i1, n), q)
    put(y, (start + i2, n), r)
    put(y, (start + i3, n), s)
