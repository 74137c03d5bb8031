"""Attention over the union of two key sets. Source: Milakov and Gimelshein 2018, section 3.1."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv3_triton.launch import launch
from dsv3_triton.numbers import exp_accurate


@triton.jit(do_not_specialize=["rows", "tokens"])
def merge_kernel(
    o1_ptr, lse1_ptr, o2_ptr, lse2_ptr, o_ptr, lse_ptr, rows, tokens, heads, D, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):
    """One program: BLOCK (token, head) rows. A side whose lse is -inf is not read."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = row < rows
    at = (row % heads).to(tl.int64) * tokens + row // heads
    none = float("-inf")
    a = tl.load(lse1_ptr + at, mask=here, other=none).to(tl.float32)
    b = tl.load(lse2_ptr + at, mask=here, other=none).to(tl.float32)
    high, low = tl.maximum(a, b), tl.minimum(a, b)
    shift = tl.where(high == none, 0.0, high)
    lse = tl.where(high == none, none, high + tl.log(1.0 + exp_accurate(low - shift)))
    lse = tl.where((a != a) | (b != b), float("nan"), lse)
    lse = tl.where(a == none, b, tl.where(b == none, a, lse))
    base = tl.where(lse == none, 0.0, lse)
    lane = tl.arange(0, WIDTH)[None, :]
    place = row.to(tl.int64)[:, None] * D + lane
    left, right = (here & (a != none))[:, None] & (lane < D), (here & (b != none))[:, None] & (lane < D)
    o = exp_accurate(a - base)[:, None] * tl.load(o1_ptr + place, mask=left, other=0.0).to(tl.float32)
    o += exp_accurate(b - base)[:, None] * tl.load(o2_ptr + place, mask=right, other=0.0).to(tl.float32)
    tl.store(o_ptr + place, o.to(o_ptr.dtype.element_ty), mask=here[:, None] & (lane < D))
    tl.store(lse_ptr + at, lse, mask=here)


def merge_attn_states(o1: Tensor, lse1: Tensor, o2: Tensor, lse2: Tensor, config: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """`dsv3.ops.merge_attn_states`."""
    tokens, heads, width = o1.shape
    o = torch.empty(tokens, heads, width, dtype=o1.dtype, device=o1.device)
    lse = torch.empty(heads, tokens, dtype=torch.float32, device=o1.device)
    lanes = triton.next_power_of_2(width)
    block = max(1, config["ELEMENTS"] // lanes)
    launch(
        merge_kernel, (triton.cdiv(tokens * heads, block),),
        o1.contiguous(), lse1.contiguous(), o2.contiguous(), lse2.contiguous(), o, lse, tokens * heads, tokens, heads, width,
        WIDTH=lanes, BLOCK=block, num_warps=config["num_warps"],
    )  # fmt: skip
    return o, lse
