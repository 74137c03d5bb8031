"""Activations to FP8, one scale per token and group of channels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv3_triton.launch import launch
from dsv3_triton.numbers import encode_fp8, power_of_two_at_least

FP8_MAX = {"float8_e4m3fn": 448.0, "float8_e4m3fnuz": 224.0}


@triton.jit(do_not_specialize=["T"])
def act_quant_kernel(
    x_ptr, q_ptr, scale_ptr, T, K, stride_x, groups, floor, largest,
    GROUP: tl.constexpr, WIDTH: tl.constexpr, BLOCK_T: tl.constexpr, UE8M0: tl.constexpr, FNUZ: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_T tokens x one group of GROUP channels, in WIDTH (a power of two) lanes."""
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    lane = tl.arange(0, WIDTH)
    group = tl.program_id(1)
    columns = group * GROUP + lane
    inside = (rows < T)[:, None] & ((lane < GROUP) & (columns < K))[None, :]
    place = rows.to(tl.int64)[:, None]
    x = tl.load(x_ptr + place * stride_x + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    q, scale = quantize_group(x, floor, largest, UE8M0, FNUZ)
    tl.store(q_ptr + place * K + columns[None, :], q, mask=inside)
    tl.store(scale_ptr + rows.to(tl.int64) * groups + group, scale, mask=rows < T)


@triton.jit
def quantize_group(x, floor, largest, UE8M0: tl.constexpr, FNUZ: tl.constexpr):
    """x [rows, group] float32 -> codes [rows, group] uint8, scale [rows]. Divisions are correctly rounded: at a tie the code
    depends on the last bit. A maximum may drop NaN, so NaN is put back."""
    amax = tl.max(tl.abs(x), axis=1)
    bad = tl.max((x != x).to(tl.int32), axis=1) > 0
    scale = tl.div_rn(tl.maximum(amax, floor), largest + tl.zeros_like(amax))
    if UE8M0:
        scale = power_of_two_at_least(scale)
    scale = tl.where(bad, float("nan"), scale)
    divisor = tl.where(scale == 0.0, 1.0, scale)
    q = encode_fp8(tl.div_rn(x, tl.broadcast_to(divisor[:, None], x.shape)), FNUZ)
    return q, scale


def act_quant(
    x: Tensor, group: int, dtype: str, scale_fmt: str, amax_floor: float, config: Mapping[str, Any]
) -> tuple[Tensor, Tensor]:
    """`dsv3.ops.act_quant` for e4m3fn and e4m3fnuz."""
    t, k = x.shape
    groups = triton.cdiv(k, group)
    q = torch.empty(t, k, dtype=torch.uint8, device=x.device)
    scale = torch.empty(t, groups, dtype=torch.float32, device=x.device)
    launch(
        act_quant_kernel, (triton.cdiv(t, config["BLOCK_T"]), groups),
        x, q, scale, t, k, x.stride(0), groups, amax_floor, FP8_MAX[dtype],
        GROUP=group, WIDTH=triton.next_power_of_2(group), BLOCK_T=config["BLOCK_T"], UE8M0=scale_fmt == "ue8m0",
        FNUZ=dtype == "float8_e4m3fnuz", num_warps=config["num_warps"],
    )  # fmt: skip
    return q.view(getattr(torch, dtype)), scale
