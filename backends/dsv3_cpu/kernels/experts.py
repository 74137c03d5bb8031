"""The mixture of experts of a few tokens, whole: routing, gate and up with their activation, down with the weighted sum."""

from __future__ import annotations

import numpy as np

from dsv3_cpu.compile import inner
from dsv3_cpu.kernels.atoms import take, wait_for_all
from dsv3_cpu.kernels.numbers import put, sigmoid, widen
from dsv3_cpu.kernels.product import ask_first, scratch_for, sums_of
from dsv3_cpu.kernels.routing import choose_row
from dsv3_cpu.kernels.rows import arrange

ROUTING, UP, DOWN = 0, 1, 2  # phases


@inner
def sort_pairs(ids, weights, local, n_experts, experts, offsets, token, factor):
    """The (token, expert) pairs sorted by expert, stably -> number of experts that have any, first in experts [T * k].

    ids [T, k], by way of local [Eg] unless it is empty; pairs whose expert is not in [0, n_experts) are left out. Row r of the
    sorted order is of token[r], and counts factor[r]; rows offsets[j] to offsets[j + 1] are those of experts[j].
    """
    k = ids.shape[1]
    starts = np.zeros(n_experts, np.int64)
    for t in range(ids.shape[0]):
        for j in range(k):
            e = ids[t, j] if local.shape[0] == 0 else local[ids[t, j]]
            if 0 <= e < n_experts:
                starts[e] += 1
    used = 0
    offsets[0] = 0
    for e in range(n_experts):
        if starts[e]:
            experts[used] = e
            offsets[used + 1] = offsets[used] + starts[e]
            starts[e] = offsets[used]
            used += 1
    for t in range(ids.shape[0]):
        for j in range(k):
            e = ids[t, j] if local.shape[0] == 0 else local[ids[t, j]]
            if 0 <= e < n_experts:
                row = starts[e]
                starts[e] = row + 1
                token[row], factor[row] = t, weights[t, j]
    return used


@inner
def gated_tile(w, s, e, first, last, x, index, start, end, scratch, up_scratch, h, to):
    """h[to + i] = silu(gate) * up of row index[start + i] of arranged x, for rows first to last of the gate."""
    half = w.shape[1] // 2
    ask_first(w, e, half + first, half + last)
    sums_of(w, s, e, first, last, x, index, start, end, scratch)
    sums_of(w, s, e, half + first, half + last, x, index, start, end, up_scratch)
    gates, ups = scratch[3], up_scratch[3]
    for i in range(end - start):
        for n in range(last - first):
            g = gates[i, n]
            h[to + i, first + n] = (g * sigmoid(g)) * ups[i, n]


@inner
def mixture(
    team, me, crew, w13, s13, w2, s2, shared13, t13, shared2, t2, experts, offsets, token, factor, used, x, xs, tile, snapped,
    h, hs, a, shared_a, y,
):  # fmt: skip
    """Both products over all experts of the sorted pairs, and over the shared ones unless they are of no width.

    x, xs: tokens arranged for w13 and shared13; scratch: h [pairs, I], hs [T, Is], and both arranged for w2 and shared2;
    y [T, H] gets the sums. tile: outputs that a thread takes at a time. snapped: INT8 activations, see `arrange`.
    """
    tokens, most = y.shape[0], 1
    for j in range(used):
        most = max(most, offsets[j + 1] - offsets[j])
    half, half_shared = w13.shape[1] // 2, shared13.shape[1] // 2
    gates, ups = scratch_for(x, most, tile), scratch_for(x, most, tile)
    shared_gates, shared_ups = scratch_for(xs, tokens, tile), scratch_for(xs, tokens, tile)
    everyone = np.arange(tokens)
    tiles, shared_tiles = (half + tile - 1) // tile, (half_shared + tile - 1) // tile
    p = take(team, UP)
    while p < used * tiles + shared_tiles:
        if p < used * tiles:
            j = p // tiles
            first = (p - j * tiles) * tile
            gated_tile(w13, s13, experts[j], first, min(half, first + tile), x, token, offsets[j], offsets[j + 1], gates, ups,
                       h, offsets[j])  # fmt: skip
        else:
            first = (p - used * tiles) * tile
            gated_tile(shared13, t13, 0, first, min(half_shared, first + tile), xs, everyone, 0, tokens, shared_gates,
                       shared_ups, hs, 0)  # fmt: skip
        p = take(team, UP)
    wait_for_all(team, crew)
    for r in range(me, offsets[used], crew):
        arrange(w2, s2, h, r, a, r, snapped)
    if half_shared:
        for t in range(crew - 1 - me, tokens, crew):
            arrange(shared2, t2, hs, t, shared_a, t, snapped)
    wait_for_all(team, crew)
    scratch, shared_scratch, pairs = scratch_for(a, most, tile), scratch_for(shared_a, tokens, tile), np.arange(h.shape[0])
    sums, shared_sums = scratch[3], shared_scratch[3]
    total = np.empty((tokens, tile), np.float32)
    p = take(team, DOWN)
    while p * tile < y.shape[1]:
        first = p * tile
        last = min(y.shape[1], first + tile)
        total[:] = 0
        for j in range(used):
            if j + 1 < used:
                ask_first(w2, experts[j + 1], first, last)
            sums_of(w2, s2, experts[j], first, last, a, pairs, offsets[j], offsets[j + 1], scratch)
            for i in range(offsets[j + 1] - offsets[j]):
                t, share = token[offsets[j] + i], factor[offsets[j] + i]
                for n in range(last - first):
                    total[t, n] += share * sums[i, n]
        if half_shared:
            sums_of(shared2, t2, 0, first, last, shared_a, everyone, 0, tokens, shared_scratch)
            for t in range(tokens):
                for n in range(last - first):
                    total[t, n] += shared_sums[t, n]
        for t in range(tokens):
            for n in range(first, last):
                put(y, (t, n), total[t, n - first])
        p = take(team, DOWN)


def fused(
    team, me, crew, w13, s13, w2, s2, shared13, t13, shared2, t2, tile, snapped, pairs, factor, x, weights, ids, local,
    arranged, shared, h, hs, a, shared_a, y,
):  # fmt: skip
    """Experts of tokens whose routing is known. pairs [3, T * k + 1] int64, factor [T * k]: scratch of the sort; the others as
    `mixture` has them."""
    prepare(me, crew, w13, s13, shared13, t13, x, arranged, shared, snapped)
    if me == 0:
        pairs[2, pairs.shape[1] - 1] = sort_pairs(ids, weights, local, w13.shape[0], pairs[0], pairs[1], pairs[2], factor)
    wait_for_all(team, crew)
    used = pairs[2, pairs.shape[1] - 1]
    mixture(team, me, crew, w13, s13, w2, s2, shared13, t13, shared2, t2, pairs[0], pairs[1], pairs[2], factor, used, arranged,
            shared, tile, snapped, h, hs, a, shared_a, y)  # fmt: skip


@inner
def prepare(me, crew, w13, s13, shared13, t13, x, arranged, shared, snapped):
    """Tokens arranged for both weights."""
    for t in range(me, x.shape[0], crew):
        arrange(w13, s13, x, t, arranged, t, snapped)
        if shared13.shape[1]:
            arrange(shared13, t13, x, t, shared, t, snapped)


def layer(
    team, me, crew, w13, s13, w2, s2, shared13, t13, shared2, t2, tile, snapped, pairs, factor, x, weights, ids, local,
    arranged, shared, h, hs, a, shared_a, y, gate, gate_scales, bias, logits, for_gate, n_group, kept, mode, group_mode,
    renormalize, scale,
):  # fmt: skip
    """`fused` with its routing: ids and weights are scratch here, logits [T, Eg] and for_gate [T, ..] too."""
    for t in range(me, x.shape[0], crew):
        arrange(gate, gate_scales, x, t, for_gate, t, 0)
    prepare(me, crew, w13, s13, shared13, t13, x, arranged, shared, snapped)
    wait_for_all(team, crew)
    step, everyone = 16, np.arange(x.shape[0])
    scratch = scratch_for(for_gate, x.shape[0], step)
    p = take(team, ROUTING)
    while p * step < gate.shape[1]:
        last = min(gate.shape[1], (p + 1) * step)
        sums_of(gate, gate_scales, 0, p * step, last, for_gate, everyone, 0, x.shape[0], scratch)
        for t in range(x.shape[0]):
            for n in range(p * step, last):
                logits[t, n] = scratch[3][t, n - p * step]
        p = take(team, ROUTING)
    wait_for_all(team, crew)
    if me == 0:
        for t in range(x.shape[0]):
            choose_row(logits, t, bias, n_group, kept, mode, group_mode, renormalize, scale, weights, ids)
        pairs[2, pairs.shape[1] - 1] = sort_pairs(ids, weights, local, w13.shape[0], pairs[0], pairs[1], pairs[2], factor)
    wait_for_all(team, crew)
    used = pairs[2, pairs.shape[1] - 1]
    mixture(team, me, crew, w13, s13, w2, s2, shared13, t13, shared2, t2, pairs[0], pairs[1], pairs[2], factor, used, arranged,
            shared, tile, snapped, h, hs, a, shared_a, y)  # fmt: skip


def combine(team, me, crew, y, place, weights, out):
    """out[t] = sum over j of weights[t, j] * y[its row], in float32, in the order of j, rounded once; pairs without a row are
    ignored. place [T * k]: each pair's row, or -1."""
    k = weights.shape[1]
    total = np.empty(out.shape[1], np.float32)
    for t in range(me, out.shape[0], crew):
        total[:] = 0
        for j in range(k):
            row = place[t * k + j]
            if row >= 0:
                factor = weights[t, j]
                for i in range(out.shape[1]):
                    total[i] += factor * widen(y[row, i])
        for i in range(out.shape[1]):
            put(out, (t, i), total[i])
