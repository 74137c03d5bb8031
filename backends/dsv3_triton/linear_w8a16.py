"""Products with quantised weights and activations as they are: weights are decoded where they are used.

Codes are exact in bfloat16, so nothing is rounded but sums: scales meet partial sums, never codes. One frame for all formats;
what differs is how codes are read, and which scale meets the sum of up to 128 products.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv3.plugin import Prepared
from dsv3_triton.launch import launch
from dsv3_triton.linear import rows_whole
from dsv3_triton.numbers import decode_fp8
from dsv3_triton.tiles import read, tile_of, write

_GROUP: tl.constexpr = tl.constexpr(128)


@triton.jit
def read_codes(w_ptr, columns, stride_w, first, N, K, FORMAT: tl.constexpr, WIDTH: tl.constexpr):
    """Codes [columns, WIDTH] of the weight's rows `columns`, from the column `first` on, as numbers that bfloat16 holds.
    FORMAT: "plain", numbers of the hardware; "fp8", e4m3fn as bytes; "int4", two to a byte, the low nibble first."""
    if FORMAT == "int4":
        packed = read(w_ptr, columns, stride_w, first // 2 + tl.arange(0, WIDTH // 2), N, tl.cdiv(K, 2)).to(tl.int32)
        return tl.interleave((packed & 15) - 8, (packed >> 4) - 8)
    else:
        codes = read(w_ptr, columns, stride_w, first + tl.arange(0, WIDTH), N, K)
        if FORMAT == "fp8":
            codes = decode_fp8(codes, False)
        return codes


@triton.jit(do_not_specialize=["T"])
def dequant_linear_kernel(
    x_ptr, w_ptr, scale_ptr, y_ptr, T, N, K, stride_x, stride_w, groups,
    FORMAT: tl.constexpr, SCALES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    """One program: a tile of y. BLOCK_N and BLOCK_K divide 128. SCALES: "block", one for 128 x 128 codes; "group", one for 128
    codes of a row; "row", one for a row."""
    row, column = tile_of(tl.program_id(0), T, N, BLOCK_M, BLOCK_N, BAND)
    rows = row * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = column * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        x = read(x_ptr, rows, stride_x, k + tl.arange(0, BLOCK_K), T, K)
        w = read_codes(w_ptr, columns, stride_w, k, N, K, FORMAT, BLOCK_K).to(x.dtype)
        if SCALES == "row":
            acc = tl.dot(x, tl.trans(w), acc, input_precision="ieee")
        else:
            part = tl.dot(x, tl.trans(w), input_precision="ieee")
            if SCALES == "block":
                acc += part * tl.load(scale_ptr + column * BLOCK_N // _GROUP * groups + k // _GROUP)
            else:
                scale = tl.load(scale_ptr + columns * groups + k // _GROUP, mask=columns < N, other=0.0)
                acc += part * scale[None, :]
    if SCALES == "row":
        acc *= tl.load(scale_ptr + columns, mask=columns < N, other=0.0)[None, :]
    write(y_ptr, rows, N, columns, T, N, acc)


def fp8_native(x: Tensor, w: Prepared, config: Mapping[str, Any]) -> Tensor:
    """`dsv3.ops.quant_linear` for fp8-w8a16 where the device converts the weight's encoding: x [T, K], w [N, K] -> [T, N]."""
    return _product(x, w, w.tensors["weight"], "plain", "block", config)


def fp8_decoded(x: Tensor, w: Prepared, config: Mapping[str, Any]) -> Tensor:
    """`fp8_native` for e4m3fn on devices without FP8 units."""
    return _product(x, w, w.tensors["weight"].view(torch.uint8), "fp8", "block", config)


def int8(x: Tensor, w: Prepared, config: Mapping[str, Any]) -> Tensor:
    """`dsv3.ops.quant_linear` for int8-w8a16."""
    return _product(x, w, w.tensors["weight"], "plain", "row", config)


def int4(x: Tensor, w: Prepared, config: Mapping[str, Any]) -> Tensor:
    """`dsv3.ops.quant_linear` for int4-w4a16."""
    return _product(x, w, w.tensors["weight"], "int4", "group", config)


def _product(x: Tensor, w: Prepared, codes: Tensor, form: str, scales: str, config: Mapping[str, Any]) -> Tensor:
    t, k = x.shape
    n = w.shape[0]
    scale, codes, x = w.tensors["scale"].contiguous(), codes.contiguous(), rows_whole(x)
    y = torch.empty(t, n, dtype=x.dtype, device=x.device)
    launch(
        dequant_linear_kernel, (triton.cdiv(t, config["BLOCK_M"]) * triton.cdiv(n, config["BLOCK_N"]),),
        x, codes, scale, y, t, n, k, x.stride(0), codes.stride(0), scale.shape[1], FORMAT=form, SCALES=scales, **config,
    )  # fmt: skip
    return y
