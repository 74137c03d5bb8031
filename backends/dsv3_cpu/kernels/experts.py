"""What stands between the products of the experts: sorting rows by expert, and summing them per token."""

from __future__ import annotations

import numpy as np
from numba import prange

from dsv3_cpu.compile import kernel
from dsv3_cpu.kernels.numbers import put, widen


@kernel
def spread(ids, x, place, starts, experts, offsets, rows):
    """Rows of x [T, H], sorted by the expert of ids [T, k], stably, into rows [T * k, H] -> number of experts that have any.

    place [T * k] gets each pair's row, -1 for a pair whose id is not in [0, E); starts [E] is scratch; the experts that have
    rows come first in experts [T * k], and rows offsets[j] to offsets[j + 1] are those of experts[j].
    """
    n_experts, k = starts.shape[0], ids.shape[1]
    starts[:] = 0
    for t in range(ids.shape[0]):
        for j in range(k):
            if 0 <= ids[t, j] < n_experts:
                starts[ids[t, j]] += 1
    used = 0
    offsets[0] = 0
    for e in range(n_experts):
        count = starts[e]
        if count:
            experts[used] = e
            starts[e] = offsets[used]
            offsets[used + 1] = offsets[used] + count
            used += 1
    for t in range(ids.shape[0]):
        for j in range(k):
            e = ids[t, j]
            row = np.int64(-1)
            if 0 <= e < n_experts:
                row = starts[e]
                starts[e] = row + 1
                for i in range(x.shape[1]):
                    rows[row, i] = x[t, i]
            place[t * k + j] = row
    return used


@kernel
def combine(y, place, weights, out):
    """out[t] = sum over j of weights[t, j] * y[its row], in float32, in the order of j, rounded once; pairs without a row are
    ignored."""
    k = weights.shape[1]
    for t in prange(out.shape[0]):
        total = np.zeros(out.shape[1], np.float32)
        for j in range(k):
            row = place[t * k + j]
            if row >= 0:
                factor = weights[t, j]
                for i in range(out.shape[1]):
                    total[i] += factor * widen(y[row, i])
        for i in range(out.shape[1]):
            put(out, (t, i), total[i])
