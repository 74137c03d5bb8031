"""Merging the parts of split attention: weights from their lse, in float32, in the order of the keys."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from dsv3_triton.launch import launch


@triton.jit(do_not_specialize=["splits", "tokens"])
def combine_kernel(
    part_o_ptr, part_lse_ptr, o_ptr, lse_ptr, splits, tokens, heads, R, SPLITS: tl.constexpr, WIDTH: tl.constexpr
):
    """One program: one (token, head). Parts without keys are not read."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = token * heads + head
    split, lane = tl.arange(0, SPLITS), tl.arange(0, WIDTH)
    part = tl.load(part_lse_ptr + row * splits + split, mask=split < splits, other=float("-inf"))
    largest = tl.max(part, axis=0)
    shift = tl.where(largest == float("-inf"), 0.0, largest)
    total = tl.sum(tl.exp(part - shift), axis=0)
    lse = tl.where(largest == float("-inf"), float("-inf"), shift + tl.log(total))
    acc = tl.zeros([WIDTH], tl.float32)
    for i in range(splits):
        one = tl.load(part_lse_ptr + row * splits + i) + tl.zeros([WIDTH], tl.float32)
        some = (lane < R) & (one > float("-inf"))  # a NaN shows in the total
        acc += tl.exp(one - shift) * tl.load(part_o_ptr + (row * splits + i) * R + lane, mask=some, other=0.0)
    acc = acc / tl.where(total == 0.0, 1.0, total)
    tl.store(o_ptr + row * R + lane, acc.to(o_ptr.dtype.element_ty), mask=lane < R)
    tl.store(lse_ptr + head.to(tl.int64) * tokens + token, lse)


def combine(part_o: Tensor, part_lse: Tensor, o: Tensor, lse: Tensor) -> None:
    """part_o f32 [T, Nh, splits, R], part_lse f32 [T, Nh, splits] -> o [T, Nh, R], lse [Nh, T], in place."""
    tokens, heads, splits, rank = part_o.shape
    launch(
        combine_kernel, (tokens, heads), part_o, part_lse, o, lse, splits, tokens, heads, rank,
        SPLITS=triton.next_power_of_2(splits), WIDTH=triton.next_power_of_2(rank), num_warps=4,
    )  # fmt: skip
