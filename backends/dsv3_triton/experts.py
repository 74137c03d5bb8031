"""The experts' products, and the mixture of experts as one operator: gate and up together, then down, then the sum."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv3.plugin import Prepared
from dsv3_triton.grouped import grouped_kernel
from dsv3_triton.launch import launch
from dsv3_triton.permute import SORT, SUM, sort_pairs, sum_pairs
from dsv3_triton.quantize import FP8_MAX, act_quant
from dsv3_triton.quantize_int8 import quant_int8

_KINDS = {
    "none": "none",
    "fp8-w8a8": "fp8",
    "fp8-w8a16": "fp8a16",
    "int8-w8a8": "int8",
    "int8-w8a16": "int8a16",
    "int4-w4a16": "int4",
}
_DOT = {torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
_QUANTISE = {"BLOCK_T": 8, "num_warps": 4}
_QUANTISE_INT8 = {"BLOCK_T": 1, "BLOCK_K": 1024, "num_warps": 4}


def grouped_linear(x: Tensor, w: Prepared, offsets: Tensor, config: Mapping[str, Any]) -> Tensor:
    """`dsv3.ops.grouped_linear`."""
    y = torch.empty(x.shape[0], w.shape[1], dtype=x.dtype, device=x.device)
    a, scale = _activations(x, w)
    _product(a, scale, None, 0, w, offsets, y, None, w.shape[1], x.dtype, config["BLOCK_N"], config, tail=True)
    return y


def fused_experts(x: Tensor, weights: Tensor, ids: Tensor, w13: Prepared, w2: Prepared, config: Mapping[str, Any]) -> Tensor:
    """`dsv3.ops.fused_experts`. Rows of x are read through perm; what is between the products is rounded once, to x's dtype or
    to FP8; for int8, whose scale is a whole row's, first to the one and then to the other."""
    (m, k), width = (ids.numel(), ids.shape[1]), w2.shape[2]
    rows = torch.empty(m, dtype=torch.int32, device=x.device)
    perm, offsets = sort_pairs(ids, w13.shape[0], rows, SORT)
    a, scale = _activations(x, w13)
    requantise = w13.quant == "fp8-w8a8"
    h_scale = torch.empty(m, triton.cdiv(width, 128), dtype=torch.float32, device=x.device) if requantise else None
    h = torch.empty(m, width, dtype=a.dtype if requantise else x.dtype, device=x.device)
    _product(a, scale, perm, k, w13, offsets, h, h_scale, width, x.dtype, config["BLOCK_N"], config, gated=True)
    if not requantise:
        h, h_scale = _activations(h, w2)
    y = torch.empty(m, x.shape[1], dtype=x.dtype, device=x.device)
    _product(h, h_scale, None, 0, w2, offsets, y, None, x.shape[1], x.dtype, config["DOWN_BLOCK_N"], config)
    return sum_pairs(y, rows, weights, SUM)


def _activations(x: Tensor, w: Prepared) -> tuple[Tensor, Tensor | None]:
    """x as the product reads it, rows adjacent in K: codes and scales where the scheme says so."""
    if w.quant == "fp8-w8a8":
        encoding = str(w.tensors["weight"].dtype).removeprefix("torch.")
        return act_quant(x, 128, encoding, w.scale_fmt, 1e-4, _QUANTISE)
    if w.quant == "int8-w8a8":
        return quant_int8(x, 1e-10, _QUANTISE_INT8)
    return (x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()), None


def _product(
    x: Tensor, x_scale: Tensor | None, perm: Tensor | None, topk: int, w: Prepared, offsets: Tensor, y: Tensor,
    y_scale: Tensor | None, n: int, dtype: torch.dtype, block_n: int, config: Mapping[str, Any], gated: bool = False,
    tail: bool = False,
) -> None:  # fmt: skip
    """Start `grouped_kernel` with as many tiles as any spread of the rows over the experts can need."""
    experts, _, k = w.shape
    scales = w.tensors.get("scale")
    m, block_m = y.shape[0], config["BLOCK_M"]
    tall = min(m, (m + (experts + tail) * (block_m - 1)) // block_m)
    weight, kind = w.tensors["weight"], _KINDS[w.quant]
    fp8, native = kind.startswith("fp8"), config.get("NATIVE", False)
    fnuz = weight.dtype == torch.float8_e4m3fnuz
    if fp8 and not native:
        weight = weight.view(torch.uint8)
        x = x.view(torch.uint8) if kind == "fp8" else x
    requantise = y_scale is not None
    launch(
        grouped_kernel, (tall * triton.cdiv(n, block_n),),
        x, x_scale, perm, weight, scales, offsets, y.view(torch.uint8) if requantise else y, y_scale,
        m, tall, n, k, experts, x.stride(0), weight.stride(1), weight.stride(0), 0 if scales is None else scales.stride(0),
        FP8_MAX["float8_e4m3fnuz" if fnuz else "float8_e4m3fn"],
        KIND=kind, NATIVE=fp8 and native, FNUZ=fnuz, GATED=gated, REQUANTISE=requantise, UE8M0=w.scale_fmt == "ue8m0",
        TOPK=topk, TAIL=tail, DTYPE=tl.bfloat16 if kind == "fp8" else _DOT[dtype],
        LANES=triton.next_power_of_2(experts + 1), BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=config["BLOCK_K"],
        BAND=config["BAND"], num_warps=config["num_warps"], num_stages=config["num_stages"],
    )  # fmt: skip
