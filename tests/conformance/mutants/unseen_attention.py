"""Further faults of attention and of the latent cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dsv3 import ops
from dsv3.plugin import LatentCache
from tests.conformance.mutants import fault

Pair = tuple[Tensor, Tensor]
Given = dict[str, Any]


def _pre(**a: Any) -> Pair:
    return ops.mla_prefill(**a)  # type: ignore[no-any-return]


def _dec(**a: Any) -> Pair:
    return ops.mla_decode(**a)  # type: ignore[no-any-return]


@fault("mla_prefill", "heads past 16 use the values of head 16")
def _(**a: Any) -> Pair:
    v = a["v"].clone()
    v[:, 17:] = v[:, 16:17]
    return _pre(**{**a, "v": v})


@fault("mla_prefill", "keys past 512 of a sequence are not seen")
def _(**a: Any) -> Pair:
    o, lse = _pre(**a)
    for s in range(a["cu_k"].shape[0] - 1):
        (q0, q1), (k0, k1) = a["cu_q"][s : s + 2].tolist(), a["cu_k"][s : s + 2].tolist()
        if k1 - k0 > 512 and q1 > q0:
            cut = {**a, "q": a["q"][q0:q1], "k": a["k"][k0 : k0 + 512], "v": a["v"][k0 : k0 + 512], "causal": False}
            cut |= {"cu_q": torch.tensor([0, q1 - q0]), "cu_k": torch.tensor([0, 512])}
            o[q0:q1], lse[:, q0:q1] = _pre(**cut)
    return o, lse


@fault("mla_prefill", "sequences past 8 are left zero")
def _(**a: Any) -> Pair:
    o, lse = _pre(**a)
    if a["cu_q"].shape[0] > 9:
        o[int(a["cu_q"][8]) :] = 0
    return o, lse


@fault("mla_prefill", "max_k is taken for the length of a single sequence")
def _(**a: Any) -> Pair:
    if a["cu_k"].shape[0] == 2 and a["max_k"] > 0:
        n = int(a["cu_k"][1])
        grown = max(a["max_k"] - n, 0)
        k, v = (torch.cat([t[:n], t.new_zeros(grown, *t.shape[1:])]) for t in (a["k"], a["v"]))
        return _pre(**{**a, "k": k, "v": v, "cu_k": torch.tensor([0, n + grown])})
    return _pre(**a)


@fault("mla_prefill", "bottom-right taken from max_q and max_k")
def _(**a: Any) -> Pair:
    if not a["causal"]:
        return _pre(**a)
    o, lse = _pre(**a)
    for s in range(a["cu_k"].shape[0] - 1):
        (q0, q1), (k0, k1) = a["cu_q"][s : s + 2].tolist(), a["cu_k"][s : s + 2].tolist()
        shift = (a["max_k"] - a["max_q"]) - ((k1 - k0) - (q1 - q0))
        if a["cu_k"].shape[0] == 2 and shift and q1 > q0:
            o[q0:q1] = o[q0:q1].roll(1, 0)
    return o, lse


@fault("mla_prefill", "exp2 with log2(e) of 16 bits")
def _(**a: Any) -> Pair:
    return _pre(**{**a, "scale": a["scale"] * (1 + 2.0**-17)})


@fault("mla_prefill", "lse in log2 where not causal")
def _(**a: Any) -> Pair:
    o, lse = _pre(**a)
    return o, lse if a["causal"] else lse * 1.4426950408889634


@fault("mla_prefill", "row sum of bf16 probabilities", numerics="bf16-p")
def _(**a: Any) -> Pair:
    o, lse = _pre(**a)
    return o, lse.bfloat16().to(lse.dtype)


@fault("mla_prefill", "probabilities in fp8, and says bf16-p", numerics="bf16-p")
def _(**a: Any) -> Pair:
    o, lse = _pre(**a)
    for s in range(a["cu_k"].shape[0] - 1):
        (q0, q1), (k0, k1) = a["cu_q"][s : s + 2].tolist(), a["cu_k"][s : s + 2].tolist()
        if q1 > q0 and k1 > k0:
            q, k, v = (t.float().transpose(0, 1) for t in (a["q"][q0:q1], a["k"][k0:k1], a["v"][k0:k1]))
            scores = q @ k.transpose(1, 2) * a["scale"]
            if a["causal"]:
                hidden = torch.arange(k1 - k0)[None] > torch.arange(q1 - q0)[:, None] + (k1 - k0 - q1 + q0)
                scores = scores.masked_fill(hidden, float("-inf"))
            p = torch.exp(scores - scores.amax(-1, keepdim=True).nan_to_num(0, 0, 0))
            o[q0:q1] = (
                ((p.to(torch.float8_e4m3fn).float() @ v) / p.sum(-1, keepdim=True).clamp_min(1e-30)).transpose(0, 1).to(o.dtype)
            )
    return o, lse


@fault("mla_prefill", "batch invariant is claimed, several sequences go another way", batch_invariant=True)
def _(**a: Any) -> Pair:
    if a["cu_q"].shape[0] > 2 and a["q"].dtype == torch.float32:
        wide = {**a, **{n: a[n].double() for n in ("q", "k", "v")}}
        o, lse = _pre(**wide)
        return o.float(), lse.float()
    return _pre(**a)


@fault("mla_prefill", "a query length over 64 forgets the first key")
def _(**a: Any) -> Pair:
    if a["max_q"] > 130 and a["causal"]:
        k = a["k"].clone()
        k[0] = 0
        return _pre(**{**a, "k": k})
    return _pre(**a)


@fault("mla_decode", "keys past 1024 are not seen")
def _(**a: Any) -> Pair:
    if int(a["seq_lens"].max() if a["seq_lens"].numel() else 0) <= 1024:
        return _dec(**a)
    return _dec(**{**a, "seq_lens": a["seq_lens"].clamp_max(1024)})


@fault("mla_decode", "heads past 32 are a copy")
def _(**a: Any) -> Pair:
    o, lse = _dec(**a)
    o[:, 33:] = o[:, 32:33]
    return o, lse


@fault("mla_decode", "sequences past 16 share the last table")
def _(**a: Any) -> Pair:
    table = a["block_table"].clone()
    table[17:] = table[16:17]
    lens = a["seq_lens"].clone()
    if lens.shape[0] > 17:
        lens[17:] = torch.minimum(lens[17:], lens[16:17])
    return _dec(**{**a, "block_table": table, "seq_lens": lens})


@fault("mla_decode", "max_k is taken for the length of the longest")
def _(**a: Any) -> Pair:
    lens = a["seq_lens"].clone()
    page = a["cache"].ckv.shape[1]
    room = a["block_table"].shape[1] * page
    if lens.numel() and a["max_k"] + a["start"] > int(lens.max()) and int(lens.max()) > 0:
        lens[lens.argmax()] = min(a["max_k"] + a["start"], -(-int(lens.max()) // page) * page, room)
    return _dec(**{**a, "seq_lens": lens})


@fault("mla_decode", "the causal limit from max_q instead of the sequence's own count")
def _(**a: Any) -> Pair:
    counts = a["cu_q"].diff()
    if counts.numel() == 1 and a["max_q"] > int(counts[0]) > 0:
        short = a["seq_lens"] - (a["max_q"] - counts.to(a["seq_lens"].dtype))
        return _dec(**{**a, "seq_lens": short.clamp_min(1)})
    return _dec(**a)


@fault("mla_decode", "a query that sees nothing beside one that does is NaN")
def _(**a: Any) -> Pair:
    o, lse = _dec(**a)
    bounds = a["cu_q"].tolist()
    for s, n in enumerate(a["seq_lens"].tolist()):
        for j in range(bounds[s], bounds[s + 1]):
            if n > a["start"] and n - (bounds[s + 1] - j) + 1 <= a["start"]:
                o[j], lse[:, j] = float("nan"), float("nan")
    return o, lse


@fault("mla_decode", "a start over 1 is read as 1")
def _(**a: Any) -> Pair:
    return _dec(**{**a, "start": min(a["start"], 1)})


@fault("mla_decode", "FP8 latent rounded to bf16 for bf16 queries, says f32")
def _(**a: Any) -> Pair:
    cache = a["cache"]
    if cache.scale is None or a["q_c"].dtype != torch.bfloat16:
        return _dec(**a)
    s = cache.scale.repeat_interleave(128, -1)[..., : cache.ckv.shape[-1]]
    return _dec(**{**a, "cache": LatentCache((cache.ckv.float() * s).bfloat16(), cache.kpe)})


@fault("mla_decode", "cache read in the dtype of the queries")
def _(**a: Any) -> Pair:
    cache, kind = a["cache"], a["q_c"].dtype
    if cache.scale is None and cache.ckv.dtype != kind:
        planes = [p.contiguous().view(torch.uint8).view(kind) if p.element_size() >= kind.itemsize else p.to(kind)
                  for p in (cache.ckv, cache.kpe)]  # fmt: skip
        cut = [p[..., : o.shape[-1]].contiguous() for p, o in zip(planes, (cache.ckv, cache.kpe), strict=True)]
        return _dec(**{**a, "cache": LatentCache(cut[0], cut[1])})
    return _dec(**a)


@fault("mla_decode", "latent rank past 512 is dropped from the scores")
def _(**a: Any) -> Pair:
    o, lse = _dec(**a)
    return (o, lse + 0.001) if a["q_c"].shape[-1] > 512 else (o, lse)


@fault("mla_decode", "five queries or more: the last is computed for the first keys only")
def _(**a: Any) -> Pair:
    o, lse = _dec(**a)
    counts = a["cu_q"].diff()
    if counts.numel() and int(counts.max()) >= 9:
        o[int(a["cu_q"][-1]) - 1] = 0
    return o, lse


@fault("mla_decode", "rows past 64 tokens in a launch are left out")
def _(**a: Any) -> Pair:
    o, lse = _dec(**a)
    o[64:] = 0
    return o, lse


@fault("merge_attn_states", "tokens past 128 come from the first side")
def _(o1: Tensor, lse1: Tensor, o2: Tensor, lse2: Tensor) -> Pair:
    o, lse = ops.merge_attn_states(o1, lse1, o2, lse2)
    o[128:] = o1[128:]
    return o, lse


@fault("merge_attn_states", "width past 128 from the first side")
def _(o1: Tensor, lse1: Tensor, o2: Tensor, lse2: Tensor) -> Pair:
    o, lse = ops.merge_attn_states(o1, lse1, o2, lse2)
    o[..., 128:] = o1[..., 128:]
    return o, lse


@fault("merge_attn_states", "-inf as -1e30, so that two empty sides give a number")
def _(o1: Tensor, lse1: Tensor, o2: Tensor, lse2: Tensor) -> Pair:
    o, lse = ops.merge_attn_states(o1, lse1, o2, lse2)
    return o, torch.where(torch.isneginf(lse), torch.full_like(lse, -1e30), lse)


@fault("merge_attn_states", "weights in bf16")
def _(o1: Tensor, lse1: Tensor, o2: Tensor, lse2: Tensor) -> Pair:
    _, lse = ops.merge_attn_states(o1, lse1, o2, lse2)
    shift = torch.where(torch.isneginf(lse), torch.zeros_like(lse), lse)
    total = torch.zeros_like(o1, dtype=lse.dtype)
    for o, side in ((o1, lse1), (o2, lse2)):
        w = torch.exp(side - shift).bfloat16().to(lse.dtype).T[..., None]
        total = total + torch.where(w == 0, torch.zeros_like(total), w * o.to(lse.dtype))
    return total.to(o1.dtype), lse


@fault("merge_attn_states", "a difference of lse over 20 ignores the smaller side")
def _(o1: Tensor, lse1: Tensor, o2: Tensor, lse2: Tensor) -> Pair:
    gone = lse2.masked_fill(lse1 - lse2 > 12, float("-inf"))
    return ops.merge_attn_states(o1, lse1.masked_fill(lse2 - lse1 > 12, float("-inf")), o2, gone)
