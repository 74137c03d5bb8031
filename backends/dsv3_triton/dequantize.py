"""FP8 weights with block scales, to real numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv3_triton.launch import launch
from dsv3_triton.numbers import decode_fp8, is_nan_fp8


@triton.jit
def dequant_block_kernel(
    codes_ptr, scale_ptr, y_ptr, N, K, blocks, stride, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, FNUZ: tl.constexpr
):
    """One program: BLOCK_N rows x BLOCK_K columns, within one 128x128 block. NaN codes give NaN."""
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    column = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = (row < N)[:, None] & (column < K)[None, :]
    codes = tl.load(codes_ptr + row.to(tl.int64)[:, None] * stride + column[None, :], mask=inside, other=0)
    scale = tl.load(scale_ptr + (row // 128)[:, None] * blocks + (column // 128)[None, :], mask=inside, other=0.0)
    y = tl.where(is_nan_fp8(codes, FNUZ), float("nan"), decode_fp8(codes, FNUZ) * scale)
    tl.store(y_ptr + row.to(tl.int64)[:, None] * K + column[None, :], y.to(y_ptr.dtype.element_ty), mask=inside)


def dequant_block(weight: Tensor, scale: Tensor, dtype: str, config: Mapping[str, Any]) -> Tensor:
    """`dsv3.ops.dequant_block`."""
    n, k = weight.shape
    y = torch.empty(n, k, dtype=getattr(torch, dtype), device=weight.device)
    launch(
        dequant_block_kernel, (triton.cdiv(n, config["BLOCK_N"]), triton.cdiv(k, config["BLOCK_K"])),
        weight.view(torch.uint8), scale.contiguous(), y, n, k, scale.shape[1], weight.stride(0),
        BLOCK_N=config["BLOCK_N"], BLOCK_K=config["BLOCK_K"], FNUZ=weight.dtype == torch.float8_e4m3fnuz,
        num_warps=config["num_warps"],
    )  # fmt: skip
    return y
