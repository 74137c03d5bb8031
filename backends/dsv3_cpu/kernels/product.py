"""Products of few rows with weights of any format: one weight, or many experts', in one call."""

from __future__ import annotations

import numpy as np
from numba.core import types

from dsv3_cpu.compile import inner, overloads
from dsv3_cpu.constants import GROUP, LINE_BYTES
from dsv3_cpu.kernels.atoms import fetch, take, wait_for_all
from dsv3_cpu.kernels.dots import AHEAD, STREAMS, dots, rows_beside
from dsv3_cpu.kernels.numbers import put
from dsv3_cpu.kernels.rows import arrange, kind, ready, row_factor
from dsv3_cpu.kernels.whole import whole_dots, whole_rows_beside

AT_ONCE = 4  # rows of x that share one decoding of a weight, at most


def strip(w, s, e, n, last, x, at, length, width, out):
    """out[r * columns + c]: row n + r, below last, of expert e times row c of `width` (1, 2, or 3 and 4, these being the
    columns) at an address, arranged as those of x, each `length` numbers long. out: an address."""


@overloads(strip)
def _strip(w, s, e, n, last, x, at, length, width, out):
    name, item, scaled, size_of = kind(w, s), w.dtype.bitwidth // 8, s.ndim == 3, x.dtype.bitwidth // 8
    dot, beside = (dots, rows_beside) if x.dtype == types.float32 else (whole_dots, whole_rows_beside)
    loops = {columns: _rows_of(dot, name, columns, beside(name, columns)) for columns in (1, 2, 4)}
    one, two, four = loops[1], loops[2], loops[4]

    def multiply(w, s, e, n, last, x, at, length, width, out):
        size = w.shape[2] * item
        row, step = w.ctypes.data + (e * w.shape[1] + n) * size, size_of * length
        stride = s.shape[2] * 4 if scaled else 0
        scale = s.ctypes.data + (e * s.shape[1] + n) * stride
        if width == 1:
            one(row, size, last - n, scale, stride, at, step, 1, out)
        elif width == 2:
            two(row, size, last - n, scale, stride, at, step, 2, out)
        else:
            four(row, size, last - n, scale, stride, at, step, width, out)

    return multiply


def _rows_of(dot, name, columns, rows):
    """A function of `count` rows of a weight: as many streams as `rows`, each over its share of them, then what is left over,
    with up to `rows - 1` sums after the last that mean nothing."""
    several, step = dot(name, columns, rows), 4 * columns

    @inner
    def run(row, size, count, scale, stride, at, x_stride, width, out):
        share = count // rows
        rest = count - share * rows
        for i in range(share + min(1, rest)):
            r, by, most = (i, share, rows) if i < share else (share * rows, 1, rest)
            several(row + r * size, by * size, most, scale + r * stride, by * stride, at, x_stride, width, size,
                    out + step * r, step * by)  # fmt: skip

    return run


def blockwise(w, s):
    """Whether x is prepared anew for every 128 rows of the weight."""


@overloads(blockwise)
def _blockwise(w, s):
    found = kind(w, s) == "fp8"
    return lambda w, s: found


@inner
def scratch_for(x, rows, tile):
    """What `sums_of` needs for up to `rows` rows of arranged x: folded, undo, parts, sums."""
    return (
        np.empty((AT_ONCE, x.shape[1]), x.dtype), np.empty(AT_ONCE), np.empty((tile + STREAMS) * AT_ONCE, np.float32),
        np.empty((rows, tile), np.float32),
    )  # fmt: skip


@inner
def ask_first(w, e, first, last):
    """Asks memory for the beginnings of the rows that will be read together, see `_rows_of`."""
    size = w.shape[2] * w.itemsize
    at, by = w.ctypes.data + (e * w.shape[1] + first) * size, (last - first) // STREAMS * size
    for r in range(STREAMS):
        for k in range(0, min(size, AHEAD), LINE_BYTES):
            fetch(at + r * by + k)


@inner
def sums_of(w, s, e, first, last, x, index, start, end, scratch):
    """sums[i, n - first] = arranged x[index[start + i]] . row n of expert e, for first <= n < last; sums is scratch[3]."""
    folded, undo, parts, sums = scratch
    block = first
    while block < last:
        stop = min(last, (block // GROUP + 1) * GROUP) if blockwise(w, s) else last
        ask_first(w, e, block, stop)
        i = start
        while i < end:
            width = min(AT_ONCE, end - i)
            at = ready(w, s, e, block, x, index, i, width, folded, undo)
            columns = 4 if width > 2 else width
            strip(w, s, e, block, stop, x, at, x.shape[1], width, parts.ctypes.data)
            for c in range(width):
                for r in range(stop - block):
                    part = np.float32(np.float64(parts[r * columns + c]) * undo[c])
                    sums[i - start + c, block + r - first] = part * row_factor(w, s, e, block + r)
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
    tile: rows of a weight that a thread takes at a time. snapped: INT8 activations, see `arrange`."""
    for t in range(me, x.shape[0], crew):
        arrange(w, s, x, t, arranged, t, snapped)
    wait_for_all(team, crew)
    scratch, index = scratch_for(arranged, most_rows(experts, offsets), tile), np.arange(x.shape[0])
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
