"""Everything of absorbed attention before the attention itself, for a few tokens: four steps of one kernel."""

from __future__ import annotations

import numpy as np

from dsv3_cpu.compile import inner
from dsv3_cpu.kernels.absorbed import ROOM, answer, head, place
from dsv3_cpu.kernels.atoms import take, wait_for_all
from dsv3_cpu.kernels.latent import write
from dsv3_cpu.kernels.numbers import put, widen
from dsv3_cpu.kernels.pointwise import norm_row
from dsv3_cpu.kernels.product import scratch_for, sums_of
from dsv3_cpu.kernels.rows import arrange

DOWN, UP, HEADS = 0, 1, 2  # phases


def prolog(
    team, me, crew, q_a, q_a_scales, q_b, q_b_scales, kv_a, kv_a_scales, q_norm, kv_norm, flat, head_stride, row_stride, stride,
    x, positions, table, slots, page_size, latents, lp, ls, keys, kp, ks, scales, sp, ss, eps, tile, snapped, for_q_a, for_kv_a,
    low, for_q_b, kv, q, queries, q_c, q_pe,
):  # fmt: skip
    """x [T, H] -> q_c [T, Nh, R], q_pe [T, Nh, P], and the cache's rows.

    Without a low-rank query q_a has no row, and q_b takes x. flat and its strides: w_uk [Nh, Dn, R]. Scratch: x arranged
    for both first products, low [T, Rq], arranged for q_b, kv [T, R + P], q [T, Nh (Dn + P)] and
    queries, the same by heads. snapped: INT8
    activations, see `arrange`.
    """
    tokens, rank = x.shape[0], kv_norm.shape[0]
    for t in range(me, tokens, crew):
        if q_a.shape[1]:
            arrange(q_a, q_a_scales, x, t, for_q_a, t, snapped)
        else:
            arrange(q_b, q_b_scales, x, t, for_q_b, t, snapped)
        arrange(kv_a, kv_a_scales, x, t, for_kv_a, t, snapped)
    wait_for_all(team, crew)
    everyone = np.arange(tokens)
    scratch, second = scratch_for(for_q_a, tokens, tile), scratch_for(for_kv_a, tokens, tile)
    first_tiles, tiles = (q_a.shape[1] + tile - 1) // tile, (kv_a.shape[1] + tile - 1) // tile
    p = take(team, DOWN)
    while p < first_tiles + tiles:
        if p < first_tiles:
            product(q_a, q_a_scales, p * tile, min(q_a.shape[1], (p + 1) * tile), for_q_a, everyone, scratch, low)
        else:
            first = (p - first_tiles) * tile
            product(kv_a, kv_a_scales, first, min(kv_a.shape[1], first + tile), for_kv_a, everyone, second, kv)
        p = take(team, DOWN)
    wait_for_all(team, crew)
    latent, key = np.empty((1, rank), np.float32), np.empty(kv.shape[1] - rank, np.float32)
    for t in range(crew - 1 - me, tokens, crew):
        if q_a.shape[1]:
            norm_row(low, t, q_norm, eps, low)
            arrange(q_b, q_b_scales, low, t, for_q_b, t, snapped)
    for t in range(me, tokens, crew):
        slot = np.int64(slots[t])
        if slot >= 0:
            for r in range(rank):
                latent[0, r] = kv[t, r]
            norm_row(latent, 0, kv_norm, eps, latent)
            rotate(kv, t, rank, table, np.int64(positions[t]), key)
            page, offset = slot // page_size, slot % page_size
            write(latent, 0, latents, page * lp + offset * ls, scales, page * sp + offset * ss)
            for k in range(key.shape[0]):
                put(keys, page * kp + offset * ks + k, key[k])
    wait_for_all(team, crew)
    third = scratch_for(for_q_b, tokens, tile)
    p = take(team, UP)
    while p * tile < q_b.shape[1]:
        product(q_b, q_b_scales, p * tile, min(q_b.shape[1], (p + 1) * tile), for_q_b, everyone, third, q)
        p = take(team, UP)
    wait_for_all(team, crew)
    heads = q_c.shape[1]
    size = q.shape[1] // heads
    nope = size - q_pe.shape[2]
    row, total = np.zeros(nope + ROOM, np.float32), np.empty(rank + ROOM, np.float32)
    turned = np.empty(q_pe.shape[2], np.float32)
    h = take(team, HEADS)
    while h < heads:
        for t in range(tokens):
            place(flat, row_stride, queries, t, h, nope, row)
            head(flat, h * head_stride, row_stride, stride, row, nope, rank, total)
            answer(flat, row_stride, total, q_c, t, h)
            rotate(q, t, h * size + nope, table, np.int64(positions[t]), turned)
            for k in range(turned.shape[0]):
                put(q_pe, (t, h, k), turned[k])
        h = take(team, HEADS)


@inner
def product(w, s, first, last, x, index, scratch, y):
    """y[:, first:last] of all rows of arranged x."""
    sums_of(w, s, 0, first, last, x, index, 0, y.shape[0], scratch)
    for t in range(y.shape[0]):
        for n in range(first, last):
            y[t, n] = scratch[3][t, n - first]


@inner
def rotate(x, t, at, table, position, out):
    """out = x[t, at:] turned by a position's angles, neighbours being one pair."""
    half = out.shape[0] // 2
    for j in range(half):
        c, s = table[position, j], table[position, half + j]
        u, v = widen(x[t, at + 2 * j]), widen(x[t, at + 2 * j + 1])
        out[2 * j] = u * c - v * s
        out[2 * j + 1] = u * s + v * c
