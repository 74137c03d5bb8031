"""Products of few rows with weights of any format: one weight, or many experts', in one call."""

from __future__ import annotations

import numpy as np

from dsv3_cpu.compile import inner, overloads
from dsv3_cpu.kernels.atoms import take, wait_for_all
from dsv3_cpu.kernels.dots import ROWS, at_once, dots
from dsv3_cpu.kernels.lanes import GROUP
from dsv3_cpu.kernels.numbers import put
from dsv3_cpu.kernels.rows import arrange, kind, ready, row_factor, snap

AT_ONCE = 4  # rows of x that share one decoding of a weight, at most


def strip(w, s, e, n, last, at, length, width, out):
    """Sums of some rows of expert e from n on, below last, with `width` rows of x (1, 2, or 3 and 4) at an address, each
    `length` numbers long, into out as `dots` has it."""


@overloads(strip)
def _strip(w, s, e, n, last, at, length, width, out):
    name = kind(w, s)
    one, two, four = (dots(name, columns) for columns in (1, 2, 4))
    item, scaled = w.dtype.bitwidth // 8, s.ndim == 3

    def multiply(w, s, e, n, last, at, length, width, out):
        size = w.shape[2] * item
        row = w.ctypes.data + (e * w.shape[1] + n) * size
        stride = s.shape[2] * 4 if scaled else 0
        scale = s.ctypes.data + (e * s.shape[1] + n) * stride
        if width == 1:
            one(row, size, last - n, scale, stride, at, 4 * length, 1, size, out)
        elif width == 2:
            two(row, size, last - n, scale, stride, at, 4 * length, 2, size, out)
        else:
            four(row, size, last - n, scale, stride, at, 4 * length, width, size, out)

    return multiply


def together(w, s):
    """See `at_once`."""


@overloads(together)
def _together(w, s):
    most = at_once(kind(w, s))
    return lambda w, s: most


@inner
def scratch_for(columns, rows, tile):
    """What `sums_of` needs for up to `rows` rows of x of so many arranged columns: folded, undo, parts, sums."""
    return (
        np.empty((AT_ONCE, columns), np.float32), np.empty(AT_ONCE), np.empty(ROWS * AT_ONCE, np.float32),
        np.empty((rows, tile), np.float32),
    )  # fmt: skip


@inner
def sums_of(w, s, e, first, last, x, index, start, end, scratch):
    """sums[i, n - first] = arranged x[index[start + i]] . row n of expert e, for first <= n < last; sums is scratch[3]."""
    folded, undo, parts, sums = scratch
    block = first
    while block < last:
        stop = min(last, (block // GROUP + 1) * GROUP)
        i = start
        while i < end:
            width = min(together(w, s), end - i)
            at = ready(w, s, e, block, x, index, i, width, folded, undo)
            length = folded.shape[1] if at == folded.ctypes.data else x.shape[1]
            columns = 4 if width > 2 else width
            n = block
            while n < stop:
                strip(w, s, e, n, stop, at, length, width, parts.ctypes.data)
                for r in range(min(ROWS, stop - n)):
                    factor = row_factor(w, s, e, n + r)
                    for c in range(width):
                        sums[i - start + c, n + r - first] = np.float32(np.float64(parts[r * columns + c]) * undo[c]) * factor
                n += ROWS
            i += width
        block = stop


@inner
def most_rows(experts, offsets):
    """Rows of the expert that has most."""
    most = 0
    for j in range(experts.shape[0]):
        most = max(most, offsets[j + 1] - offsets[j])
    return most


def grouped(team, me, crew, w, s, experts, offsets, x, arranged, tile, snapped, y):
    """y[offsets[j] : offsets[j + 1]] = x[the same] @ w[experts[j]]^T for every j. arranged [M, K up to whole steps]: scratch;
    tile: rows of a weight that a thread takes at a time, of which 128 is a multiple. snapped: INT8 activations, see `snap`."""
    for t in range(me, x.shape[0], crew):
        arrange(w, s, x, t, arranged, t)
        snap(w, s, arranged, t, snapped)
    wait_for_all(team, crew)
    scratch, index = scratch_for(arranged.shape[1], most_rows(experts, offsets), tile), np.arange(x.shape[0])
    sums = scratch[3]
    tiles = (w.shape[1] + tile - 1) // tile
    p = take(team, 0)
    while p < experts.shape[0] * tiles:
        j = p // tiles
        first = (p - j * tiles) * tile
        last, start, end = min(w.shape[1], first + tile), offsets[j], offsets[j + 1]
        sums_of(w, s, experts[j], first, last, arranged, index, start, end, scratch)
        for i in range(end - start):
            for n in range(first, last):
                put(y, (start + i, n), sums[i, n - first])
        p = take(team, 0)
