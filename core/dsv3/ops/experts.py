"""The mixture of experts: sort tokens by expert, one product per expert, weighted sum back per token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dsv3.ops.norm import work_dtype
from dsv3.ops.spec import composite, primitive
from dsv3.plugin import Prepared


@primitive("ids[T,k]:int E=n_experts M=T*k -> perm[M]:i32 offsets[E+1]:i32")
def moe_permute(ids: Tensor, n_experts: int) -> tuple[Tensor, Tensor]:
    """Sort the M = T * k (token, expert) pairs by expert, stably.

    ids [T, k], -1 for an expert that is not here -> perm i32 [M], offsets i32 [n_experts + 1]. Row r of the sorted order is the
    pair perm[r] = t * k + j; expert e owns rows offsets[e] to offsets[e + 1]; rows from offsets[n_experts] on are -1.

    Invariants:
    - perm over its valid rows is a permutation of the pairs that are not -1
    - offsets ascend from 0; an expert without tokens owns no rows
    """
    flat = ids.reshape(-1).to(torch.int64)
    key = torch.where((flat < 0) | (flat >= n_experts), n_experts, flat)
    sorted_key, order = torch.sort(key, stable=True)
    perm = torch.where(sorted_key < n_experts, order, -1).to(torch.int32)
    counts = torch.zeros(n_experts + 1, dtype=torch.int64, device=ids.device)
    counts.scatter_add_(0, key, torch.ones_like(key))
    offsets = torch.zeros(n_experts + 1, dtype=torch.int32, device=ids.device)
    offsets[1:] = counts[:n_experts].cumsum(0)
    return perm, offsets


@primitive("y[M,H] perm[M]:int weights[T,k]:f32 -> out[T,H]")
def moe_combine(y: Tensor, perm: Tensor, weights: Tensor) -> Tensor:
    """out[t] = sum over j of weights[t, j] * y[row of (t, j)], in float32, in the order of j, rounded once.

    y [M, H], perm [M] from moe_permute, weights f32 [T, k] -> [T, H] in y.dtype. Rows and weights of pairs whose perm is -1 are
    ignored, whatever they hold, NaN included.

    Invariants:
    - permuting the rows of y together with perm changes nothing
    """
    t, k = weights.shape
    work = work_dtype(y)
    valid = perm >= 0
    # Row t * k collects what belongs nowhere and is cut off again: no shape may depend on how many pairs are valid.
    place = torch.where(valid, perm, t * k).to(torch.int64)
    rows = torch.zeros(t * k + 1, y.shape[1], dtype=work, device=y.device)
    rows.index_copy_(0, place, torch.where(valid[:, None], y, torch.zeros_like(y)).to(work))
    present = torch.zeros(t * k + 1, dtype=torch.bool, device=y.device)
    present.index_fill_(0, place, True)
    w = torch.where(present[: t * k].view(t, k), weights, torch.zeros_like(weights)).to(work)
    terms = rows[: t * k].view(t, k, y.shape[1])
    total = torch.zeros(t, y.shape[1], dtype=work, device=y.device)
    for j in range(k):
        total += w[:, j, None] * terms[:, j]
    return total.to(y.dtype)


def expert_weight(w: Prepared, expert: int) -> Prepared:
    """One expert's [N, K] weight out of a canonical [E, N, K]."""
    tensors = {name: tensor[expert] for name, tensor in w.tensors.items()}
    return Prepared(w.layout, w.quant, w.shape[1:], tensors, w.scale_fmt)


@composite("x[M,K] w{E,N,K} offsets[E+1]:int -> y[M,N]", on_host=True)
def grouped_linear(ops: Any, x: Tensor, w: Prepared, offsets: Tensor) -> Tensor:
    """y[r] = x[r] @ W[e]^T for the expert e that owns row r; rows from offsets[E] on are zero.

    x [M, K] sorted by expert, w Prepared [E, N, K], offsets [E + 1] -> [M, N] in x.dtype. This decomposition calls
    `quant_linear` per expert and reads the offsets on the host; a kernel must not.

    Invariants:
    - an expert's rows depend on no other expert's weight
    - an expert may own no row, or all of them
    """
    experts, n, _ = w.shape
    if x.is_meta:  # shapes only: one expert stands for all, with as few and as many rows as any can have
        ops.quant_linear(x=x[:1], w=expert_weight(w, 0))
        ops.quant_linear(x=x, w=expert_weight(w, 0))
        return x.new_empty(x.shape[0], n)
    y = x.new_zeros(x.shape[0], n)
    bounds = offsets.tolist()
    for e in range(experts):
        start, end = bounds[e], bounds[e + 1]
        if end > start:
            y[start:end] = ops.quant_linear(x=x[start:end], w=expert_weight(w, e))
    return y


@composite("x[T,H] weights[T,k]:f32 ids[T,k]:int w13{E,2*I,H} w2{E,H,I} M=T*k -> y[T,H]")
def fused_experts(ops: Any, x: Tensor, weights: Tensor, ids: Tensor, w13: Prepared, w2: Prepared) -> Tensor:
    """y[t] = sum over j of weights[t, j] * expert ids[t, j] of x[t], expert(x) = W2 (silu(W1 x) * (W3 x)).

    x [T, H], weights f32 [T, k], ids [T, k] local to this rank (-1: elsewhere, contributes nothing), w13 Prepared [E,
    2I, H] gate rows first, w2 Prepared [E, H, I] -> [T, H] in x.dtype.

    Invariants:
    - a token whose ids are all -1 gives 0
    - relabelling experts in ids and weights changes nothing
    - permuting tokens permutes y
    """
    perm, offsets = ops.moe_permute(ids=ids, n_experts=w13.shape[0])
    # perm // k as a table: torch's meta division would import its compiler, a second at start, where this is traced; so would
    # its meta arange.
    token = torch.empty(ids.shape[0], dtype=torch.int32, device=ids.device)
    token = (token if ids.is_meta else torch.arange(ids.shape[0], out=token))[:, None].expand(ids.shape).flatten()
    rows = x.index_select(0, token.index_select(0, perm.clone().relu_()))
    h = ops.grouped_linear(x=rows, w=w13, offsets=offsets)
    y = ops.grouped_linear(x=ops.silu_mul(x=h), w=w2, offsets=offsets)
    return ops.moe_combine(y=y, perm=perm, weights=weights)


@composite(
    "x[T,H] gate[Eg,H] bias[Eg]:f32? w13{E,2*I,H} w2{E,H,I} shared13{2*Is,H}? shared2{H,Is}? expert_map[Eg]:int?"
    " k=topk M=T*k -> y[T,H]"
)
def moe(
    ops: Any,
    x: Tensor,
    gate: Tensor,
    bias: Tensor | None,
    w13: Prepared,
    w2: Prepared,
    shared13: Prepared | None,
    shared2: Prepared | None,
    n_group: int,
    topk_group: int,
    topk: int,
    score: str,
    group_score: str,
    renormalize: bool,
    scale: float,
    expert_map: Tensor | None = None,
) -> Tensor:
    """A whole DeepSeekMoE layer: route, fused_experts, plus the shared experts, which are not scaled.

    x [T, H], gate [Eg, H] over all Eg experts, w13 / w2 Prepared over this rank's E, shared13 Prepared [2Is, H] and shared2
    Prepared [H, Is] or None -> [T, H], this rank's partial sum. expert_map i32 [Eg]: global id to local, -1 for an expert of
    another rank; None means that all are here. Source: DeepSeek-V3 technical report, equation 12.

    Invariants:
    - permuting tokens permutes y
    - partial sums over ranks with disjoint expert_map, shared experts on one of them, add up to the whole
    """
    weights, ids = ops.route(
        x=x,
        gate=gate,
        bias=bias,
        n_group=n_group,
        topk_group=topk_group,
        topk=topk,
        score=score,
        group_score=group_score,
        renormalize=renormalize,
        scale=scale,
    )
    if expert_map is not None:
        ids = expert_map.index_select(0, ids.reshape(-1).to(torch.int64)).view(ids.shape)
    y = ops.fused_experts(x=x, weights=weights, ids=ids, w13=w13, w2=w2)
    if shared13 is None or shared2 is None:
        return y
    shared = ops.quant_linear(x=ops.silu_mul(x=ops.quant_linear(x=x, w=shared13)), w=shared2)
    # On meta, where this is traced at every start, torch's addition would import its compiler.
    return y if y.is_meta else y.add_(shared)
