"""The router: logits in float32 without matrix instructions, the choice of experts, and both in one kernel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv3_triton.choose import choose
from dsv3_triton.launch import launch
from dsv3_triton.linear import rows_whole


@triton.jit
def logits_of(x_ptr, w_ptr, rows, experts, T, E, H, stride_x, stride_w, BLOCK_H: tl.constexpr):
    """[rows, experts] of x @ w^T. Products of float32 numbers, added lane by lane in float32 and across lanes at the end:
    matrix units would round x or the sums, and near ties of experts would be decided by that."""
    row = rows[:, None, None]
    expert = experts[None, :, None]
    x_rows = x_ptr + row.to(tl.int64) * stride_x
    w_rows = w_ptr + expert.to(tl.int64) * stride_w
    sums = tl.zeros((rows.shape[0], experts.shape[0], BLOCK_H), tl.float32)
    for h in range(0, H, BLOCK_H):
        lane = h + tl.arange(0, BLOCK_H)[None, None, :]
        x = tl.load(x_rows + lane, mask=(row < T) & (lane < H), other=0.0).to(tl.float32)
        w = tl.load(w_rows + lane, mask=(expert < E) & (lane < H), other=0.0).to(tl.float32)
        sums += x * w
    return tl.sum(sums, axis=2)


@triton.jit(do_not_specialize=["T"])
def router_kernel(
    x_ptr, w_ptr, logits_ptr, T, E, H, stride_x, stride_w,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_T tokens x BLOCK_E experts."""
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    experts = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    logits = logits_of(x_ptr, w_ptr, rows, experts, T, E, H, stride_x, stride_w, BLOCK_H)
    inside = (rows < T)[:, None] & (experts < E)[None, :]
    tl.store(logits_ptr + rows.to(tl.int64)[:, None] * E + experts[None, :], logits, mask=inside)


@triton.jit(do_not_specialize=["T"])
def topk_kernel(
    logits_ptr, bias_ptr, weights_ptr, ids_ptr, T, stride, topk, topk_group, groups, width, scale,
    SIGMOID: tl.constexpr, BIAS: tl.constexpr, TOP2: tl.constexpr, RENORMALIZE: tl.constexpr,
    G: tl.constexpr, W: tl.constexpr, KK: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_T tokens."""
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    _read_and_choose(
        logits_ptr, bias_ptr, weights_ptr, ids_ptr, rows, T, stride, topk, topk_group, groups, width, scale,
        SIGMOID, BIAS, TOP2, RENORMALIZE, G, W, KK,
    )  # fmt: skip


@triton.jit
def _read_and_choose(
    logits_ptr, bias_ptr, weights_ptr, ids_ptr, rows, T, stride, topk, topk_group, groups, width, scale,
    SIGMOID: tl.constexpr, BIAS: tl.constexpr, TOP2: tl.constexpr, RENORMALIZE: tl.constexpr,
    G: tl.constexpr, W: tl.constexpr, KK: tl.constexpr,
):  # fmt: skip
    """Logits are read so that every group begins at a multiple of W lanes."""
    lane = tl.arange(0, G * W)[None, :]
    ids = lane // W * width + lane % W
    inside = (lane % W < width) & (lane // W < groups)
    at = logits_ptr + rows.to(tl.int64)[:, None] * stride + ids
    logits = tl.load(at, mask=(rows < T)[:, None] & inside, other=0.0, cache_modifier=".cg").to(tl.float32)
    choose(
        logits, bias_ptr, weights_ptr, ids_ptr, rows, T, topk, topk_group, groups, width, scale, ids, inside,
        SIGMOID, BIAS, TOP2, RENORMALIZE, G, W, KK,
    )  # fmt: skip


@triton.jit(do_not_specialize=["T"])
def route_kernel(
    x_ptr, w_ptr, logits_ptr, done_ptr, bias_ptr, weights_ptr, ids_ptr, T, E, H, stride_x, stride_w,
    topk, topk_group, groups, width, scale,
    SIGMOID: tl.constexpr, BIAS: tl.constexpr, TOP2: tl.constexpr, RENORMALIZE: tl.constexpr,
    G: tl.constexpr, W: tl.constexpr, KK: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_T tokens x BLOCK_E experts. The gate is too large for one program to read it in time, so whichever
    program of its tokens ends last finds all logits written, and chooses. Nothing depends on which one that is."""
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    experts = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    logits = logits_of(x_ptr, w_ptr, rows, experts, T, E, H, stride_x, stride_w, BLOCK_H)
    inside = (rows < T)[:, None] & (experts < E)[None, :]
    tl.store(logits_ptr + rows.to(tl.int64)[:, None] * E + experts[None, :], logits, mask=inside)
    tl.debug_barrier()  # all of the program's logits are written before it counts itself
    before = tl.atomic_add(done_ptr + tl.program_id(0), 1, sem="acq_rel", scope="gpu")
    if before == tl.num_programs(1) - 1:
        tl.debug_barrier()
        _read_and_choose(
            logits_ptr, bias_ptr, weights_ptr, ids_ptr, rows, T, E, topk, topk_group, groups, width, scale,
            SIGMOID, BIAS, TOP2, RENORMALIZE, G, W, KK,
        )  # fmt: skip


def router_gemm(x: Tensor, weight: Tensor, config: Mapping[str, Any]) -> Tensor:
    """`dsv3.ops.router_gemm`: x [T, H], weight [E, H] -> float32 [T, E]."""
    (t, h), e = x.shape, weight.shape[0]
    x, weight = rows_whole(x), rows_whole(weight)
    logits = torch.empty(t, e, dtype=torch.float32, device=x.device)
    grid = (triton.cdiv(t, config["BLOCK_T"]), triton.cdiv(e, config["BLOCK_E"]))
    launch(router_kernel, grid, x, weight, logits, t, e, h, x.stride(0), weight.stride(0), **config)
    return logits


def grouped_topk(
    logits: Tensor, bias: Tensor | None, n_group: int, topk_group: int, topk: int, score: str, group_score: str,
    renormalize: bool, scale: float, config: Mapping[str, Any],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`dsv3.ops.grouped_topk`: logits [T, E], bias [E] or None -> weights [T, topk], ids int32 [T, topk]."""
    t, e = logits.shape
    logits = rows_whole(logits)
    weights, ids = _outputs(t, topk, logits)
    launch(
        topk_kernel, (triton.cdiv(t, config["BLOCK_T"]),),
        logits, logits if bias is None else bias.contiguous(), weights, ids, t, logits.stride(0),
        topk, topk_group, n_group, e // n_group, scale,
        **_modes(e, bias, n_group, topk, score, group_score, renormalize), **config,
    )  # fmt: skip
    return weights, ids


def route(
    x: Tensor, gate: Tensor, bias: Tensor | None, n_group: int, topk_group: int, topk: int, score: str, group_score: str,
    renormalize: bool, scale: float, config: Mapping[str, Any],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`dsv3.ops.route`: x [T, H], gate [E, H], bias [E] or None -> weights [T, topk], ids int32 [T, topk]."""
    (t, h), e = x.shape, gate.shape[0]
    x, gate = rows_whole(x), rows_whole(gate)
    weights, ids = _outputs(t, topk, x)
    grid = (triton.cdiv(t, config["BLOCK_T"]), triton.cdiv(e, config["BLOCK_E"]))
    logits = torch.empty(t, e, dtype=torch.float32, device=x.device)
    done = torch.zeros(grid[0], dtype=torch.int32, device=x.device)
    biases = logits if bias is None else bias.contiguous()
    launch(
        route_kernel, grid,
        x, gate, logits, done, biases, weights, ids, t, e, h, x.stride(0), gate.stride(0),
        topk, topk_group, n_group, e // n_group, scale,
        **_modes(e, bias, n_group, topk, score, group_score, renormalize), **config,
    )  # fmt: skip
    return weights, ids


def _outputs(t: int, topk: int, like: Tensor) -> tuple[Tensor, Tensor]:
    weights = torch.empty(t, topk, dtype=torch.float32, device=like.device)
    return weights, torch.empty(t, topk, dtype=torch.int32, device=like.device)


def _modes(
    e: int, bias: Tensor | None, n_group: int, topk: int, score: str, group_score: str, renormalize: bool
) -> dict[str, Any]:
    """What is compiled into the choice. Groups and their experts take a power of two of lanes each."""
    return {
        "SIGMOID": score == "sigmoid", "BIAS": bias is not None, "TOP2": group_score == "top2_sum", "RENORMALIZE": renormalize,
        "G": triton.next_power_of_2(n_group), "W": triton.next_power_of_2(e // n_group), "KK": triton.next_power_of_2(topk),
    }  # fmt: skip
