"""The mixture of experts: few tokens by one kernel per step over all experts, many sorted and multiplied expert by expert."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dsv3 import ops
from dsv3.plugin import Prepared
from dsv3_cpu.kernels.experts import combine, spread
from dsv3_cpu.kernels.pointwise import silu_mul
from dsv3_cpu.linear import FEW, few_into, many_into
from dsv3_cpu.pointwise import ACTIVATION
from dsv3_cpu.views import Array, array, indices, made, wide


def grouped_linear(x: Tensor, w: Prepared, offsets: Tensor) -> Tensor:
    return _grouped(x.to(torch.float32), w, offsets, torch.float32).to(x.dtype)


def grouped_linear_bf16(x: Tensor, w: Prepared, offsets: Tensor) -> Tensor:
    """Where there are instructions for products of bfloat16."""
    return _grouped(x.to(torch.float32), w, offsets, torch.bfloat16).to(x.dtype)


def fused_experts(x: Tensor, weights: Tensor, ids: Tensor, w13: Prepared, w2: Prepared) -> Tensor:
    return _fused(x, weights, ids, w13, w2, torch.float32)


def fused_experts_bf16(x: Tensor, weights: Tensor, ids: Tensor, w13: Prepared, w2: Prepared) -> Tensor:
    """Where there are instructions for products of bfloat16."""
    return _fused(x, weights, ids, w13, w2, torch.bfloat16)


def _grouped(x: Tensor, w: Prepared, offsets: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 [M, N]; experts with few rows in one call, the others by tiles of their decoded weights."""
    bounds = offsets.tolist()
    y = torch.zeros(x.shape[0], w.shape[1])
    counts = np.diff(bounds)
    few = np.flatnonzero((counts > 0) & (counts <= FEW))
    if few.size:
        place = torch.from_numpy(np.concatenate([np.arange(bounds[e], bounds[e + 1]) for e in few]))
        part, out = made((place.shape[0], w.shape[1]), torch.float32)
        few_into(out, array(x[place]), w, few, np.concatenate([[0], np.cumsum(counts[few])]))
        y[place] = part
    for e in np.flatnonzero(counts > FEW).tolist():
        rows = slice(bounds[e], bounds[e + 1])
        many_into(y[rows], x[rows], w, e, dtype)
    return y


def _fused(x: Tensor, weights: Tensor, ids: Tensor, w13: Prepared, w2: Prepared, dtype: torch.dtype) -> Tensor:
    if x.shape[0] <= FEW:
        return _few(x, wide(weights), indices(ids), w13, w2)
    perm, offsets = ops.moe_permute(ids=ids, n_experts=w13.shape[0])
    token = torch.div(perm.clamp_min(0), ids.shape[1], rounding_mode="floor")
    gate, up = _grouped(x.index_select(0, token).to(torch.float32), w13, offsets, dtype).chunk(2, dim=-1)
    y = _grouped(torch.nn.functional.silu(gate).mul_(up), w2, offsets, dtype)
    return ops.moe_combine(y=y, perm=perm, weights=weights).to(x.dtype)


def _few(x: Tensor, weights: Array, ids: Array, w13: Prepared, w2: Prepared) -> Tensor:
    """All experts of a few tokens: sort, both products over all of them, sum. Between them everything is in x.dtype."""
    tokens = array(x)
    pairs, width, dtype = ids.size, w13.shape[1], tokens.dtype
    place, rows = np.empty(pairs, np.int64), np.empty((pairs, x.shape[1]), dtype)
    experts, offsets = np.empty(pairs, np.int64), np.empty(pairs + 1, np.int64)
    used = spread(0, ids, tokens, place, np.empty(w13.shape[0], np.int64), experts, offsets, rows)
    experts, offsets = experts[:used], offsets[: used + 1]
    # Rows of pairs whose expert is elsewhere come last, and are left out.
    total = int(offsets[used])
    h, gated = np.empty((total, width), dtype), np.empty((total, width // 2), dtype)
    few_into(h, rows[:total], w13, experts, offsets)
    silu_mul(ACTIVATION * h.nbytes, h, gated)
    y = np.empty((total, x.shape[1]), dtype)
    few_into(y, gated, w2, experts, offsets)
    out, sums = made((x.shape[0], x.shape[1]), x.dtype)
    combine(4 * y.nbytes, y, place, weights, sums)
    return out
