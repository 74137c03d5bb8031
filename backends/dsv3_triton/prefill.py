"""Flash attention of packed sequences over expanded keys and values, causal from the bottom right.

Source: Dao 2023; the width of queries and keys is taken as two powers of two (192 = 128 + 64).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv3_triton.launch import launch
from dsv3_triton.softmax import LOG2E, finish, online


@triton.jit
def keys_between(
    low, high, q, q_rest, largest, total, acc, k_ptr, v_ptr, limit, length, D, DV, stride_k, stride_v, scale_log2,
    A: tl.constexpr, B: tl.constexpr, WIDTH: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Keys low to high, in blocks. MASKED: some rows may not see some of them, or they end within a block."""
    lane, value = tl.arange(0, A), tl.arange(0, WIDTH)
    for at in range(low, high, BLOCK_N):
        key = at + tl.arange(0, BLOCK_N)
        here = key < length
        place = key.to(tl.int64)
        k = tl.load(k_ptr + place[None, :] * stride_k + lane[:, None], mask=here[None, :] & (lane < D)[:, None], other=0.0)
        scores = tl.dot(q, k, input_precision=PRECISION)
        if B:
            rest = A + tl.arange(0, B)
            more = tl.load(
                k_ptr + place[None, :] * stride_k + rest[:, None], mask=here[None, :] & (rest < D)[:, None], other=0.0
            )
            scores = tl.dot(q_rest, more, scores, input_precision=PRECISION)
        scores = scores * scale_log2
        if MASKED:
            scores = tl.where(here[None, :] & (key[None, :] < limit[:, None]), scores, float("-inf"))
        p, largest, total, acc = online(scores, largest, total, acc)
        v = tl.load(v_ptr + place[:, None] * stride_v + value[None, :], mask=here[:, None] & (value < DV)[None, :], other=0.0)
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
    return largest, total, acc


@triton.jit(do_not_specialize=["tokens"])
def mla_prefill_kernel(
    q_ptr, k_ptr, v_ptr, cu_q_ptr, cu_k_ptr, o_ptr, lse_ptr, tokens, heads, D, DV, scale_log2,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh,
    A: tl.constexpr, B: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M queries of one head of one sequence. First the blocks that all of them see, then the others."""
    head, sequence = tl.program_id(1), tl.program_id(2)
    first_q = tl.load(cu_q_ptr + sequence).to(tl.int32)
    queries = tl.load(cu_q_ptr + sequence + 1).to(tl.int32) - first_q
    first_k = tl.load(cu_k_ptr + sequence).to(tl.int64)
    length = (tl.load(cu_k_ptr + sequence + 1).to(tl.int64) - first_k).to(tl.int32)
    start = tl.program_id(0) * BLOCK_M
    if start < queries:
        query = start + tl.arange(0, BLOCK_M)
        used = query < queries
        token = (first_q + query).to(tl.int64)
        lane, value = tl.arange(0, A), tl.arange(0, WIDTH)
        row = q_ptr + (token * stride_qt)[:, None] + head * stride_qh
        q = tl.load(row + lane[None, :], mask=used[:, None] & (lane < D)[None, :], other=0.0)
        q_rest = q
        if B:
            rest = A + tl.arange(0, B)
            q_rest = tl.load(row + rest[None, :], mask=used[:, None] & (rest < D)[None, :], other=0.0)
        k_ptr += first_k * stride_kt + head * stride_kh
        v_ptr += first_k * stride_vt + head * stride_vh
        if CAUSAL:
            limit = length - queries + query + 1
            seen = tl.maximum(tl.minimum(length - queries + start + 1, length), 0) // BLOCK_N * BLOCK_N
            end = tl.minimum(length, length - queries + start + BLOCK_M)
        else:
            limit = query * 0 + length
            seen = length // BLOCK_N * BLOCK_N
            end = length
        largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, WIDTH], tl.float32)
        largest, total, acc = keys_between(
            0, seen, q, q_rest, largest, total, acc, k_ptr, v_ptr, limit, length, D, DV, stride_kt, stride_vt, scale_log2,
            A, B, WIDTH, BLOCK_N, False, PRECISION,
        )  # fmt: skip
        largest, total, acc = keys_between(
            seen, end, q, q_rest, largest, total, acc, k_ptr, v_ptr, limit, length, D, DV, stride_kt, stride_vt, scale_log2,
            A, B, WIDTH, BLOCK_N, True, PRECISION,
        )  # fmt: skip
        o, lse = finish(largest, total, acc)
        place = (token * heads + head)[:, None] * DV + value[None, :]
        tl.store(o_ptr + place, o.to(o_ptr.dtype.element_ty), mask=used[:, None] & (value < DV)[None, :])
        tl.store(lse_ptr + head.to(tl.int64) * tokens + token, lse, mask=used)


def two_widths(width: int) -> tuple[int, int]:
    """A power of two of at least 16, and 0 or another, that together cover the width: 192 -> (128, 64), 24 -> (16, 16)."""
    first = max(16, 1 << (width.bit_length() - 1))
    rest = width - first
    return first, 0 if rest <= 0 else max(16, triton.next_power_of_2(rest))


def mla_prefill(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, scale: float, causal: bool,
    config: Mapping[str, Any],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`dsv3.ops.mla_prefill`."""
    tokens, heads, width = q.shape
    value = v.shape[2]
    o = torch.empty(tokens, heads, value, dtype=q.dtype, device=q.device)
    lse = torch.empty(heads, tokens, dtype=torch.float32, device=q.device)
    a, b = two_widths(width)
    q, k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k, v))
    launch(
        mla_prefill_kernel, (triton.cdiv(max_q, config["BLOCK_M"]), heads, len(cu_q) - 1),
        q, k, v, cu_q, cu_k, o, lse, tokens, heads, width, value, scale * LOG2E,
        q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1),
        A=a, B=b, WIDTH=max(16, triton.next_power_of_2(value)), BLOCK_M=config["BLOCK_M"], BLOCK_N=config["BLOCK_N"],
        CAUSAL=causal, PRECISION="ieee", num_warps=config["num_warps"],
        num_stages=config["num_stages"],
    )  # fmt: skip
    return o, lse
