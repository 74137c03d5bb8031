"""FP8 products with block scales: 1x128 on the activations, 128x128 on the weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv3.plugin import Prepared
from dsv3_triton.launch import launch
from dsv3_triton.numbers import decode_fp8, is_nan_fp8
from dsv3_triton.quantize import act_quant
from dsv3_triton.tiles import read, tile_of, write

GROUP = 128


@triton.jit(do_not_specialize=["T"])
def block_scaled_kernel(
    a_ptr, a_scale_ptr, b_ptr, b_scale_ptr, y_ptr, T, N, K, stride_a, stride_b, groups,
    NATIVE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    """One program: a tile of y whose columns share their scales. After every BLOCK_K = 128 products the partial sum,
    which matrix units may keep in few bits, is scaled and added in float32. Source: DeepSeek-V3 report, 3.3.2, figure 7."""
    row, column = tile_of(tl.program_id(0), T, N, BLOCK_M, BLOCK_N, BAND)
    rows = row * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = column * BLOCK_N + tl.arange(0, BLOCK_N)
    lane = tl.arange(0, BLOCK_K)
    a_scales = a_scale_ptr + rows.to(tl.int64) * groups
    b_scales = b_scale_ptr + (column * BLOCK_N // BLOCK_K) * groups
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for group in range(groups):
        k = group * BLOCK_K + lane
        a = read(a_ptr, rows, stride_a, k, T, K)
        b = read(b_ptr, columns, stride_b, k, N, K)
        if not NATIVE:
            a = tl.where(is_nan_fp8(a, False), float("nan"), decode_fp8(a, False)).to(tl.bfloat16)
            b = decode_fp8(b, False).to(tl.bfloat16)
        scale = tl.load(a_scales + group, mask=rows < T, other=0.0) * tl.load(b_scales + group)
        acc += tl.dot(a, tl.trans(b)) * scale[:, None]
    write(y_ptr, rows, N, columns, T, N, acc)


def mma(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, out_dtype: str, config: Mapping[str, Any]) -> Tensor:
    """`dsv3.ops.block_scaled_mm` where the matrix units take the operands' encoding.

    a [T, K], a_scale [T, ceil(K/128)], b [N, K], b_scale [ceil(N/128), ceil(K/128)] -> [T, N].
    """
    return _product(a, a_scale, b, b_scale, out_dtype, config, native=True)


def decoded(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, out_dtype: str, config: Mapping[str, Any]) -> Tensor:
    """`mma` for e4m3fn on devices without FP8 units: operands become bfloat16, exactly."""
    return _product(a.view(torch.uint8), a_scale, b.view(torch.uint8), b_scale, out_dtype, config, native=False)


def _product(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, out_dtype: str, config: Mapping[str, Any], native: bool
) -> Tensor:
    t, k = a.shape
    n = b.shape[0]
    a, b = a.contiguous(), b.contiguous()
    y = torch.empty(t, n, dtype=getattr(torch, out_dtype), device=a.device)
    launch(
        block_scaled_kernel, (triton.cdiv(t, config["BLOCK_M"]) * triton.cdiv(n, config["BLOCK_N"]),),
        a, a_scale.contiguous(), b, b_scale.contiguous(), y, t, n, k, a.stride(0), b.stride(0), triton.cdiv(k, GROUP),
        NATIVE=native, BLOCK_K=GROUP, **config,
    )  # fmt: skip
    return y


def quant_linear_mma(x: Tensor, w: Prepared, config: Mapping[str, Any]) -> Tensor:
    """`dsv3.ops.quant_linear` for fp8-w8a8: x [T, K], w [N, K] -> [T, N]."""
    return _quantised(x, w, config, mma)


def quant_linear_decoded(x: Tensor, w: Prepared, config: Mapping[str, Any]) -> Tensor:
    """`quant_linear_mma` on devices without FP8 units."""
    return _quantised(x, w, config, decoded)


def _quantised(x: Tensor, w: Prepared, config: Mapping[str, Any], product: Any) -> Tensor:
    """Activations take the encoding of the weights."""
    tile = {name: value for name, value in config.items() if not name.startswith("quant_")}
    weight = w.tensors["weight"]
    quant = {"BLOCK_T": config["quant_BLOCK_T"], "num_warps": config["quant_num_warps"]}
    a, a_scale = act_quant(x, GROUP, str(weight.dtype).removeprefix("torch."), w.scale_fmt, 1e-4, quant)
    out = str(x.dtype).removeprefix("torch.")
    return product(a=a, a_scale=a_scale, b=weight, b_scale=w.tensors["scale"], out_dtype=out, config=tile)
