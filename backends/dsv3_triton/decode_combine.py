"""The splits of a sequence's keys, merged: what each found, weighted by its share of the sum of exponentials."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from dsv3_triton.launch import launch

_LN2: tl.constexpr = tl.constexpr(0.6931471805599453)


@triton.jit
def span_of(keys, splits, SPAN: tl.constexpr):
    """How many keys each split has, a multiple of SPAN: long sequences use all splits, short ones the first few."""
    return tl.cdiv(tl.cdiv(tl.maximum(keys, 1), splits), SPAN) * SPAN


@triton.jit(do_not_specialize=["T", "start", "splits"])
def combine_kernel(
    part_ptr, part_lse_ptr, lengths_ptr, cu_ptr, o_ptr, lse_ptr, T, splits, start, heads, R,
    SPAN: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One program: ROWS (query, head) pairs of a sequence. Splits past the sequence's end have written nothing."""
    sequence = tl.program_id(1)
    first = tl.load(cu_ptr + sequence)
    queries = (tl.load(cu_ptr + sequence + 1) - first).to(tl.int32)
    begin = tl.program_id(0) * ROWS
    if begin >= queries * heads:
        return
    keys = tl.maximum(tl.load(lengths_ptr + sequence).to(tl.int32) - start, 0)
    live = tl.cdiv(keys, span_of(keys, splits, SPAN))
    row = begin + tl.arange(0, ROWS)
    inside = row < queries * heads
    pair = first.to(tl.int64) * heads + row
    pairs = T.to(tl.int64) * heads

    top = tl.full((ROWS,), float("-inf"), tl.float32)
    for i in range(live):
        top = tl.maximum(top, tl.load(part_lse_ptr + i * pairs + pair, mask=inside, other=float("-inf")))
    shift = tl.where(top == float("-inf"), 0.0, top)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, WIDTH), tl.float32)
    column = tl.arange(0, WIDTH)
    here = inside[:, None] & (column < R)[None, :]
    for i in range(live):
        weight = tl.exp2(tl.load(part_lse_ptr + i * pairs + pair, mask=inside, other=float("-inf")) - shift)
        total += weight
        acc += weight[:, None] * tl.load(part_ptr + (i * pairs + pair)[:, None] * R + column[None, :], mask=here, other=0.0)

    empty = total == 0.0
    o = acc / tl.where(empty, 1.0, total)[:, None]
    tl.store(o_ptr + pair[:, None] * R + column[None, :], o.to(o_ptr.dtype.element_ty), mask=here)
    query = row // heads
    place = (row - query * heads).to(tl.int64) * T + first.to(tl.int64) + query
    lse = tl.where(empty, float("-inf"), shift + tl.log2(tl.where(empty, 1.0, total)))
    tl.store(lse_ptr + place, lse * _LN2, mask=inside)


def combine(
    part: Tensor, part_lse: Tensor, seq_lens: Tensor, cu_q: Tensor, o: Tensor, lse: Tensor, max_q: int, start: int,
    config: Mapping[str, Any],
) -> None:  # fmt: skip
    """part [splits, T, Nh, R] and part_lse [splits, T, Nh] (base 2), float32 -> o [T, Nh, R], lse [Nh, T] in place."""
    splits, t, heads, rank = part.shape
    launch(
        combine_kernel, (triton.cdiv(max_q * heads, config["ROWS"]), seq_lens.shape[0]),
        part, part_lse, seq_lens, cu_q, o, lse, t, splits, start, heads, rank,
        SPAN=config["SPAN"], WIDTH=triton.next_power_of_2(rank), ROWS=config["ROWS"], num_warps=config["COMBINE_WARPS"],
    )  # fmt: skip
