"""Absorbed attention over the paged latent cache, with softmax accumulated block by block (Milakov and Gimelshein 2018)."""

from __future__ import annotations

import numpy as np

from dsv3_cpu.compile import inner
from dsv3_cpu.kernels.latent import read
from dsv3_cpu.kernels.numbers import exp, widen
from dsv3_cpu.programs import kernel

BLOCK = 32  # keys that are widened at a time and then met by every head of a group

_NOTHING = np.float32(-np.inf)


@inner
def score_keys(q, t, h, block, count, scale, scores):
    """scores[i] = q[t, h] . block[i] * scale for i below count, four keys at a time."""
    for i in range(0, count, 4):
        i1, i2, i3 = min(i + 1, count - 1), min(i + 2, count - 1), min(i + 3, count - 1)
        a, b, c, d = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
        for k in range(q.shape[2]):
            v = q[t, h, k]
            a += v * block[i, k]
            b += v * block[i1, k]
            c += v * block[i2, k]
            d += v * block[i3, k]
        scores[i] = a * scale
        scores[i1] = b * scale
        scores[i2] = c * scale
        scores[i3] = d * scale


@inner
def weigh(scores, count, state, n):
    """Scores of count keys to probabilities relative to the largest so far -> what earlier sums shrink by.

    state[n]: the largest score, and the sum.
    """
    largest = state[n, 0]
    for i in range(count):
        if scores[i] > largest or scores[i] != scores[i]:
            largest = scores[i]
    shrink = exp(state[n, 0] - largest) if state[n, 0] > _NOTHING else np.float32(0)
    total = state[n, 1] * shrink
    for i in range(count):
        p = exp(scores[i] - largest) if scores[i] != _NOTHING else np.float32(0)
        scores[i] = p
        total += p
    state[n, 0], state[n, 1] = largest, total
    return shrink


@inner
def add_values(p, block, count, shrink, acc, n):
    """acc[n] = acc[n] * shrink + p @ block's values, four keys at a time."""
    rank = acc.shape[1]
    for r in range(rank):
        acc[n, r] *= shrink
    for i in range(0, count, 4):
        a = p[i]
        # Keys past the last count nothing, and are not read: what is there may be NaN.
        i1, b = (i + 1, p[i + 1]) if i + 1 < count else (i, np.float32(0))
        i2, c = (i + 2, p[i + 2]) if i + 2 < count else (i, np.float32(0))
        i3, d = (i + 3, p[i + 3]) if i + 3 < count else (i, np.float32(0))
        for r in range(rank):
            acc[n, r] += a * block[i, r] + b * block[i1, r] + c * block[i2, r] + d * block[i3, r]


@kernel
def absorbed(
    team,
    me,
    crew,
    q,
    table,
    lengths,
    bounds,
    scale,
    start,
    page_size,
    group,
    latents,
    lp,
    ls,
    keys,
    kp,
    ks,
    scales,
    sp,
    ss,
    o,
    lse,
):
    """q [T, Nh, R + P] float32; o [T, Nh, R] of zeros and lse [Nh, T] of -inf get the results. group: heads that share the
    widening of a key; results do not depend on it."""
    groups = (q.shape[1] + group - 1) // group
    for p in range(me, lengths.shape[0] * groups, crew):
        attend(p // groups, (p % groups) * group, group, q, table, lengths, bounds, np.float32(scale), start, page_size,
               latents, lp, ls, keys, kp, ks, scales, sp, ss, o, lse)  # fmt: skip


@inner
def attend(
    s, h0, group, q, table, lengths, bounds, scale, start, page_size, latents, lp, ls, keys, kp, ks, scales, sp, ss, o, lse
):
    """Some heads of sequence s, from h0 on."""
    rank, heads = o.shape[2], min(group, q.shape[1] - h0)
    first, length = np.int64(bounds[s]), np.int64(lengths[s])
    queries = np.int64(bounds[s + 1]) - first
    if queries <= 0 or length <= start:
        return
    block = np.empty((BLOCK, q.shape[2]), np.float32)
    scores = np.empty(BLOCK, np.float32)
    state = np.zeros((queries * heads, 2), np.float32)
    acc = np.zeros((queries * heads, rank), np.float32)
    for n in range(queries * heads):
        state[n, 0] = _NOTHING
    for begin in range(start, length, BLOCK):
        count = min(BLOCK, length - begin)
        for i in range(count):
            page, offset = np.int64(table[s, (begin + i) // page_size]), (begin + i) % page_size
            read(latents, page * lp + offset * ls, scales, page * sp + offset * ss, rank, block, i)
            for k in range(q.shape[2] - rank):
                block[i, rank + k] = widen(keys[page * kp + offset * ks + k])
        for j in range(queries):
            seen = min(count, length - queries + j + 1 - begin)
            if seen > 0:
                for h in range(heads):
                    score_keys(q, first + j, h0 + h, block, seen, scale, scores)
                    add_values(scores, block, seen, weigh(scores, seen, state, j * heads + h), acc, j * heads + h)
    for n in range(queries * heads):
        t, h = first + n // heads, h0 + n % heads
        if state[n, 0] != _NOTHING:
            over = np.float32(1) / state[n, 1]
            for r in range(rank):
                o[t, h, r] = acc[n, r] * over
            lse[h, t] = state[n, 0] + np.log(state[n, 1])
