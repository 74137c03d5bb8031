"""The mixture of experts: one product per expert over sorted rows, whole on the device."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv3.plugin import Prepared
from dsv3_ascend import vendor
from dsv3_ascend.pointwise import quantised


def _products(x: Tensor, w: Prepared, ends: Tensor) -> Tensor:
    """x [M, K] sorted, w [E, N, K], ends i64 [E] -> [M, N] in x.dtype; what comes after ends[-1] may be anything."""
    if w.quant == "int8-w8a8":
        q, token_scale = quantised(x)
        return _int8(q, token_scale, w, ends).to(x.dtype)
    weight, whole = w.tensors["weight"].transpose(1, 2), _whole(ends, x.shape[0])
    if w.quant == "none":
        return vendor.of(x).grouped_matmul(x, weight.to(x.dtype), whole)
    y = vendor.of(x).grouped_weight_quant_matmul(x, weight, whole)
    return (y.to(torch.float32) * _by_row(w.tensors["scale"].squeeze(-1), ends, x.shape[0])).to(x.dtype)


def _int8(q: Tensor, token_scale: Tensor, w: Prepared, ends: Tensor) -> Tensor:
    """i8 [M, K], f32 [M] -> f32 [M, N]. Sums come back whole: for bfloat16 the vendor takes the weight's scales in bfloat16."""
    sums = vendor.of(q).grouped_int8_matmul(q, w.tensors["weight"], _whole(ends, q.shape[0])).to(torch.float32)
    return sums.mul_(token_scale[:, None]).mul_(_by_row(w.tensors["scale"], ends, q.shape[0]))


def _whole(ends: Tensor, rows: int) -> Tensor:
    """The vendor wants every row to have an expert: the last one gets those that have none, and nobody looks at them."""
    return torch.cat((ends[:-1], torch.full((1,), rows, dtype=ends.dtype, device=ends.device)))


def _by_row(scale: Tensor, ends: Tensor, rows: int) -> Tensor:
    """[E, N] -> [M, N]: of the expert that owns each row; the last expert's for those that none owns."""
    row = torch.arange(rows, dtype=ends.dtype, device=ends.device)
    return scale.index_select(0, torch.searchsorted(ends, row, right=True).clamp_(max=scale.shape[0] - 1))


def grouped_linear(x: Tensor, w: Prepared, offsets: Tensor) -> Tensor:
    if x.shape[0] == 0:
        return x.new_empty(0, w.shape[1])
    ends = offsets[1:].to(torch.int64)
    y = _products(x.contiguous(), w, ends)
    nobody = torch.arange(x.shape[0], dtype=ends.dtype, device=x.device) >= ends[-1]
    return y.masked_fill_(nobody[:, None], 0)


def fused_experts(x: Tensor, weights: Tensor, ids: Tensor, w13: Prepared, w2: Prepared) -> Tensor:
    """Schemes none and int8-w8a16."""
    if ids.numel() == 0:
        return torch.zeros_like(x)
    rows, place, counts, _ = vendor.of(x).init_routing(x.contiguous(), _ids(ids, w13), w13.shape[0], None)
    ends = counts.cumsum(0)
    h = vendor.of(x).swiglu(_products(rows, w13, ends))
    return _combine(_products(h, w2, ends), place, weights).to(x.dtype)


def fused_experts_w8a8(x: Tensor, weights: Tensor, ids: Tensor, w13: Prepared, w2: Prepared) -> Tensor:
    """int8-w8a8: tokens are quantised once; between the two products is one operator, which activates and quantises."""
    if ids.numel() == 0:
        return torch.zeros_like(x)
    q, token_scale = quantised(x)
    rows, place, counts, row_scale = vendor.of(x).init_routing(q, _ids(ids, w13), w13.shape[0], token_scale)
    ends = counts.cumsum(0)
    sums = vendor.of(x).grouped_int8_matmul(rows, w13.tensors["weight"], _whole(ends, rows.shape[0]))
    h, h_scale = vendor.of(x).dequant_swiglu_quant(sums, w13.tensors["scale"], row_scale, counts)
    return _combine(_int8(h, h_scale, w2, ends), place, weights).to(x.dtype)


def _ids(ids: Tensor, w13: Prepared) -> Tensor:
    """The vendor has no -1: pairs that go nowhere go to one expert more, outside the range of those that count."""
    return torch.where((ids < 0) | (ids >= w13.shape[0]), w13.shape[0], ids).to(torch.int32)


def _combine(y: Tensor, place: Tensor, weights: Tensor) -> Tensor:
    """y [M, H], place i32 [T*k], the row of each pair or -1, weights f32 [T, k] -> f32 [T, H], summed in the order of k. The
    vendor's npu_moe_finalize_routing knows no -1."""
    t, k = weights.shape
    valid = place >= 0
    rows = y.index_select(0, place.clamp_min(0).to(torch.int64)).to(torch.float32)
    rows = rows.masked_fill_(~valid[:, None], 0).view(t, k, y.shape[1])
    w = torch.where(valid.view(t, k), weights, 0).to(torch.float32)
    total = torch.zeros(t, y.shape[1], dtype=torch.float32, device=y.device)
    for j in range(k):
        total += w[:, j, None] * rows[:, j]
    return total
