"""Activations to INT8, one scale per token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv3_triton.launch import launch
from dsv3_triton.linear import rows_whole
from dsv3_triton.tiles import read, write


@triton.jit(do_not_specialize=["T"])
def quant_int8_kernel(x_ptr, q_ptr, scale_ptr, T, K, stride_x, floor, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr):
    """One program: BLOCK_T rows, read twice. Adding 1.5 * 2^23 rounds to whole numbers, half to even."""
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    lane = tl.arange(0, BLOCK_K)
    amax = tl.zeros((BLOCK_T,), tl.float32)
    bad = tl.zeros((BLOCK_T,), tl.int32)
    for k in range(0, K, BLOCK_K):
        x = read(x_ptr, rows, stride_x, k + lane, T, K).to(tl.float32)
        amax = tl.maximum(amax, tl.max(tl.abs(x), axis=1))
        bad = tl.maximum(bad, tl.max((x != x).to(tl.int32), axis=1))
    scale = tl.div_rn(tl.maximum(amax, floor), tl.full((BLOCK_T,), 127.0, tl.float32))
    scale = tl.where(bad > 0, float("nan"), scale)
    tl.store(scale_ptr + rows, scale, mask=rows < T)
    divisor = tl.where(scale == 0.0, 1.0, scale)
    for k in range(0, K, BLOCK_K):
        x = read(x_ptr, rows, stride_x, k + lane, T, K).to(tl.float32)
        ratio = tl.div_rn(x, tl.broadcast_to(divisor[:, None], x.shape))
        ratio = tl.where(ratio == ratio, tl.minimum(tl.maximum(ratio, -127.0), 127.0), 0.0)
        whole = (ratio + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000
        write(q_ptr, rows, K, k + lane, T, K, whole)


def quant_int8(x: Tensor, amax_floor: float, config: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """`dsv3.ops.quant_int8`: x [T, K] -> q int8 [T, K], scale [T, 1]."""
    t, k = x.shape
    x = rows_whole(x)
    q = torch.empty(t, k, dtype=torch.int8, device=x.device)
    scale = torch.empty(t, 1, dtype=torch.float32, device=x.device)
    launch(quant_int8_kernel, (triton.cdiv(t, config["BLOCK_T"]),), x, q, scale, t, k, x.stride(0), amax_floor, **config)
    return q, scale
