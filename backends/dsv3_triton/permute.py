"""(token, expert) pairs sorted by expert, and the experts' outputs summed back per token: no host sync, no atomics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv3_triton.launch import launch

# Fixed, so that a tuned product decides nothing about sorting inside `fused_experts`.
SORT = {"BLOCK": 1024, "num_warps": 4}
SUM = {"BLOCK_H": 1024, "num_warps": 4}


@triton.jit
def keys(ids_ptr, at, M, E):
    """Expert of each pair; E for what is no expert here, more than E past the end."""
    key = tl.load(ids_ptr + at, mask=at < M, other=-1)
    key = tl.where((key < 0) | (key >= E), E, key).to(tl.int32)
    return tl.where(at < M, key, E + 1)


@triton.jit(do_not_specialize=["M"])
def permute_kernel(ids_ptr, perm_ptr, offsets_ptr, row_ptr, M, E, BLOCK: tl.constexpr, INVERSE: tl.constexpr):
    """One program per expert, and one for the pairs of none: it counts the pairs that come before its own, then places its own
    in their order. Every program reads all ids, which stay in a cache. INVERSE: row_ptr gets each pair's row, -1 for none."""
    expert = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    before = tl.zeros([BLOCK], tl.int32)
    for first in range(0, M, BLOCK):
        before += (keys(ids_ptr, first + lane, M, E) < expert).to(tl.int32)
    place = tl.sum(before, axis=0)
    tl.store(offsets_ptr + expert, place)
    for first in range(0, M, BLOCK):
        pair = first + lane
        mine = keys(ids_ptr, pair, M, E) == expert
        row = place + tl.cumsum(mine.to(tl.int32), axis=0) - 1
        tl.store(perm_ptr + row, tl.where(expert < E, pair, -1), mask=mine)
        if INVERSE:
            tl.store(row_ptr + pair, tl.where(expert < E, row, -1), mask=mine)
        place += tl.sum(mine.to(tl.int32), axis=0)


@triton.jit(do_not_specialize=["M"])
def invert_kernel(perm_ptr, row_ptr, M, BLOCK: tl.constexpr):
    """row[perm[r]] = r."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    pair = tl.load(perm_ptr + row, mask=row < M, other=-1)
    tl.store(row_ptr + pair, row, mask=pair >= 0)


@triton.jit(do_not_specialize=["T"])
def combine_kernel(
    y_ptr, row_ptr, weights_ptr, out_ptr, T, H, stride_y, stride_t, stride_k, TOPK: tl.constexpr, BLOCK_H: tl.constexpr
):
    """One program: BLOCK_H columns of one token. A pair without a row reads neither its row nor its weight."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    total = tl.zeros([BLOCK_H], tl.float32)
    for j in range(TOPK):
        row = tl.load(row_ptr + token * TOPK + j).to(tl.int64)
        weight = tl.load(weights_ptr + token * stride_t + j * stride_k)
        y = tl.load(y_ptr + row * stride_y + column, mask=column < tl.where(row >= 0, H, 0), other=0.0)
        total += tl.where(row >= 0, weight, 0.0) * y.to(tl.float32)
    tl.store(out_ptr + token * H + column, total.to(out_ptr.dtype.element_ty), mask=column < H)


def sort_pairs(ids: Tensor, n_experts: int, rows: Tensor | None, config: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """perm i32 [M], offsets i32 [n_experts + 1] of ids [T, k]; rows i32 [M], if given, gets the inverse of perm."""
    m = ids.numel()
    perm = torch.empty(m, dtype=torch.int32, device=ids.device)
    offsets = torch.empty(n_experts + 1, dtype=torch.int32, device=ids.device)
    launch(
        permute_kernel, (n_experts + 1,), ids.reshape(-1), perm, offsets, rows, m, n_experts,
        BLOCK=config["BLOCK"], INVERSE=rows is not None, num_warps=config["num_warps"],
    )  # fmt: skip
    return perm, offsets


def sum_pairs(y: Tensor, rows: Tensor, weights: Tensor, config: Mapping[str, Any]) -> Tensor:
    """out [T, H] of y [M, H], the row of each pair i32 [M] (-1: none), weights f32 [T, k]."""
    (t, k), h = weights.shape, y.shape[1]
    out = torch.empty(t, h, dtype=y.dtype, device=y.device)
    launch(
        combine_kernel, (t, triton.cdiv(h, config["BLOCK_H"])), y, rows, weights, out, t, h, y.stride(0),
        weights.stride(0), weights.stride(1), TOPK=k, BLOCK_H=config["BLOCK_H"], num_warps=config["num_warps"],
    )  # fmt: skip
    return out


def moe_permute(ids: Tensor, n_experts: int, config: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """`dsv3.ops.moe_permute`."""
    return sort_pairs(ids, n_experts, None, config)


def moe_combine(y: Tensor, perm: Tensor, weights: Tensor, config: Mapping[str, Any]) -> Tensor:
    """`dsv3.ops.moe_combine`."""
    m = perm.shape[0]
    rows = torch.full((m,), -1, dtype=torch.int32, device=y.device)
    block = 1024
    launch(invert_kernel, (triton.cdiv(m, block),), perm, rows, m, BLOCK=block, num_warps=4)
    return sum_pairs(y, rows, weights, config)
