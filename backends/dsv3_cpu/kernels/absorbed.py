"""Products with absorbed weights: one small matrix per head, as it lies in a larger weight, along its rows or across."""

from __future__ import annotations

import numpy as np
from numba.core import types

from dsv3_cpu.compile import overloads
from dsv3_cpu.kernels.atoms import take
from dsv3_cpu.kernels.columns import AT_ONCE, add_rows
from dsv3_cpu.kernels.dots import STREAMS, dots
from dsv3_cpu.kernels.numbers import put, widen
from dsv3_cpu.processor import LANES

ROOM = 8 * LANES  # beyond the depth of a row and the width of a total, so that whole steps fit
_STEP = 2 * LANES  # numbers that the planes of bfloat16 take turns in
_WHOLE = 4 * LANES


def heads(team, me, crew, x, flat, sh, sa, sc, y):
    """y[t, h] = x[t, h] @ w[h], w [Nh, A, C] in flat storage with these strides, of which sa or sc is 1."""
    depth, width = x.shape[2], y.shape[2]
    row, total = np.zeros(depth + ROOM, np.float32), np.empty(width + ROOM, np.float32)
    h = take(team, 0)
    while h < x.shape[1]:
        for t in range(x.shape[0]):
            for a in range(depth):
                row[along(flat, sa, a)] = widen(x[t, h, a])
            head(flat, h * sh, sa, sc, row, depth, width, total)
            for c in range(width):
                put(y, (t, h, c), total[across(flat, sa, width, c)])
        h = take(team, 0)


def along(flat, sa, a):
    """Where number a of a row is for `head`."""


@overloads(along)
def _along(flat, sa, a):
    if flat.dtype == types.uint16:
        return lambda flat, sa, a: a // _STEP * _STEP + a % 2 * LANES + a % _STEP // 2 if sa == 1 else a
    return lambda flat, sa, a: a


def across(flat, sa, width, c):
    """Where `head` leaves number c of a total."""


@overloads(across)
def _across(flat, sa, width, c):
    if flat.dtype == types.uint16:
        return lambda flat, sa, width, c: (
            c // _STEP * _STEP + c % 2 * LANES + c % _STEP // 2 if sa != 1 and c < width // _WHOLE * _WHOLE else c
        )
    return lambda flat, sa, width, c: c


def head(flat, base, sa, sc, row, depth, width, total):
    """total = row @ the matrix [depth, width] at flat[base]; row placed by `along` and zero after depth, total by `across`."""


@overloads(head)
def _head(flat, base, sa, sc, row, depth, width, total):
    name, item = ("bf16", 2) if flat.dtype == types.uint16 else ("f32", 4)
    of_rows, several, one = dots(name, 1, STREAMS), add_rows(name, AT_ONCE), add_rows(name, 1)

    def run(flat, base, sa, sc, row, depth, width, total):
        at = flat.ctypes.data + item * base
        if sa == 1:
            step, share, to = item * sc, width // STREAMS, total.ctypes.data
            rest = width - share * STREAMS
            for i in range(share + min(1, rest)):  # as in product.py
                c, by, most = (i, share, STREAMS) if i < share else (share * STREAMS, 1, rest)
                of_rows(at + c * step, by * step, most, 0, 0, row.ctypes.data, 0, 1, item * depth, to + 4 * c, 4 * by)
            return
        whole = width // _WHOLE * _WHOLE
        total[:whole] = 0
        share, line = depth // AT_ONCE, item * sa
        for a in range(share):
            several(row.ctypes.data + 4 * a, 4 * share, at + a * line, share * line, total.ctypes.data, whole)
        for a in range(share * AT_ONCE, depth):
            one(row.ctypes.data + 4 * a, 0, at + a * line, 0, total.ctypes.data, whole)
        for c in range(whole, width):
            part = np.float32(0)
            for a in range(depth):
                part += row[a] * widen(flat[base + a * sa + c])
            total[c] = part

    return run
