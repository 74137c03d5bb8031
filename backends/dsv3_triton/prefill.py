"""Attention of packed sequences over expanded keys and values, without the matrix of scores in memory.

Keys are as wide as a part without position and one with: 128 + 64. A tile of 192 columns would be padded to 256, so that a key
is taken in two powers of two.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv3_triton.launch import launch

_LOG2E = 1.4426950408889634
_LN2: tl.constexpr = tl.constexpr(0.6931471805599453)


@triton.jit
def _columns(ptr, at, there, width, FIRST: tl.constexpr, WIDTH: tl.constexpr, ROWS_WHOLE: tl.constexpr, WHOLE: tl.constexpr):
    """Columns FIRST to FIRST + WIDTH of rows at offsets `at`; 0 past `width` and where a row is not there. ROWS_WHOLE, WHOLE:
    every row, every column, is."""
    column = FIRST + tl.arange(0, WIDTH)
    place = ptr + at[:, None] + column[None, :]
    if ROWS_WHOLE and WHOLE:
        return tl.load(place)
    elif WHOLE:
        return tl.load(place, mask=there[:, None], other=0.0)
    elif ROWS_WHOLE:
        return tl.load(place, mask=(column < width)[None, :], other=0.0)
    else:
        return tl.load(place, mask=there[:, None] & (column < width)[None, :], other=0.0)


@triton.jit
def _attend(
    acc, top, total, q, q_rest, k_ptr, v_ptr, limit, low, high, keys, k_t, v_t, scale, DQK, DV,
    MASKED: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, VALUE: tl.constexpr,
    QK_WHOLE: tl.constexpr, V_WHOLE: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The softmax so far (acc [rows, VALUE], top and total [rows]) and keys `low` to `high`. Not MASKED: every row sees all."""
    for at in range(low, high, BLOCK_N):
        position = at + tl.arange(0, BLOCK_N)
        there = position < keys
        place = position.to(tl.int64)
        k = _columns(k_ptr, place * k_t, there, DQK, 0, MAIN, not MASKED, QK_WHOLE or REST > 0)
        s = tl.dot(q, tl.trans(k), input_precision="ieee")
        if REST > 0:
            k_rest = _columns(k_ptr, place * k_t, there, DQK, MAIN, REST, not MASKED, QK_WHOLE)
            s = tl.dot(q_rest, tl.trans(k_rest), s, input_precision="ieee")
        v = _columns(v_ptr, place * v_t, there, DV, 0, VALUE, not MASKED, V_WHOLE)
        s *= scale
        if MASKED:
            s = tl.where(position[None, :] < limit[:, None], s, float("-inf"))
        higher = tl.maximum(top, tl.max(s, axis=1))
        shift = tl.where(higher == float("-inf"), 0.0, higher) if MASKED else higher
        p = tl.exp2(s - shift[:, None])
        alpha = tl.exp2(top - shift)
        total = total * alpha + tl.sum(p, axis=1)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")
        top = higher
    return acc, top, total


@triton.jit(do_not_specialize=["TQ", "scale"])
def prefill_kernel(
    q_ptr, k_ptr, v_ptr, cu_q_ptr, cu_k_ptr, o_ptr, lse_ptr, TQ, scale, heads, DQK, DV, q_t, q_h, k_t, k_h, v_t, v_h,
    CAUSAL: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, VALUE: tl.constexpr,
    QK_WHOLE: tl.constexpr, V_WHOLE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M queries of one head of one sequence. scale: times log2(e). The last queries, which see most, come
    first."""
    head, sequence = tl.program_id(1), tl.program_id(2)
    first = tl.load(cu_q_ptr + sequence).to(tl.int64)
    queries = (tl.load(cu_q_ptr + sequence + 1) - first).to(tl.int32)
    first_key = tl.load(cu_k_ptr + sequence).to(tl.int64)
    keys = (tl.load(cu_k_ptr + sequence + 1) - first_key).to(tl.int32)
    begin = (tl.cdiv(queries, BLOCK_M) - 1 - tl.program_id(0)) * BLOCK_M
    if begin < 0:
        return
    query = begin + tl.arange(0, BLOCK_M)
    inside = query < queries
    row = first + query
    if CAUSAL:  # bottom right: the last query sees the last key
        limit = keys - queries + query + 1
        high = tl.minimum(keys, keys - queries + begin + BLOCK_M)
        seen_by_all = tl.minimum(keys, tl.maximum(keys - queries + begin + 1, 0))
    else:
        limit = tl.full((BLOCK_M,), 0, tl.int32) + keys
        high = keys
        seen_by_all = keys
    unmasked = seen_by_all // BLOCK_N * BLOCK_N
    limit = tl.minimum(limit, keys)

    q_at = row * q_t + head.to(tl.int64) * q_h
    q = _columns(q_ptr, q_at, inside, DQK, 0, MAIN, False, QK_WHOLE or REST > 0)
    q_rest = q
    if REST > 0:
        q_rest = _columns(q_ptr, q_at, inside, DQK, MAIN, REST, False, QK_WHOLE)
    k_ptr += first_key * k_t + head.to(tl.int64) * k_h
    v_ptr += first_key * v_t + head.to(tl.int64) * v_h
    acc = tl.zeros((BLOCK_M, VALUE), tl.float32)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc, top, total = _attend(
        acc, top, total, q, q_rest, k_ptr, v_ptr, limit, 0, unmasked, keys, k_t, v_t, scale, DQK, DV,
        False, MAIN, REST, VALUE, QK_WHOLE, V_WHOLE, BLOCK_N,
    )  # fmt: skip
    acc, top, total = _attend(
        acc, top, total, q, q_rest, k_ptr, v_ptr, limit, unmasked, high, keys, k_t, v_t, scale, DQK, DV,
        True, MAIN, REST, VALUE, QK_WHOLE, V_WHOLE, BLOCK_N,
    )  # fmt: skip

    empty = total == 0.0  # a maximum drops NaN, the sum does not
    total = tl.where(empty, 1.0, total)
    lse = tl.where(empty, float("-inf"), (top + tl.log2(total)) * _LN2)
    tl.store(lse_ptr + head.to(tl.int64) * TQ + row, lse, mask=inside)
    column = tl.arange(0, VALUE)
    o = (acc * (1.0 / total)[:, None]).to(o_ptr.dtype.element_ty)
    place = (row * heads + head) * DV
    tl.store(o_ptr + place[:, None] + column[None, :], o, mask=inside[:, None] & (column < DV)[None, :])


def mla_prefill(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, scale: float, causal: bool,
    config: Mapping[str, Any],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`dsv3.ops.mla_prefill`: q [Tq, Nh, Dqk], k [Tk, Nh, Dqk], v [Tk, Nh, Dv] -> o [Tq, Nh, Dv], lse [Nh, Tq]. max_k is not
    needed: how far keys reach is read from cu_k."""
    t, heads, width = q.shape
    value = v.shape[2]
    o = torch.empty(t, heads, value, dtype=q.dtype, device=q.device)
    lse = torch.empty(heads, t, dtype=torch.float32, device=q.device)
    sequences = cu_q.shape[0] - 1
    if o.numel() == 0 or sequences == 0 or max_q <= 0:
        return o, lse
    q, k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k, v))
    main, rest = _parts(width)
    padded = max(16, triton.next_power_of_2(value))
    launch(
        prefill_kernel, (triton.cdiv(max_q, config["BLOCK_M"]), heads, sequences),
        q, k, v, cu_q, cu_k, o, lse, t, scale * _LOG2E, heads, width, value,
        *q.stride()[:2], *k.stride()[:2], *v.stride()[:2],
        CAUSAL=causal, MAIN=main, REST=rest, VALUE=padded, QK_WHOLE=main + rest == width, V_WHOLE=padded == value, **config,
    )  # fmt: skip
    return o, lse


def _parts(width: int) -> tuple[int, int]:
    """Powers of two of 16 or more, or 0, whose sum is `width` or more: 192 -> 128, 64; 24 -> 16, 16; 9 -> 16, 0."""
    main = max(16, 1 << (width.bit_length() - 1))
    return main, max(16, triton.next_power_of_2(width - main)) if width > main else 0
