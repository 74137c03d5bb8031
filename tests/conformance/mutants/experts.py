"""Faults of routing and experts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dsv3 import ops
from dsv3.ops.experts import expert_weight
from dsv3.plugin import Prepared
from tests.conformance.mutants import fault


def topk(logits: Tensor, bias: Tensor | None, masked: float = float("-inf"), **p: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(scores, biased and masked choice, ids) in float32."""
    t, e = logits.shape
    scores = torch.sigmoid(logits) if p["score"] == "sigmoid" else torch.softmax(logits, -1)
    choice = scores if bias is None else scores + bias
    if p["n_group"] > 1 and t:
        grouped = choice.view(t, p["n_group"], -1)
        best = grouped.amax(-1) if p["group_score"] == "max" else grouped.topk(2, -1).values.sum(-1)
        kept = best.topk(p["topk_group"], -1).indices
        mask = torch.ones_like(best, dtype=torch.bool).scatter_(1, kept, False)
        choice = grouped.masked_fill(mask[..., None], masked).view(t, e)
    return scores, choice, choice.topk(p["topk"], -1).indices


def finish(scores: Tensor, ids: Tensor, renormalize: bool, scale: float) -> tuple[Tensor, Tensor]:
    w = scores.gather(1, ids)
    return (w / (w.sum(-1, keepdim=True) + 1e-20) if renormalize else w) * scale, ids.to(torch.int32)


@fault("grouped_topk", "masked groups at 0.0")
def _(**a: Any) -> tuple[Tensor, Tensor]:
    scores, _, ids = topk(masked=0.0, **a)
    return finish(scores, ids, a["renormalize"], a["scale"])


@fault("grouped_topk", "bias in the weights")
def _(**a: Any) -> tuple[Tensor, Tensor]:
    scores, _, ids = topk(**a)
    return finish(scores if a["bias"] is None else scores + a["bias"], ids, a["renormalize"], a["scale"])


@fault("grouped_topk", "bias ignored")
def _(bias: Tensor | None, **a: Any) -> tuple[Tensor, Tensor]:
    return ops.grouped_topk(bias=None, **a)


@fault("grouped_topk", "group score is the best, always")
def _(group_score: str, **a: Any) -> tuple[Tensor, Tensor]:
    return ops.grouped_topk(group_score="max", **a)


@fault("grouped_topk", "groups scored without the bias")
def _(bias: Tensor | None, **a: Any) -> tuple[Tensor, Tensor]:
    if bias is None or a["n_group"] == 1:
        return ops.grouped_topk(bias=bias, **a)
    scores, masked, _ = topk(bias=None, **a)
    ids = torch.where(torch.isinf(masked), masked, scores + bias).topk(a["topk"], -1).indices
    return finish(scores, ids, a["renormalize"], a["scale"])


@fault("grouped_topk", "scale ignored without renormalisation")
def _(**a: Any) -> tuple[Tensor, Tensor]:
    w, ids = ops.grouped_topk(**a)
    return (w if a["renormalize"] else w / a["scale"]), ids


@fault("grouped_topk", "always renormalised")
def _(renormalize: bool, **a: Any) -> tuple[Tensor, Tensor]:
    return ops.grouped_topk(renormalize=True, **a)


@fault("grouped_topk", "softmax over the chosen only")
def _(**a: Any) -> tuple[Tensor, Tensor]:
    w, ids = ops.grouped_topk(**a)
    if a["score"] == "softmax":
        w = torch.softmax(a["logits"].gather(1, ids.long()), -1) * a["scale"]
    return w, ids


@fault("grouped_topk", "scores compared in bf16")
def _(**a: Any) -> tuple[Tensor, Tensor]:
    logits = a["logits"].bfloat16().float()
    _, ids = ops.grouped_topk(**{**a, "logits": logits})
    scores = torch.sigmoid(a["logits"]) if a["score"] == "sigmoid" else torch.softmax(a["logits"], -1)
    return finish(scores, ids.long(), a["renormalize"], a["scale"])


@fault("grouped_topk", "an id twice when k is the number of experts")
def _(**a: Any) -> tuple[Tensor, Tensor]:
    w, ids = ops.grouped_topk(**a)
    if ids.shape[1] == a["logits"].shape[1] and ids.numel():
        ids[:, -1] = ids[:, 0]
    return w, ids


@fault("grouped_topk", "weights not in the order of ids")
def _(**a: Any) -> tuple[Tensor, Tensor]:
    w, ids = ops.grouped_topk(**a)
    return w, ids.sort(-1).values


@fault("route", "logits in bf16")
def _(x: Tensor, gate: Tensor, **a: Any) -> tuple[Tensor, Tensor]:
    logits = ops.router_gemm(x, gate).bfloat16().float()
    return ops.grouped_topk(logits=logits, **a)


@fault("route", "one expert too few kept per group")
def _(**a: Any) -> tuple[Tensor, Tensor]:
    kept = max(a["topk_group"] - 1, 1)
    if a["topk"] > kept * (a["gate"].shape[0] // a["n_group"]):
        return ops.route(**a)
    return ops.route(**{**a, "topk_group": kept})


@fault("moe_permute", "not stable")
def _(ids: Tensor, n_experts: int) -> tuple[Tensor, Tensor]:
    perm, offsets = ops.moe_permute(ids, n_experts)
    for e in range(n_experts):
        perm[offsets[e] : offsets[e + 1]] = perm[offsets[e] : offsets[e + 1]].flip(0)
    return perm, offsets


@fault("moe_permute", "expert -1 counted as the last")
def _(ids: Tensor, n_experts: int) -> tuple[Tensor, Tensor]:
    return ops.moe_permute(torch.where(ids < 0, n_experts - 1, ids), n_experts)


@fault("moe_permute", "offsets are counts")
def _(ids: Tensor, n_experts: int) -> tuple[Tensor, Tensor]:
    perm, offsets = ops.moe_permute(ids, n_experts)
    return perm, torch.cat([offsets[:1], offsets.diff()]).to(torch.int32)


@fault("moe_permute", "token index instead of pair index")
def _(ids: Tensor, n_experts: int) -> tuple[Tensor, Tensor]:
    perm, offsets = ops.moe_permute(ids, n_experts)
    return torch.where(perm >= 0, perm // ids.shape[1], perm).to(torch.int32), offsets


@fault("moe_permute", "tail left at 0")
def _(ids: Tensor, n_experts: int) -> tuple[Tensor, Tensor]:
    perm, offsets = ops.moe_permute(ids, n_experts)
    return perm.clamp_min(0), offsets


@fault("moe_combine", "accumulates in the output's dtype")
def _(y: Tensor, perm: Tensor, weights: Tensor) -> Tensor:
    out = torch.zeros(weights.shape[0], y.shape[1], dtype=torch.bfloat16)
    k = weights.shape[1]
    for r, p in enumerate(perm.tolist()):
        if p >= 0:
            out[p // k] += (weights.flatten()[p] * y[r].float()).bfloat16()
    return out.to(y.dtype)


@fault("moe_combine", "NaN rows of missing experts leak")
def _(y: Tensor, perm: Tensor, weights: Tensor) -> Tensor:
    t, k = weights.shape
    rows = torch.zeros(t * k, y.shape[1], dtype=torch.float64)
    rows[perm.long().clamp_min(0)] = y.double()
    return (rows.view(t, k, y.shape[1]) * weights.double()[..., None]).sum(1).to(y.dtype)


@fault("moe_combine", "weights by sorted row")
def _(y: Tensor, perm: Tensor, weights: Tensor) -> Tensor:
    k = weights.shape[1]
    shuffled = weights.flatten().clone()
    valid = perm >= 0
    shuffled[perm[valid].long()] = weights.flatten()[torch.nonzero(valid)[:, 0]]
    return ops.moe_combine(y, perm, shuffled.view(-1, k))


@fault("grouped_linear", "empty expert shifts those after it")
def _(x: Tensor, w: Prepared, offsets: Tensor) -> Tensor:
    bounds = offsets.tolist()
    filled = [e for e in range(w.shape[0]) if bounds[e + 1] > bounds[e]]
    y = x.new_zeros(x.shape[0], w.shape[1])
    for i, e in enumerate(filled):
        part = expert_weight(w, i)
        y[bounds[e] : bounds[e + 1]] = ops.quant_linear(x[bounds[e] : bounds[e + 1]], part)
    return y


@fault("grouped_linear", "rows past the last expert not cleared")
def _(x: Tensor, w: Prepared, offsets: Tensor) -> Tensor:
    y = ops.grouped_linear(x, w, offsets)
    y[int(offsets[-1]) :] = 1e-3
    return y


@fault("grouped_linear", "first row of each expert from the expert before")
def _(x: Tensor, w: Prepared, offsets: Tensor) -> Tensor:
    shifted = offsets.clone()
    shifted[1:-1] = torch.minimum(shifted[1:-1] + 1, shifted[-1])
    return ops.grouped_linear(x, w, shifted)


@fault("grouped_linear", "scales of expert 0 for all")
def _(x: Tensor, w: Prepared, offsets: Tensor) -> Tensor:
    if "scale" not in w.tensors:
        return ops.grouped_linear(x, w, offsets)
    scale = w.tensors["scale"]
    tensors = {**w.tensors, "scale": scale[:1].expand_as(scale).contiguous()}
    return ops.grouped_linear(x, Prepared(w.layout, w.quant, w.shape, tensors, w.scale_fmt), offsets)


def chain(x: Tensor, weights: Tensor, ids: Tensor, w13: Prepared, w2: Prepared) -> Tensor:
    return ops.fused_experts(x, weights, ids, w13, w2)


@fault("fused_experts", "ids of -1 go to the last expert")
def _(ids: Tensor, weights: Tensor, w13: Prepared, **rest: Any) -> Tensor:
    wrapped = torch.where(ids < 0, w13.shape[0] - 1, ids)
    return chain(ids=wrapped, weights=weights.nan_to_num(0.5), w13=w13, **rest)


@fault("fused_experts", "weights applied before the activation")
def _(x: Tensor, weights: Tensor, ids: Tensor, w13: Prepared, w2: Prepared) -> Tensor:
    y = torch.zeros_like(x)
    for j in range(ids.shape[1]):
        scaled = torch.where(ids[:, j, None] >= 0, x * weights[:, j, None].nan_to_num(0).to(x.dtype), 0 * x)
        y += chain(scaled, torch.ones_like(weights[:, :1]), ids[:, j : j + 1], w13, w2)
    return y


@fault("fused_experts", "gate and up swapped")
def _(w13: Prepared, **rest: Any) -> Tensor:
    half = w13.shape[1] // 2
    tensors = {}
    for name, t in w13.tensors.items():
        n = t.shape[1] // 2
        tensors[name] = (
            torch.cat([t.view(torch.uint8)[:, n:], t.view(torch.uint8)[:, :n]], 1).view(t.dtype) if n * 2 == t.shape[1] else t
        )
    assert half
    return chain(w13=Prepared(w13.layout, w13.quant, w13.shape, tensors, w13.scale_fmt), **rest)


@fault("fused_experts", "the last choice of each token dropped")
def _(weights: Tensor, ids: Tensor, **rest: Any) -> Tensor:
    ids = ids.clone()
    if ids.shape[1] > 1:
        ids[:, -1] = -1
    return chain(weights=weights, ids=ids, **rest)


@fault("fused_experts", "a hot expert overflows its capacity")
def _(ids: Tensor, **rest: Any) -> Tensor:
    capacity, seen = 12, {}
    ids = ids.clone()
    for t in range(ids.shape[0]):
        for j in range(ids.shape[1]):
            e = int(ids[t, j])
            seen[e] = seen.get(e, 0) + 1
            if seen[e] > capacity:
                ids[t, j] = -1
    return chain(ids=ids, **rest)


@fault("fused_experts", "weights renormalised")
def _(weights: Tensor, **rest: Any) -> Tensor:
    w = weights / weights.nan_to_num(0).sum(-1, keepdim=True).clamp_min(1e-20)
    return chain(weights=w, **rest)


@fault("moe", "shared experts scaled too")
def _(**a: Any) -> Tensor:
    y = ops.moe(**a)
    if a["shared13"] is not None:
        s = ops.quant_linear(ops.silu_mul(ops.quant_linear(a["x"], a["shared13"])), a["shared2"])
        y = y + s * (a["scale"] - 1 if a["scale"] != 1 else 0.5)
    return y.to(a["x"].dtype)


@fault("moe", "expert_map ignored")
def _(**a: Any) -> Tensor:
    if a["expert_map"] is not None:
        local = a["w13"].shape[0]
        a["expert_map"] = (torch.arange(a["gate"].shape[0]) % local).to(torch.int32)
    return ops.moe(**a)


@fault("moe", "shared experts forgotten")
def _(**a: Any) -> Tensor:
    return ops.moe(**{**a, "shared13": None, "shared2": None})
