"""Absorbed attention over the paged latent cache, with softmax accumulated block by block (Milakov and Gimelshein 2018).

A sequence's keys are split among tasks and a second phase merges what they found, so that one sequence occupies all threads.
Where they are split depends on their places alone: sums are made in the same order whoever else is in the batch, and whether a
token is decoded or verified as a draft.
Where the cache's rows are whole vectors they are multiplied as they lie; else they are widened to float32 first.
"""

from __future__ import annotations

import numpy as np
from numba.core import types

from dsv3_cpu.compile import inner, overloads
from dsv3_cpu.constants import HEADS, LINE_BYTES
from dsv3_cpu.constants import edge as _edge
from dsv3_cpu.kernels.atoms import fetch, take, wait_for_all
from dsv3_cpu.kernels.lanes import FORMATS
from dsv3_cpu.kernels.latent import read
from dsv3_cpu.kernels.numbers import exp, put, widen
from dsv3_cpu.kernels.order import pack, spread
from dsv3_cpu.kernels.scores import AHEAD, FOUR, PAIR, mix, scores
from dsv3_cpu.processor import LANES

BLOCK = 64  # keys that are met by all heads of a task before the next ones; tasks have multiples of FOUR heads
NEAR = 16  # keys whose values all heads add up before the next ones: what a core's nearest cache holds
WIDTH = FORMATS["f32"].numbers  # to whose multiple widened rows are padded

edge = inner(_edge)
_NOTHING = np.float32(-np.inf)
ATTEND, MERGE = 0, 1  # phases


def score(flat, base, stride, rest, rest_base, rest_stride, rest_size, count, q, q_stride, rows, size, found, h, scale):
    """found[h + c, i] = q[c] . (row i at flat[base], then row i at rest[rest_base]) * scale[0], for c below `rows`, at most
    four, and i below count; q arranged, at an address; size, rest_size: numbers of a row."""


@overloads(score)
def _score(flat, base, stride, rest, rest_base, rest_stride, rest_size, count, q, q_stride, rows, size, found, h, scale):
    name = "bf16" if flat.dtype == types.uint16 else "f32"
    multiply, item = scores(name), flat.dtype.bitwidth // 8

    def run(flat, base, stride, rest, rest_base, rest_stride, rest_size, count, q, q_stride, rows, size, found, h, scale):
        to, across = found.ctypes.data + 4 * h * found.shape[1], 4 * found.shape[1]
        at, more = flat.ctypes.data + item * base, rest.ctypes.data + item * rest_base
        for i in range(0, count, PAIR):
            multiply(at + item * i * stride, item * stride, item * size, more + item * i * rest_stride, item * rest_stride,
                     item * rest_size, count - i, q, q_stride, rows, scale.ctypes.data, to + 4 * i, across)  # fmt: skip

    return run


def gather_values(flat, base, stride, first, count, found, h, shrink, nothing, acc, n, size, ahead):
    """acc[n + c] = acc[n + c] * shrink[h + c] + found[h + c, first:] @ the rows from number first on at flat[base], for four
    heads. nothing [1, size]: zeros to take for acc, or empty. ahead: where the rows lie that are to be asked for."""


@overloads(gather_values)
def _gather_values(flat, base, stride, first, count, found, h, shrink, nothing, acc, n, size, ahead):
    name = "bf16" if flat.dtype == types.uint16 else "f32"
    add, item = mix(name, FOUR), flat.dtype.bitwidth // 8

    def run(flat, base, stride, first, count, found, h, shrink, nothing, acc, n, size, ahead):
        p = found.ctypes.data + 4 * (h * found.shape[1] + first)
        sums = acc.ctypes.data + 4 * n * acc.shape[1]
        at = flat.ctypes.data + item * (base + first * stride)
        line = 4 * acc.shape[1]
        before, by = (nothing.ctypes.data, 0) if nothing.shape[0] else (sums, line)
        add(p, 4 * found.shape[1], at, item * stride, count, shrink.ctypes.data + 4 * h, before, by, sums, line, size,
            flat.ctypes.data + item * ahead)  # fmt: skip

    return run


def arrange(flat, source, t, h, out, row, at):
    """out[row, at:] = source[t, h], in the order of the planes of flat's format; whole steps of them."""


@overloads(arrange)
def _arrange(flat, source, t, h, out, row, at):
    if flat.dtype != types.uint16:
        return _widened
    copy, item = spread(FORMATS["bf16"].shared, source.dtype == types.uint16), source.dtype.bitwidth // 8

    def run(flat, source, t, h, out, row, at):
        size = source.shape[2]
        to = out.ctypes.data + 4 * (row * out.shape[1] + at)
        copy(source.ctypes.data + item * (t * source.shape[1] + h) * size, size, to)

    return run


def _widened(flat, source, t, h, out, row, at):
    for k in range(source.shape[2]):
        out[row, at + k] = widen(source[t, h, k])


plain = inner(_widened)


def answer(flat, total, factor, o, t, h):
    """o[t, h] = total * factor, total being in the order of the planes of flat's format."""


@overloads(answer)
def _answer(flat, total, factor, o, t, h):
    if flat.dtype != types.uint16:
        return _answered
    if o.dtype == types.uint16:

        def packed(flat, total, factor, o, t, h):
            size = o.shape[2]
            pack(total.ctypes.data, factor, size, o.ctypes.data + 2 * (t * o.shape[1] + h) * size)

        return packed

    def run(flat, total, factor, o, t, h):
        for first in range(0, o.shape[2], 2 * LANES):
            for k in range(LANES):
                put(o, (t, h, first + 2 * k), total[first + k] * factor)
                put(o, (t, h, first + 2 * k + 1), total[first + LANES + k] * factor)

    return run


def _answered(flat, total, factor, o, t, h):
    for k in range(o.shape[2]):
        put(o, (t, h, k), total[k] * factor)


plain_answer = inner(_answered)


@inner
def weigh(scores, h, count, largest, total):
    """Scores of count keys to probabilities relative to the largest so far -> (what earlier sums shrink by, the largest, the
    sum)."""
    most = largest
    for i in range(count):
        if scores[h, i] > most or scores[h, i] != scores[h, i]:
            most = scores[h, i]
    shrink = exp(largest - most) if largest > _NOTHING else np.float32(0)
    sums = np.float32(0)
    for i in range(count):
        p = exp(scores[h, i] - most) if scores[h, i] != _NOTHING else np.float32(0)
        scores[h, i] = p
        sums += p
    return shrink, most, total * shrink + sums


def absorbed(
    team, me, crew, q_c, q_pe, table, lengths, bounds, scale, start, page_size, direct, latents, lp, ls, keys, kp, ks, scales,
    sp, ss, each, together, acc, state, o, lse,
):  # fmt: skip
    """q_c [T, Nh, R], q_pe [T, Nh, P] -> o [T, Nh, R], lse [Nh, T]. together: heads, up to HEADS, that a task takes. direct:
    rows of the cache are whole vectors, and not FP8.

    each: keys of a part, see `edge`. acc [parts, T, Nh up to a multiple of four, R up to WIDTH] and state [parts, T, the
    same, 2] float32: scratch for the sums of every part of the keys, and their largest score and total.
    """
    groups = (q_c.shape[1] + together - 1) // together
    parts = acc.shape[0]
    tasks = parts * groups
    p = take(team, ATTEND)
    while p < lengths.shape[0] * tasks:
        s, part, group = p // tasks, p % tasks // groups, p % groups
        attend(s, part, group * together, together, q_c, q_pe, table, lengths, bounds, np.float32(scale), start, page_size,
               direct, latents, lp, ls, keys, kp, ks, scales, sp, ss, each, acc, state)  # fmt: skip
        p = take(team, ATTEND)
    wait_for_all(team, crew)
    covered = bounds[lengths.shape[0]]
    heads = q_c.shape[1]
    total = np.empty(q_c.shape[2], np.float32)
    p = take(team, MERGE)
    while p < q_c.shape[0] * heads:
        t, h = p // heads, p % heads
        merge(acc, state, t, h, 0 if t >= covered or t < bounds[0] else parts, latents, direct, total, o, lse)
        p = take(team, MERGE)


@inner
def ask(plane, base, stride, size, rows):
    """Asks memory for so many rows of `size` numbers from number base on."""
    at = plane.ctypes.data + plane.itemsize * base
    for i in range(rows):
        for k in range(0, plane.itemsize * size, LINE_BYTES):
            fetch(at + plane.itemsize * i * stride + k)


@inner
def arrange_heads(direct, latents, keys, q_c, q_pe, t, h0, heads, q, row, padded):
    """q[row:] = a token's queries of `heads` heads from h0 on, rotary parts from number `padded` on."""
    for h in range(heads):
        if direct:
            arrange(latents, q_c, t, h0 + h, q, row + h, 0)
            arrange(keys, q_pe, t, h0 + h, q, row + h, padded)
        else:
            plain(latents, q_c, t, h0 + h, q, row + h, 0)
            plain(latents, q_pe, t, h0 + h, q, row + h, padded)


@inner
def widen_rows(latents, at, ls, scales, scale_at, ss, rank, keys, keys_at, ks, rope, count, block, padded):
    """block = `count` rows of the cache as float32, rotary keys from number `padded` on."""
    for i in range(count):
        read(latents, at + i * ls, scales, scale_at + i * ss, rank, block, i)
        for k in range(rope):
            block[i, padded + k] = widen(keys[keys_at + i * ks + k])


@inner
def merge(acc, state, t, h, parts, latents, direct, total, o, lse):
    """The parts of one query and head together; no part that saw a key: zeros and -inf."""
    most = _NOTHING
    for part in range(parts):
        if state[part, t, h, 1] != 0:
            largest = state[part, t, h, 0]
            most = largest if largest > most or largest != largest else most
    total[:] = 0
    whole = np.float32(0)
    for part in range(parts):
        if state[part, t, h, 1] != 0:
            factor = exp(state[part, t, h, 0] - most)
            whole += factor * state[part, t, h, 1]
            for r in range(total.shape[0]):
                total[r] += factor * acc[part, t, h, r]
    over = np.float32(1) / whole if whole != 0 else np.float32(0)
    if direct:
        answer(latents, total, over, o, t, h)
    else:
        plain_answer(latents, total, over, o, t, h)
    lse[h, t] = most + np.log(whole) if whole != 0 else _NOTHING


@inner
def attend(
    s, part, h0, together, q_c, q_pe, table, lengths, bounds, scale, start, page_size, direct, latents, lp, ls, keys, kp, ks,
    scales, sp, ss, each, acc, state,
):  # fmt: skip
    """One part of the keys of sequence s, for `together` heads from h0 on: sums into acc[part] and state[part]."""
    rank, rope = q_c.shape[2], q_pe.shape[2]
    heads = min(together, q_c.shape[1] - h0)
    first, length = np.int64(bounds[s]), np.int64(lengths[s])
    queries = np.int64(bounds[s + 1]) - first
    padded, rope_padded = acc.shape[3], (rope + WIDTH - 1) // WIDTH * WIDTH
    for j in range(queries):
        for h in range(heads):
            state[part, first + j, h0 + h, 0], state[part, first + j, h0 + h, 1] = _NOTHING, 0
    begin, end = max(start, edge(part, each)), min(length, edge(part + 1, each))
    if queries <= 0 or begin >= end:
        return
    if direct:
        page, offset = np.int64(table[s, begin // page_size]), begin % page_size
        count = min(BLOCK, min(end - begin, page_size - offset))
        ask(latents, page * lp + offset * ls, ls, rank, count)
        ask(keys, page * kp + offset * ks, ks, rope, count)
    wide = padded + rope_padded
    q = np.empty((queries * HEADS, wide), np.float32)
    if not direct:
        q[:] = 0
    for j in range(queries):
        arrange_heads(direct, latents, keys, q_c, q_pe, first + j, h0, heads, q, j * HEADS, padded)
    block = np.zeros((0 if direct else BLOCK, wide), np.float32)
    found, shrink = np.zeros((HEADS, BLOCK), np.float32), np.empty(HEADS, np.float32)
    factor, ones = np.full(1, scale, np.float32), np.ones(HEADS, np.float32)
    zeros, none = np.zeros((1, padded), np.float32), np.empty((0, padded), np.float32)
    fresh = True
    while begin < end:
        page, offset = np.int64(table[s, begin // page_size]), begin % page_size
        count = min(BLOCK, min(end - begin, page_size - offset))
        after = begin + count
        # While values are added up, the next block's rows are asked for; while products are made, more would be in their way.
        soon, place = page, offset
        if after < end:
            soon, place = np.int64(table[s, after // page_size]), after % page_size
        if not direct:
            widen_rows(latents, page * lp + offset * ls, ls, scales, page * sp + offset * ss, ss, rank, keys,
                       page * kp + offset * ks, ks, rope, count, block, padded)  # fmt: skip
        for j in range(queries):
            seen = min(count, length - queries + j + 1 - begin)
            if seen <= 0:
                continue
            for h in range(0, heads, FOUR):
                row, some = q.ctypes.data + 4 * (j * HEADS + h) * wide, min(FOUR, heads - h)
                if direct:
                    score(latents, page * lp + offset * ls, ls, keys, page * kp + offset * ks, ks, rope, seen, row, 4 * wide,
                          some, rank, found, h, factor)  # fmt: skip
                else:
                    score(block, 0, wide, block, 0, wide, 0, seen, row, 4 * wide, some, wide, found, h, factor)
            for h in range(heads):
                known = state[part, first + j, h0 + h]
                shrink[h], known[0], known[1] = weigh(found, h, seen, known[0], known[1])
            sums = acc[part, first + j]
            for i in range(0, seen, NEAR):
                by, few = shrink if i == 0 else ones, min(NEAR, seen - i)
                nothing = zeros if fresh and i == 0 else none
                if direct and after < end:
                    asked = (heads + FOUR - 1) // FOUR * AHEAD  # by gather_values
                    ask(keys, soon * kp + (place + i) * ks, ks, rope, NEAR)
                    ask(latents, soon * lp + (place + i + asked) * ls, ls, rank, NEAR - asked)
                for h in range(0, heads, FOUR):
                    if direct:
                        gather_values(latents, page * lp + offset * ls, ls, i, few, found, h, by, nothing, sums, h0 + h, rank,
                                      soon * lp + (place + i + h // FOUR * AHEAD) * ls)  # fmt: skip
                    else:
                        gather_values(block, 0, wide, i, few, found, h, by, nothing, sums, h0 + h, padded, 0)
        begin, fresh = after, False
