"""INT8 products, exact in int32, with one scale per row on both sides."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv3.plugin import Prepared
from dsv3_triton.launch import launch
from dsv3_triton.quantize_int8 import quant_int8
from dsv3_triton.tiles import read, tile_of, write


@triton.jit(do_not_specialize=["T"])
def int8_scaled_kernel(
    a_ptr, a_scale_ptr, b_ptr, b_scale_ptr, y_ptr, T, N, K, stride_a, stride_b,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    """One program: a tile of y, (sum * a_scale) * b_scale."""
    row, column = tile_of(tl.program_id(0), T, N, BLOCK_M, BLOCK_N, BAND)
    rows = row * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = column * BLOCK_N + tl.arange(0, BLOCK_N)
    lane = tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for k in range(0, K, BLOCK_K):
        a = read(a_ptr, rows, stride_a, k + lane, T, K)
        b = read(b_ptr, columns, stride_b, k + lane, N, K)
        acc = tl.dot(a, tl.trans(b), acc, out_dtype=tl.int32)
    a_scale = tl.load(a_scale_ptr + rows, mask=rows < T, other=0.0)
    b_scale = tl.load(b_scale_ptr + columns, mask=columns < N, other=0.0)
    write(y_ptr, rows, N, columns, T, N, acc.to(tl.float32) * a_scale[:, None] * b_scale[None, :])


def int8_scaled_mm(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, out_dtype: str, config: Mapping[str, Any]) -> Tensor:
    """`dsv3.ops.int8_scaled_mm`: a [T, K], a_scale [T, 1], b [N, K], b_scale [N, 1] -> [T, N]."""
    t, k = a.shape
    n = b.shape[0]
    a, b = a.contiguous(), b.contiguous()
    y = torch.empty(t, n, dtype=getattr(torch, out_dtype), device=a.device)
    launch(
        int8_scaled_kernel, (triton.cdiv(t, config["BLOCK_M"]) * triton.cdiv(n, config["BLOCK_N"]),),
        a, a_scale.contiguous(), b, b_scale.contiguous(), y, t, n, k, a.stride(0), b.stride(0), **config,
    )  # fmt: skip
    return y


def quant_linear(x: Tensor, w: Prepared, config: Mapping[str, Any]) -> Tensor:
    """`dsv3.ops.quant_linear` for int8-w8a8: x [T, K], w [N, K] -> [T, N]."""
    tile = {name: value for name, value in config.items() if not name.startswith("quant_")}
    quant = {name.removeprefix("quant_"): value for name, value in config.items() if name.startswith("quant_")}
    a, a_scale = quant_int8(x, 1e-10, quant)
    out = str(x.dtype).removeprefix("torch.")
    return int8_scaled_mm(a=a, a_scale=a_scale, b=w.tensors["weight"], b_scale=w.tensors["scale"], out_dtype=out, config=tile)
