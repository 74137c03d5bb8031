"""Products with absorbed weights: one small matrix per head, as it lies in a larger weight, along its rows or across."""

from __future__ import annotations

import numpy as np
from numba.core import types

from dsv3_cpu.compile import overloads
from dsv3_cpu.kernels.atoms import take
from dsv3_cpu.kernels.columns import AT_ONCE, add_rows
from dsv3_cpu.kernels.dots import STREAMS, dots
from dsv3_cpu.kernels.numbers import put, widen
from dsv3_cpu.kernels.order import pack, spread
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
            place(flat, sa, x, t, h, depth, row)
            head(flat, h * sh, sa, sc, row, depth, width, total)
            answer(flat, sa, total, y, t, h)
        h = take(team, 0)


def place(flat, sa, x, t, h, depth, row):
    """row = the first `depth` numbers of x[t, h], as `head` wants them; zeros after them stay."""


@overloads(place)
def _place(flat, sa, x, t, h, depth, row):
    item = x.dtype.bitwidth // 8

    def plain(flat, sa, x, t, h, depth, row):
        for a in range(depth):
            row[a] = widen(x[t, h, a])

    if flat.dtype != types.uint16:
        return plain
    in_planes = spread(2, x.dtype == types.uint16)

    def planes(flat, sa, x, t, h, depth, row):
        if sa != 1:
            for a in range(depth):
                row[a] = widen(x[t, h, a])
            return
        whole = depth // _STEP * _STEP
        in_planes(x.ctypes.data + item * ((t * x.shape[1] + h) * x.shape[2]), whole, row.ctypes.data)
        for a in range(whole, depth):
            row[whole + a % 2 * LANES + (a - whole) // 2] = widen(x[t, h, a])

    return planes


def answer(flat, sa, total, y, t, h):
    """y[t, h] = total, as `head` leaves it."""


@overloads(answer)
def _answer(flat, sa, total, y, t, h):
    narrow = y.dtype == types.uint16

    def plain(flat, sa, total, y, t, h):
        for c in range(y.shape[2]):
            put(y, (t, h, c), total[c])

    def packed(flat, sa, total, y, t, h):
        width = y.shape[2]
        whole = 0 if sa == 1 else width // _WHOLE * _WHOLE
        pack(total.ctypes.data, np.float32(1), whole, y.ctypes.data + 2 * (t * y.shape[1] + h) * width)
        for c in range(whole, width):
            put(y, (t, h, c), total[c])

    def unpacked(flat, sa, total, y, t, h):
        whole = 0 if sa == 1 else y.shape[2] // _WHOLE * _WHOLE
        for c in range(whole):
            put(y, (t, h, c), total[c // _STEP * _STEP + c % 2 * LANES + c % _STEP // 2])
        for c in range(whole, y.shape[2]):
            put(y, (t, h, c), total[c])

    if flat.dtype != types.uint16:
        return plain
    return packed if narrow else unpacked


def head(flat, base, sa, sc, row, depth, width, total):
    """total = row @ the matrix [depth, width] at flat[base]; row as `place` leaves it, zero after depth, total for `answer`."""


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
