"""The gated activation, and with FP8 output."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv3_triton.launch import launch
from dsv3_triton.numbers import exp_accurate
from dsv3_triton.quantize import FP8_MAX, quantize_group


@triton.jit
def swiglu(gate, up):
    """silu(gate) * up in float32. A gate so negative that its exponential overflows gives -0."""
    return tl.div_rn(gate, 1.0 + exp_accurate(-gate)) * up


@triton.jit(do_not_specialize=["T"])
def silu_mul_kernel(
    x_ptr, y_ptr, scale_ptr, T, I, stride_x, groups, largest, width,
    WIDTH: tl.constexpr, BLOCK_T: tl.constexpr, QUANTISE: tl.constexpr, UE8M0: tl.constexpr, FNUZ: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_T rows x `width` columns (a group, where they are quantised) in WIDTH lanes."""
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    lane = tl.arange(0, WIDTH)
    block = tl.program_id(1)
    column = block * width + lane
    inside = (rows < T)[:, None] & ((lane < width) & (column < I))[None, :]
    row = rows.to(tl.int64)[:, None]
    gate = tl.load(x_ptr + row * stride_x + column[None, :], mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + row * stride_x + I + column[None, :], mask=inside, other=0.0).to(tl.float32)
    y = swiglu(gate, up)
    if QUANTISE:
        # What the two operators one after the other would quantise is the rounded result.
        y = y.to(x_ptr.dtype.element_ty).to(tl.float32)
        q, scale = quantize_group(y, 1e-4, largest, UE8M0, FNUZ)
        tl.store(y_ptr + row * I + column[None, :], q, mask=inside)
        tl.store(scale_ptr + rows.to(tl.int64) * groups + block, scale, mask=rows < T)
    else:
        tl.store(y_ptr + row * I + column[None, :], y.to(y_ptr.dtype.element_ty), mask=inside)


def silu_mul(x: Tensor, config: Mapping[str, Any]) -> Tensor:
    """`dsv3.ops.silu_mul`."""
    t, width = x.shape[0], x.shape[1] // 2
    y = torch.empty(t, width, dtype=x.dtype, device=x.device)
    lanes = min(config["BLOCK"], triton.next_power_of_2(max(width, 1)))
    block_t = max(1, config["ELEMENTS"] // lanes)
    launch(
        silu_mul_kernel, (triton.cdiv(t, block_t), triton.cdiv(width, lanes)),
        x, y, y, t, width, x.stride(0), 0, 0.0, lanes,
        WIDTH=lanes, BLOCK_T=block_t, QUANTISE=False, UE8M0=False, FNUZ=False, num_warps=config["num_warps"],
    )  # fmt: skip
    return y


def silu_mul_quant(x: Tensor, group: int, dtype: str, scale_fmt: str, config: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """`dsv3.ops.silu_mul_quant`, in one pass over x."""
    t, width = x.shape[0], x.shape[1] // 2
    groups = triton.cdiv(width, group)
    q = torch.empty(t, width, dtype=torch.uint8, device=x.device)
    scale = torch.empty(t, groups, dtype=torch.float32, device=x.device)
    lanes = triton.next_power_of_2(group)
    block_t = max(1, config["ELEMENTS"] // lanes)
    launch(
        silu_mul_kernel, (triton.cdiv(t, block_t), groups),
        x, q, scale, t, width, x.stride(0), groups, FP8_MAX[dtype], group,
        WIDTH=lanes, BLOCK_T=block_t, QUANTISE=True, UE8M0=scale_fmt == "ue8m0", FNUZ=dtype == "float8_e4m3fnuz",
        num_warps=config["num_warps"],
    )  # fmt: skip
    return q.view(getattr(torch, dtype)), scale
