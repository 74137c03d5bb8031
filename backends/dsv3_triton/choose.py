"""Choosing experts: the part that grouped_topk and route share.

Choices are compared as whole numbers in which a better score comes first and, among equals, the lower id: one maximum finds the
next expert. NaN counts as the best score, as in torch's sort, so that ids stay distinct whatever the logits are.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dsv3_triton.numbers import exp_accurate

_MASKED: tl.constexpr = tl.constexpr(-0x7F800001)  # the key of -inf: an expert of a group that is not kept
_GONE: tl.constexpr = tl.constexpr(-(1 << 63))
_LOW: tl.constexpr = tl.constexpr(0xFFFFFFFF)


@triton.jit
def key_of(x):
    """float32 -> int32 in the same order; -0 is 0, NaN comes after infinity."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(x == x, bits ^ ((bits >> 31) & 0x7FFFFFFF), 0x7FFFFFFF)


@triton.jit
def scores_of(logits, inside, SIGMOID: tl.constexpr):
    """Logits [rows, E] -> scores, 0 outside."""
    if SIGMOID:
        size = 1.0 + exp_accurate(-logits)
        scores = tl.div_rn(tl.full(size.shape, 1.0, tl.float32), size)
    else:
        largest = tl.max(tl.where(inside, logits, float("-inf")), axis=1)
        parts = tl.where(inside, exp_accurate(logits - largest[:, None]), 0.0)
        scores = tl.div_rn(parts, tl.broadcast_to(tl.sum(parts, axis=1)[:, None], parts.shape))
    return tl.where(inside, scores, 0.0)


@triton.jit
def kept_groups(choice, inside, topk_group, groups, TOP2: tl.constexpr, G: tl.constexpr, W: tl.constexpr):
    """choice [rows, G * W] -> whether each expert's group is kept, [rows, G * W]. A group has W lanes, not all of them used."""
    rows: tl.constexpr = choice.shape[0]
    lanes = tl.reshape(tl.where(inside, choice, float("-inf")), (rows, G, W))
    keys = tl.reshape(tl.where(inside, key_of(choice), -0x80000000), (rows, G, W))
    best = tl.max(keys, axis=2)
    nan = best == 0x7FFFFFFF
    value = tl.max(lanes, axis=2)
    if TOP2:
        lane = tl.arange(0, W)[None, None, :]
        first = tl.min(tl.where(keys == best[:, :, None], lane, W), axis=2)
        value += tl.max(tl.where(lane == first[:, :, None], float("-inf"), lanes), axis=2)
    group = tl.arange(0, G)[None, :]
    rank = (tl.where(nan, 0x7FFFFFFF, key_of(value)).to(tl.int64) << 32) + (G - group)
    rank = tl.where(group < groups, rank, _GONE)
    kept = tl.zeros((rows, G), tl.int32)
    for _ in range(topk_group):
        chosen = rank == tl.max(rank, axis=1)[:, None]
        kept = tl.where(chosen, 1, kept)
        rank = tl.where(chosen, _GONE, rank)
    return tl.reshape(tl.broadcast_to(kept[:, :, None], (rows, G, W)), (rows, G * W)) > 0


@triton.jit
def choose(
    logits, bias_ptr, weights_ptr, ids_ptr, rows, T, topk, topk_group, groups, width, scale, ids, inside,
    SIGMOID: tl.constexpr, BIAS: tl.constexpr, TOP2: tl.constexpr, RENORMALIZE: tl.constexpr,
    G: tl.constexpr, W: tl.constexpr, KK: tl.constexpr,
):  # fmt: skip
    """logits [rows, G * W] of the experts `ids` [1, G * W], of which those `inside` exist -> topk weights and ids, stored."""
    count: tl.constexpr = logits.shape[0]
    inside = tl.broadcast_to(inside, logits.shape)
    scores = scores_of(logits, inside, SIGMOID)
    choice = scores
    if BIAS:
        choice += tl.load(bias_ptr + ids, mask=ids < groups * width, other=0.0).to(tl.float32)
    key = key_of(choice)
    if G > 1:
        key = tl.where(kept_groups(choice, inside, topk_group, groups, TOP2, G, W), key, _MASKED)
    left = tl.where(inside, (key.to(tl.int64) << 32) + (G * W - ids), _GONE)
    place = tl.arange(0, KK)[None, :]
    weights = tl.zeros((count, KK), tl.float32)
    chosen = tl.zeros((count, KK), tl.int32)
    for i in range(topk):
        best = tl.max(left, axis=1)[:, None]
        this = left == best
        weight = tl.sum(tl.where(this, scores, 0.0), axis=1)[:, None]
        weights = tl.where(place == i, weight, weights)
        chosen = tl.where(place == i, (G * W - (best & _LOW)).to(tl.int32), chosen)
        left = tl.where(this, _GONE, left)
    if RENORMALIZE:
        total = tl.sum(weights, axis=1)[:, None] + 1e-20
        weights = tl.div_rn(weights, tl.broadcast_to(total, weights.shape))
    here = (rows < T)[:, None] & (place < topk)
    at = rows.to(tl.int64)[:, None] * topk + place
    tl.store(weights_ptr + at, weights * scale, mask=here)
    tl.store(ids_ptr + at, chosen, mask=here)
