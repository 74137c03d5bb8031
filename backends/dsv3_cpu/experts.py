"""The mixture of experts: few tokens in one kernel, many sorted by expert and multiplied expert by expert."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dsv3 import ops
from dsv3.plugin import Prepared
from dsv3_cpu.kernels.experts import combine, spread
from dsv3_cpu.kernels.pointwise import silu_mul
from dsv3_cpu.linear import FEW, rows_into, rows_product, tiles_product
from dsv3_cpu.pointwise import ACTIVATION
from dsv3_cpu.views import Array, array, indices, made, weight, wide


def grouped_linear(x: Tensor, w: Prepared, offsets: Tensor) -> Tensor:
    return _grouped(x.to(torch.float32), w, offsets).to(x.dtype)


def _grouped(x: Tensor, w: Prepared, offsets: Tensor) -> Tensor:
    """float32 [M, N]; experts with few rows in one call, the others by tiles of their decoded weights."""
    values, scales = weight(w)
    bounds = offsets.tolist()
    y = torch.zeros(x.shape[0], w.shape[1])
    counts = np.diff(bounds)
    few = np.flatnonzero((counts > 0) & (counts <= FEW))
    if few.size:
        rows = np.concatenate([np.arange(bounds[e], bounds[e + 1]) for e in few])
        place = torch.from_numpy(rows)
        ends = np.concatenate([[0], np.cumsum(counts[few])])
        y[place] = rows_product(array(x[place]), values, scales, few, ends)
    for e in np.flatnonzero(counts > FEW).tolist():
        tiles_product(x[bounds[e] : bounds[e + 1]], values, scales, e, y[bounds[e] : bounds[e + 1]])
    return y


def fused_experts(x: Tensor, weights: Tensor, ids: Tensor, w13: Prepared, w2: Prepared) -> Tensor:
    if x.shape[0] <= FEW:
        return _few(wide(x), wide(weights), indices(ids), w13, w2).to(x.dtype)
    perm, offsets = ops.moe_permute(ids=ids, n_experts=w13.shape[0])
    token = torch.div(perm.clamp_min(0), ids.shape[1], rounding_mode="floor")
    h = _grouped(x.index_select(0, token).to(torch.float32), w13, offsets)
    gate, up = h.chunk(2, dim=-1)
    y = _grouped(torch.nn.functional.silu(gate).mul_(up), w2, offsets)
    return ops.moe_combine(y=y, perm=perm, weights=weights).to(x.dtype)


def _few(x: Array, weights: Array, ids: Array, w13: Prepared, w2: Prepared) -> Tensor:
    """All experts of a few tokens: sort, both products over all of them, sum."""
    pairs, width = ids.size, w13.shape[1]
    values, scales = weight(w13)
    place, rows = np.empty(pairs, np.int64), np.empty((pairs, x.shape[1]), np.float32)
    experts, offsets = np.empty(pairs, np.int64), np.empty(pairs + 1, np.int64)
    used = spread(0, ids, x, place, np.empty(values.shape[0], np.int64), experts, offsets, rows)
    experts, offsets = experts[:used], offsets[: used + 1]
    h, gated = np.empty((pairs, width), np.float32), np.empty((pairs, width // 2), np.float32)
    rows_into(h, rows, values, scales, experts, offsets)
    # Rows of pairs whose expert is elsewhere are not written, and never read.
    total = int(offsets[used])
    silu_mul(ACTIVATION * h.nbytes, h[:total], gated[:total])
    y = np.empty((pairs, x.shape[1]), np.float32)
    rows_into(y, gated, *weight(w2), experts, offsets)
    out, sums = made(x.shape)
    combine(4 * y.nbytes, y, place, weights, sums)
    return out
