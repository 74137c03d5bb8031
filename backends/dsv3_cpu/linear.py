"""Matrix products: few rows by kernels that decode weights in registers, many by torch's, over decoded tiles of the weight."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dsv3.plugin import Prepared
from dsv3_cpu import int8
from dsv3_cpu.kernels.grouped import decoded, grouped, heads
from dsv3_cpu.views import FIRST, Array, array, flat, made, weight

FEW = 16  # rows up to which a weight is decoded row by row, and never kept
_TILE_NUMBERS = 1 << 21  # of a decoded tile


def few_into(y: Array, x: Array, w: Prepared, experts: Array, offsets: Array) -> None:
    """Rows offsets[j] to offsets[j + 1] of y [M, N]: those of x [M, K] by expert experts[j]; both float32 or both bfloat16.

    Other rows of y are not written. Work: every expert's weights once, and again for every four more rows.
    """
    values, scales = weight(w)
    if w.quant == "int8-w8a8":
        int8.rows_into(y, x, values, scales, experts, offsets)
        return
    work = (values.nbytes // max(1, values.shape[0])) * max(experts.shape[0], x.shape[0] // 4)
    grouped(work, values, scales, experts, offsets, x, y)


def many_into(y: Tensor, x: Tensor, w: Prepared, expert: int, dtype: torch.dtype) -> None:
    """y [T, N] = x [T, K] by one expert, over tiles of it decoded to float32, and rounded to dtype, that of the product."""
    values, scales = weight(w)
    if w.quant == "int8-w8a8":
        int8.many_into(y, x, values[expert], scales[expert])
        return
    n, k = values.shape[1], x.shape[1]
    if values.dtype.itemsize * 8 == torch.finfo(dtype).bits:  # stored as it is multiplied
        stored = w.tensors["weight"]
        y.copy_(torch.mm(x.to(dtype), (stored[expert] if stored.dim() == 3 else stored).t()))
        return
    x = x.to(dtype)
    step = max(16, min(n, _TILE_NUMBERS // max(1, k)))
    tile, numbers = made((step, k))
    for first in range(0, n, step):
        rows = min(step, n - first)
        decoded(4 * rows * k, values, scales, expert, first, numbers[:rows])
        y[:, first : first + rows] = torch.mm(x, tile[:rows].to(dtype).t())


def quant_linear(x: Tensor, w: Prepared) -> Tensor:
    return _product(x, w, torch.float32)


def quant_linear_bf16(x: Tensor, w: Prepared) -> Tensor:
    """Where there are instructions for products of bfloat16."""
    return _product(x, w, torch.bfloat16)


def _product(x: Tensor, w: Prepared, dtype: torch.dtype) -> Tensor:
    t = x.shape[0]
    if w.quant == "none" and x.dtype == w.tensors["weight"].dtype == torch.float32:
        return torch.nn.functional.linear(x, w.tensors["weight"])
    if t <= FEW:
        y, out = made((t, w.shape[0]), x.dtype)
        few_into(out, array(x), w, FIRST, np.array([0, t]))
        return y
    y = torch.empty(t, w.shape[0])
    many_into(y, x, w, 0, dtype)
    return y.to(x.dtype)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The weight in its own dtype, as it is stored; a bias is added before the rounding."""
    w = Prepared("canonical", "none", tuple(weight.shape), {"weight": weight})
    if bias is None:
        return quant_linear(x, w)
    return quant_linear(x.to(torch.float32), w).add_(bias).to(x.dtype)


def bmm(x: Tensor, weight: Tensor) -> Tensor:
    """Few rows where the absorbed weights lie, as they lie; many by torch, in float32."""
    unit = [n for n in (1, 2) if weight.stride(n) == 1]
    if x.shape[0] <= FEW and unit and weight.numel():
        y, out = made((x.shape[0], weight.shape[0], weight.shape[2]), x.dtype)
        heads(weight.numel() * weight.element_size(), array(x), flat(weight), *weight.stride(), out)
        return y
    product = torch.bmm(x.transpose(0, 1).to(torch.float32), weight.to(torch.float32))
    return product.transpose(0, 1).to(x.dtype).contiguous()


def router_gemm(x: Tensor, weight: Tensor) -> Tensor:
    return linear(x.to(torch.float32), weight, None)
