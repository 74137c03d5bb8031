"""Products with weights that are not quantised: linear, and one matrix per head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv3.plugin import Prepared
from dsv3_triton.launch import launch
from dsv3_triton.tiles import read, tile_of, write


@triton.jit(do_not_specialize=["T"])
def linear_kernel(
    x_ptr, w_ptr, bias_ptr, y_ptr, T, N, K, stride_x, stride_w,
    BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    """One program: a tile [BLOCK_M, BLOCK_N] of y. float32 is multiplied as float32, never as TF32."""
    row, column = tile_of(tl.program_id(0), T, N, BLOCK_M, BLOCK_N, BAND)
    rows = row * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = column * BLOCK_N + tl.arange(0, BLOCK_N)
    lane = tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        x = read(x_ptr, rows, stride_x, k + lane, T, K)
        w = read(w_ptr, columns, stride_w, k + lane, N, K).to(x.dtype)
        acc = tl.dot(x, tl.trans(w), acc, input_precision="ieee")
    if BIAS:
        acc += tl.load(bias_ptr + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
    write(y_ptr, rows, N, columns, T, N, acc)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, config: Mapping[str, Any]) -> Tensor:
    """`dsv3.ops.linear`: x [T, K], weight [N, K], bias [N] or None -> [T, N]."""
    t, k = x.shape
    n = weight.shape[0]
    x, weight = rows_whole(x), rows_whole(weight)
    y = torch.empty(t, n, dtype=x.dtype, device=x.device)
    if bias is not None:
        bias = bias.contiguous()
    launch(
        linear_kernel, (triton.cdiv(t, config["BLOCK_M"]) * triton.cdiv(n, config["BLOCK_N"]),),
        x, weight, weight if bias is None else bias, y, t, n, k, x.stride(0), weight.stride(0),
        BIAS=bias is not None, **config,
    )  # fmt: skip
    return y


def quant_linear(x: Tensor, w: Prepared, config: Mapping[str, Any]) -> Tensor:
    """`dsv3.ops.quant_linear` for weights that are not quantised."""
    return linear(x=x, weight=w.tensors["weight"], bias=None, config=config)


def rows_whole(x: Tensor) -> Tensor:
    """x itself where the numbers of a row are adjacent, else a copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


@triton.jit(do_not_specialize=["T"])
def bmm_kernel(
    x_ptr, w_ptr, y_ptr, T, A, C, heads, x_t, x_h, x_a, w_h, w_a, w_c,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M tokens x BLOCK_N outputs of one head. Whichever of the weight's axes has stride 1 is read along."""
    head = tl.program_id(2)
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    lane = tl.arange(0, BLOCK_K)
    x_rows = x_ptr + head.to(tl.int64) * x_h + rows.to(tl.int64)[:, None] * x_t
    w_columns = w_ptr + head.to(tl.int64) * w_h + columns.to(tl.int64)[None, :] * w_c
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for a in range(0, A, BLOCK_K):
        k = a + lane
        x = tl.load(x_rows + k[None, :] * x_a, mask=(rows < T)[:, None] & (k < A)[None, :], other=0.0)
        w = tl.load(w_columns + k.to(tl.int64)[:, None] * w_a, mask=(k < A)[:, None] & (columns < C)[None, :], other=0.0)
        acc = tl.dot(x, w.to(x.dtype), acc, input_precision="ieee")
    write(y_ptr + head * C, rows, heads * C, columns, T, C, acc)


def bmm(x: Tensor, weight: Tensor, config: Mapping[str, Any]) -> Tensor:
    """`dsv3.ops.bmm`: x [T, Nh, A], weight [Nh, A, C], both with any strides -> [T, Nh, C]."""
    t, heads, a = x.shape
    c = weight.shape[2]
    y = torch.empty(t, heads, c, dtype=x.dtype, device=x.device)
    grid = (triton.cdiv(c, config["BLOCK_N"]), triton.cdiv(t, config["BLOCK_M"]), heads)
    launch(bmm_kernel, grid, x, weight, y, t, a, c, heads, *x.stride(), *weight.stride(), **config)
    return y
