"""Matrix products: few rows by kernels that decode weights in registers, many by torch's, over decoded tiles of the weight."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dsv3.plugin import Prepared
from dsv3_cpu.kernels.grouped import decoded, grouped
from dsv3_cpu.views import Array, array, made, weight, wide

FEW = 16  # rows up to which a weight is decoded row by row, and never kept
_TILE_NUMBERS = 1 << 21  # float32 numbers of a decoded tile
_ONE = np.zeros(1, np.int64)


def rows_product(x: Array, w: Array, s: Array, experts: Array, offsets: Array) -> Tensor:
    """y [M, N] float32: rows offsets[j] to offsets[j + 1] of x by expert experts[j]; others are not written."""
    y, out = made((x.shape[0], w.shape[1]))
    rows_into(out, x, w, s, experts, offsets)
    return y


def rows_into(y: Array, x: Array, w: Array, s: Array, experts: Array, offsets: Array) -> None:
    """The same into y. Work: every expert's weights once, and again for every four more rows."""
    work = (w.nbytes // max(1, w.shape[0])) * max(experts.shape[0], x.shape[0] // 4)
    grouped(work, w, s, experts, offsets, x, y)


def tiles_product(x: Tensor, w: Array, s: Array, expert: int, y: Tensor) -> None:
    """y [T, N] = x [T, K] @ W^T, all float32, over tiles of W decoded to float32."""
    n, k = w.shape[1], x.shape[1]
    step = max(16, min(n, _TILE_NUMBERS // max(1, k)))
    tile, numbers = made((step, k))
    for first in range(0, n, step):
        rows = min(step, n - first)
        decoded(4 * rows * k, w, s, expert, first, numbers[:rows])
        y[:, first : first + rows] = torch.mm(x, tile[:rows].t())


def product(x: Tensor, w: Array, s: Array) -> Tensor:
    """x [T, K] by the only matrix of w [1, N, ..] -> [T, N] in x.dtype."""
    t = x.shape[0]
    if t <= FEW:
        return rows_product(wide(x), w, s, _ONE, np.array([0, t])).to(x.dtype)
    y = torch.empty(t, w.shape[1], dtype=torch.float32)
    tiles_product(x.to(torch.float32), w, s, 0, y)
    return y.to(x.dtype)


def quant_linear(x: Tensor, w: Prepared) -> Tensor:
    if w.quant == "none" and x.dtype == torch.float32 and w.tensors["weight"].dtype == torch.float32:
        return torch.nn.functional.linear(x, w.tensors["weight"])
    return product(x, *weight(w))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if x.dtype == torch.float32:
        return torch.nn.functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    y = quant_linear(x.to(torch.float32), Prepared("canonical", "none", tuple(weight.shape), {"weight": weight}))
    return (y if bias is None else y.add_(bias)).to(x.dtype)


def bmm(x: Tensor, weight: Tensor) -> Tensor:
    """torch's own in float32: weights are absorbed ones, small and strided."""
    y = torch.bmm(x.transpose(0, 1).to(torch.float32), weight.to(torch.float32))
    return y.transpose(0, 1).to(x.dtype).contiguous()


def router_gemm(x: Tensor, weight: Tensor) -> Tensor:
    if weight.dtype == torch.float32 or x.shape[0] > FEW:
        return torch.nn.functional.linear(x.to(torch.float32), weight.to(torch.float32))
    return rows_product(wide(x), array(weight)[None], np.zeros((1, 1), np.float32), _ONE, np.array([0, x.shape[0]]))
