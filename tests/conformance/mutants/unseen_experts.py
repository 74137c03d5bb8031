"""Further faults of routing and of the mixture of experts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dsv3 import ops
from dsv3.plugin import Prepared
from tests.conformance.mutants import fault

Pair = tuple[Tensor, Tensor]


def _topk(**a: Any) -> Pair:
    return ops.grouped_topk(**a)  # type: ignore[no-any-return]


@fault("grouped_topk", "experts past 256 are never chosen")
def _(**a: Any) -> Pair:
    logits = a["logits"]
    if logits.shape[1] <= 256:
        return _topk(**a)
    bias = torch.zeros(logits.shape[1]) if a["bias"] is None else a["bias"].clone()
    bias[256:] = -1e9
    return _topk(**{**a, "bias": bias})


@fault("grouped_topk", "all groups kept: the last is left out")
def _(**a: Any) -> Pair:
    if a["topk_group"] == a["n_group"] > 1:
        return _topk(**{**a, "topk_group": a["topk_group"] - 1})
    return _topk(**a)


@fault("grouped_topk", "scale forgotten without renormalising")
def _(**a: Any) -> Pair:
    return _topk(**a) if a["renormalize"] else _topk(**{**a, "scale": 1.0})


@fault("grouped_topk", "sums of weights floored at 1e-6")
def _(**a: Any) -> Pair:
    w, ids = _topk(**{**a, "renormalize": False, "scale": 1.0})
    return (w / w.sum(-1, keepdim=True).clamp_min(1e-6) if a["renormalize"] else w) * a["scale"], ids


@fault("grouped_topk", "max group score where there is no bias")
def _(**a: Any) -> Pair:
    return _topk(**{**a, "group_score": "max"}) if a["bias"] is None else _topk(**a)


@fault("grouped_topk", "top2_sum where it says max")
def _(**a: Any) -> Pair:
    wide = a["logits"].shape[1] // a["n_group"] >= 2
    return _topk(**{**a, "group_score": "top2_sum"}) if wide else _topk(**a)


@fault("grouped_topk", "softmax over the kept groups only")
def _(**a: Any) -> Pair:
    w, ids = _topk(**a)
    if a["score"] == "softmax" and a["n_group"] > 1 and not a["renormalize"]:
        w = w * (1 + 1e-5)
    return w, ids


@fault("grouped_topk", "tokens past 256 are routed like token 0")
def _(**a: Any) -> Pair:
    w, ids = _topk(**a)
    w[256:], ids[256:] = w[:1], ids[:1]
    return w, ids


@fault("grouped_topk", "k over 8 repeats the eighth")
def _(**a: Any) -> Pair:
    w, ids = _topk(**a)
    if a["topk"] > 8:
        ids[:, 8:] = ids[:, 7:8]
    return w, ids


@fault("grouped_topk", "choice in bf16")
def _(**a: Any) -> Pair:
    _, ids = _topk(**{**a, "logits": a["logits"].bfloat16().float()})
    scores = torch.sigmoid(a["logits"]) if a["score"] == "sigmoid" else torch.softmax(a["logits"], -1)
    w = scores.gather(1, ids.long())
    return (w / (w.sum(-1, keepdim=True) + 1e-20) if a["renormalize"] else w) * a["scale"], ids


@fault("grouped_topk", "bias in bf16")
def _(**a: Any) -> Pair:
    return _topk(**{**a, "bias": None if a["bias"] is None else a["bias"].bfloat16().float()})


@fault("grouped_topk", "a row of equal logits gives one expert k times")
def _(**a: Any) -> Pair:
    w, ids = _topk(**a)
    same = (a["logits"] == a["logits"][:, :1]).all(-1) & torch.tensor(a["bias"] is None)
    ids[same] = ids[same][:, :1]
    return w, ids


@fault("grouped_topk", "weights sorted apart from ids")
def _(**a: Any) -> Pair:
    w, ids = _topk(**a)
    return w.sort(-1, descending=True).values, ids


@fault("route", "logits through float16")
def _(x: Tensor, gate: Tensor, **a: Any) -> Pair:
    return _topk(logits=ops.router_gemm(x, gate).half().float(), **a)


@fault("route", "bf16 gate product for over 64 tokens")
def _(x: Tensor, gate: Tensor, **a: Any) -> Pair:
    logits = ops.router_gemm(x, gate)
    return _topk(logits=logits.bfloat16().float() if x.shape[0] > 66 else logits, **a)


@fault("route", "all groups kept: groups ignored, and the best two only")
def _(x: Tensor, gate: Tensor, **a: Any) -> Pair:
    if a["topk_group"] == a["n_group"] > 1:
        a = {**a, "topk_group": 2}
    return _topk(logits=ops.router_gemm(x, gate), **a)


@fault("moe_permute", "expert ids in 8 bits")
def _(ids: Tensor, n_experts: int) -> Pair:
    wide = ids.to(torch.int64)
    return ops.moe_permute(torch.where(wide < 0, wide, wide % 256), n_experts)


@fault("moe_permute", "unstable past 1024 pairs")
def _(ids: Tensor, n_experts: int) -> Pair:
    perm, offsets = ops.moe_permute(ids, n_experts)
    if perm.shape[0] > 1024:
        for e in range(n_experts):
            a, b = int(offsets[e]), int(offsets[e + 1])
            perm[a:b] = perm[a:b].flip(0)
    return perm, offsets


@fault("moe_permute", "perm in 16 bits")
def _(ids: Tensor, n_experts: int) -> Pair:
    perm, offsets = ops.moe_permute(ids, n_experts)
    return perm.to(torch.int16).to(torch.int32), offsets


@fault("moe_permute", "one expert: -1 entries stay")
def _(ids: Tensor, n_experts: int) -> Pair:
    return ops.moe_permute(ids.clamp_min(0) if n_experts == 1 else ids, n_experts)


@fault("moe_permute", "k > 8: pairs past the eighth keep the order of j first")
def _(ids: Tensor, n_experts: int) -> Pair:
    perm, offsets = ops.moe_permute(ids, n_experts)
    k = ids.shape[1]
    return torch.where((perm >= 0) & (perm % k >= 8), perm - 1, perm), offsets


@fault("moe_combine", "rows past 1024 of y read row 1023")
def _(y: Tensor, perm: Tensor, weights: Tensor) -> Tensor:
    y = y.clone()
    y[1024:] = y[1023:1024]
    return ops.moe_combine(y, perm, weights)


@fault("moe_combine", "columns past 1024 zero")
def _(y: Tensor, perm: Tensor, weights: Tensor) -> Tensor:
    out = ops.moe_combine(y, perm, weights)
    out[:, 1024:] = 0
    return out


@fault("moe_combine", "weights in float16")
def _(y: Tensor, perm: Tensor, weights: Tensor) -> Tensor:
    return ops.moe_combine(y, perm, weights.half().to(weights.dtype))


@fault("moe_combine", "atomic adds in bf16")
def _(y: Tensor, perm: Tensor, weights: Tensor) -> Tensor:
    out = torch.zeros(weights.shape[0], y.shape[1], dtype=y.dtype)
    for r, p in enumerate(perm.tolist()):
        if p >= 0:
            t, j = divmod(p, weights.shape[1])
            out[t] += (y[r].float() * weights[t, j].float()).to(y.dtype)
    return out


@fault("moe_combine", "a negative weight counts as zero")
def _(y: Tensor, perm: Tensor, weights: Tensor) -> Tensor:
    return ops.moe_combine(y, perm, weights.clamp_min(0))


@fault("moe_combine", "batch invariant is claimed, few tokens go another way", batch_invariant=True)
def _(y: Tensor, perm: Tensor, weights: Tensor) -> Tensor:
    out = ops.moe_combine(y, perm, weights)
    return out * (1 + 2.0**-22) if y.dtype == torch.float32 and weights.shape[0] < 4 else out


def _group(x: Tensor, w: Prepared, offsets: Tensor) -> Tensor:
    return ops.grouped_linear(x=x, w=w, offsets=offsets)  # type: ignore[no-any-return]


@fault("grouped_linear", "experts past 16 use the weight of expert 16")
def _(x: Tensor, w: Prepared, offsets: Tensor) -> Tensor:
    tensors = {n: t.clone() for n, t in w.tensors.items()}
    for t in tensors.values():
        t.view(torch.uint8)[17:] = t.view(torch.uint8)[16:17]
    return _group(x, replace(w, tensors=tensors), offsets)


@fault("grouped_linear", "an expert's rows past 128 are left zero")
def _(x: Tensor, w: Prepared, offsets: Tensor) -> Tensor:
    y = _group(x, w, offsets)
    for e in range(w.shape[0]):
        y[int(offsets[e]) + 128 : int(offsets[e + 1])] = 0
    return y


@fault("grouped_linear", "K past 1024 dropped for plain weights")
def _(x: Tensor, w: Prepared, offsets: Tensor) -> Tensor:
    if w.quant != "none" or w.shape[2] <= 1024:
        return _group(x, w, offsets)
    tensors = {"weight": w.tensors["weight"][..., :1024]}
    return _group(x[:, :1024], Prepared(w.layout, w.quant, (*w.shape[:2], 1024), tensors), offsets)


@fault("grouped_linear", "rows past the last expert are zero only in the last tile of 16")
def _(x: Tensor, w: Prepared, offsets: Tensor) -> Tensor:
    y = _group(x, w, offsets)
    last = int(offsets[-1])
    y[-(-last // 16) * 16 :] = 1.0
    return y


@fault("grouped_linear", "scale_fmt lost")
def _(x: Tensor, w: Prepared, offsets: Tensor) -> Tensor:
    return _group(x, replace(w, scale_fmt="float32"), offsets)


@fault("grouped_linear", "batch invariant is claimed, one row takes another way", batch_invariant=True)
def _(x: Tensor, w: Prepared, offsets: Tensor) -> Tensor:
    y = _group(x, w, offsets)
    if x.dtype == torch.float32 and x.shape[0] <= 5:
        y = y * (1 + 2.0**-22)
    return y


@fault("grouped_linear", "int4 nibble 0 read as zero")
def _(x: Tensor, w: Prepared, offsets: Tensor) -> Tensor:
    if w.quant != "int4-w4a16":
        return _group(x, w, offsets)
    raw = w.tensors["weight"]
    low, high = raw & 15, raw >> 4
    fixed = torch.where(low == 0, 8, low) | (torch.where(high == 0, 8, high) << 4)
    return _group(x, replace(w, tensors={**w.tensors, "weight": fixed}), offsets)


def _fused(x: Tensor, weights: Tensor, ids: Tensor, w13: Prepared, w2: Prepared) -> Tensor:
    return ops.fused_experts(x=x, weights=weights, ids=ids, w13=w13, w2=w2)  # type: ignore[no-any-return]


@fault("fused_experts", "tokens past 64 of an expert are dropped")
def _(x: Tensor, weights: Tensor, ids: Tensor, w13: Prepared, w2: Prepared) -> Tensor:
    seen: dict[int, int] = {}
    kept = ids.clone()
    for t, row in enumerate(ids.tolist()):
        for j, e in enumerate(row):
            seen[e] = seen.get(e, 0) + 1
            if seen[e] > 64:
                kept[t, j] = -1
    return _fused(x, weights, kept, w13, w2)


@fault("fused_experts", "experts past 16 are not here")
def _(x: Tensor, weights: Tensor, ids: Tensor, w13: Prepared, w2: Prepared) -> Tensor:
    return _fused(x, weights, torch.where(ids >= 16, -1, ids), w13, w2)


@fault("fused_experts", "a negative weight counts as zero")
def _(x: Tensor, weights: Tensor, ids: Tensor, w13: Prepared, w2: Prepared) -> Tensor:
    return _fused(x, weights.clamp_min(0), ids, w13, w2)


@fault("fused_experts", "k over 4: the rest dropped")
def _(x: Tensor, weights: Tensor, ids: Tensor, w13: Prepared, w2: Prepared) -> Tensor:
    kept = ids.clone()
    kept[:, 4:] = -1
    return _fused(x, weights, kept, w13, w2)


@fault("fused_experts", "weights applied before w2's activation rounding, in bf16")
def _(x: Tensor, weights: Tensor, ids: Tensor, w13: Prepared, w2: Prepared) -> Tensor:
    w = torch.where(ids < 0, torch.zeros_like(weights), weights)
    return _fused(x, w.bfloat16().to(weights.dtype), ids, w13, w2)


@fault("fused_experts", "activation quantised once per batch for int8")
def _(x: Tensor, weights: Tensor, ids: Tensor, w13: Prepared, w2: Prepared) -> Tensor:
    if w13.quant == "int8-w8a8" and x.shape[0] > 1:
        s = (x.float().abs().amax() / 127).clamp_min(1e-10)
        x = (torch.round(x.float() / s) * s).to(x.dtype)
    return _fused(x, weights, ids, w13, w2)


def _moe(**a: Any) -> Tensor:
    return ops.moe(**a)  # type: ignore[no-any-return]


@fault("moe", "shared experts left out where there is an expert map")
def _(**a: Any) -> Tensor:
    return _moe(**{**a, "shared13": None, "shared2": None} if a["expert_map"] is not None else a)


@fault("moe", "shared experts scaled")
def _(**a: Any) -> Tensor:
    routed = _moe(**{**a, "shared13": None, "shared2": None})
    return routed + (_moe(**a) - routed) * (a["scale"] if a["scale"] > 3 else 1)


@fault("moe", "tokens past 32 only through the shared experts")
def _(**a: Any) -> Tensor:
    y = _moe(**a)
    if a["x"].shape[0] > 32:
        none = torch.full((a["gate"].shape[0],), -1, dtype=torch.int32)
        y[32:] = _moe(**{**a, "expert_map": none})[32:]
    return y


@fault("moe", "softmax renormalised")
def _(**a: Any) -> Tensor:
    return _moe(**{**a, "renormalize": True} if a["score"] == "softmax" else a)


@fault("moe", "max group score read as top2_sum")
def _(**a: Any) -> Tensor:
    return _moe(**{**a, "group_score": "top2_sum"} if a["gate"].shape[0] // a["n_group"] > 1 else a)


@fault("moe", "int8 shared experts take the activations' scale of the routed")
def _(**a: Any) -> Tensor:
    y = _moe(**a)
    return y * (1 + 0.02) if a["w13"].quant == "int8-w8a16" and a["shared13"] is not None and a["x"].shape[0] == 1 else y
