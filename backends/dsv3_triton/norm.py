"""RMS normalisation: alone, after adding the residual, and with FP8 output."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv3_triton.launch import launch
from dsv3_triton.quantize import FP8_MAX, quantize_group


@triton.jit(do_not_specialize=["T"])
def rms_norm_kernel(
    x_ptr, residual_ptr, weight_ptr, y_ptr, total_ptr, scale_ptr, T, D, stride_x, stride_residual, eps, groups, largest,
    WIDTH: tl.constexpr, BLOCK_T: tl.constexpr, ADD: tl.constexpr, GROUP: tl.constexpr, GROUP_WIDTH: tl.constexpr,
    UE8M0: tl.constexpr, FNUZ: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_T whole rows, read once. ADD: x + residual, rounded, is stored and normalised. GROUP: the result
    is not stored but quantised per GROUP channels, each in GROUP_WIDTH lanes; 0: it is stored."""
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    lane = tl.arange(0, WIDTH)
    if GROUP:  # the lanes of a group stand together, with gaps where it is no power of two
        column = (lane // GROUP_WIDTH) * GROUP + lane % GROUP_WIDTH
        used = (lane % GROUP_WIDTH < GROUP) & (column < D)
    else:
        column = lane
        used = lane < D
    inside = (rows < T)[:, None] & used[None, :]
    row = rows.to(tl.int64)[:, None]
    x = tl.load(x_ptr + row * stride_x + column[None, :], mask=inside, other=0.0).to(tl.float32)
    if ADD:
        x += tl.load(residual_ptr + row * stride_residual + column[None, :], mask=inside, other=0.0).to(tl.float32)
        rounded = x.to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + row * D + column[None, :], rounded, mask=inside)
        x = rounded.to(tl.float32)
    mean = tl.sum(x * x, axis=1) / D
    factor = tl.div_rn(tl.full([BLOCK_T], 1.0, tl.float32), tl.sqrt_rn(mean + eps))
    weight = tl.load(weight_ptr + column, mask=used, other=0.0).to(tl.float32)
    y = x * factor[:, None] * weight[None, :]
    if GROUP:
        # What the two operators one after the other would quantise is the rounded result.
        y = y.to(x_ptr.dtype.element_ty).to(tl.float32)
        count: tl.constexpr = WIDTH // GROUP_WIDTH
        q, scale = quantize_group(tl.reshape(y, (BLOCK_T * count, GROUP_WIDTH)), 1e-4, largest, UE8M0, FNUZ)
        tl.store(y_ptr + row * D + column[None, :], tl.reshape(q, (BLOCK_T, WIDTH)), mask=inside)
        group = tl.arange(0, count)[None, :]
        tl.store(
            scale_ptr + row * groups + group, tl.reshape(scale, (BLOCK_T, count)), mask=(rows < T)[:, None] & (group < groups)
        )
    else:
        tl.store(y_ptr + row * D + column[None, :], y.to(y_ptr.dtype.element_ty), mask=inside)


def _launch(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, config: Mapping[str, Any], y: Tensor, total: Tensor | None,
    scale: Tensor | None = None, group: int = 0, dtype: str = "", ue8m0: bool = False,
) -> None:  # fmt: skip
    t, d = x.shape
    lanes = triton.next_power_of_2(group) if group else 1
    groups = triton.cdiv(d, group) if group else 0
    width = triton.next_power_of_2(groups) * lanes if group else triton.next_power_of_2(d)
    block_t = max(1, config["ELEMENTS"] // width)
    launch(
        rms_norm_kernel, (triton.cdiv(t, block_t),),
        x, x if residual is None else residual, weight, y, y if total is None else total, y if scale is None else scale,
        t, d, x.stride(0), 0 if residual is None else residual.stride(0), eps, groups, FP8_MAX.get(dtype, 0.0),
        WIDTH=width, BLOCK_T=block_t, ADD=residual is not None, GROUP=group, GROUP_WIDTH=lanes, UE8M0=ue8m0,
        FNUZ=dtype == "float8_e4m3fnuz", num_warps=config["num_warps"],
    )  # fmt: skip


def rms_norm(x: Tensor, weight: Tensor, eps: float, config: Mapping[str, Any]) -> Tensor:
    """`dsv3.ops.rms_norm`."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(x, None, weight, eps, config, y, None)
    return y


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, config: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """`dsv3.ops.add_rms_norm`."""
    y, total = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    _launch(x, residual, weight, eps, config, y, total)
    return y, total


def rms_norm_quant(
    x: Tensor, weight: Tensor, eps: float, group: int, dtype: str, scale_fmt: str, config: Mapping[str, Any]
) -> tuple[Tensor, Tensor]:
    """`dsv3.ops.rms_norm_quant`, in one pass over x."""
    q = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    scale = torch.empty(x.shape[0], triton.cdiv(x.shape[1], group), dtype=torch.float32, device=x.device)
    _launch(x, None, weight, eps, config, q, None, scale, group, dtype, scale_fmt == "ue8m0")
    return q.view(getattr(torch, dtype)), scale
