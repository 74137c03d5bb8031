"""Faults of attention and the cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dsv3 import ops
from dsv3.plugin import LatentCache
from tests.conformance.mutants import fault


@fault("mla_prefill", "causal mask aligned top left")
def _(**a: Any) -> tuple[Tensor, Tensor]:
    o, lse = ops.mla_prefill(**a)
    if a["causal"]:
        bq, bk = a["cu_q"].tolist(), a["cu_k"].tolist()
        for s in range(len(bq) - 1):
            n = min(bq[s + 1] - bq[s], bk[s + 1] - bk[s])
            if 0 < n < bk[s + 1] - bk[s]:
                rows = slice(bq[s], bq[s] + n)
                part = {**a, "q": a["q"][rows], "k": a["k"][bk[s] : bk[s] + n], "v": a["v"][bk[s] : bk[s] + n]}
                part |= {"cu_q": torch.tensor([0, n]), "cu_k": torch.tensor([0, n])}
                o[rows], lse[:, rows] = ops.mla_prefill(**part)
    return o, lse


@fault("mla_prefill", "causal ignored")
def _(**a: Any) -> tuple[Tensor, Tensor]:
    return ops.mla_prefill(**{**a, "causal": False})


@fault("mla_prefill", "always causal")
def _(**a: Any) -> tuple[Tensor, Tensor]:
    return ops.mla_prefill(**{**a, "causal": True})


@fault("mla_prefill", "lse in base 2")
def _(**a: Any) -> tuple[Tensor, Tensor]:
    o, lse = ops.mla_prefill(**a)
    return o, lse * 1.4426950408889634


@fault("mla_prefill", "lse [T, Nh]")
def _(**a: Any) -> tuple[Tensor, Tensor]:
    o, lse = ops.mla_prefill(**a)
    return o, lse.T.contiguous()


@fault("mla_prefill", "empty row is NaN")
def _(**a: Any) -> tuple[Tensor, Tensor]:
    o, lse = ops.mla_prefill(**a)
    last = int(a["cu_q"][-1])
    empty = torch.isinf(lse[0]) & (torch.arange(lse.shape[1]) < last)
    o[empty] = float("nan")
    return o, lse


@fault("mla_prefill", "scale from the value width")
def _(**a: Any) -> tuple[Tensor, Tensor]:
    return ops.mla_prefill(**{**a, "scale": a["v"].shape[2] ** -0.5})


@fault("mla_prefill", "probabilities in bf16, not declared")
def _(**a: Any) -> tuple[Tensor, Tensor]:
    return _prefill_p(torch.bfloat16, **a)


def _prefill_p(dtype: torch.dtype, **a: Any) -> tuple[Tensor, Tensor]:
    q, k, v = (a[n].float() for n in "qkv")
    o, lse = ops.mla_prefill(**a)
    bq, bk = a["cu_q"].tolist(), a["cu_k"].tolist()
    for s in range(len(bq) - 1):
        rows, keys = slice(bq[s], bq[s + 1]), slice(bk[s], bk[s + 1])
        n, m = rows.stop - rows.start, keys.stop - keys.start
        if n and m:
            scores = torch.einsum("qhd,khd->hqk", q[rows], k[keys]) * a["scale"]
            if a["causal"]:
                hidden = torch.arange(m)[None, :] > torch.arange(n)[:, None] + m - n
                scores = scores.masked_fill(hidden, float("-inf"))
            p = torch.softmax(scores, -1).nan_to_num(0).to(dtype).float()
            o[rows] = torch.einsum("hqk,khd->qhd", p, v[keys]).to(o.dtype)
    return o, lse


@fault("mla_prefill", "no maximum subtracted")
def _(**a: Any) -> tuple[Tensor, Tensor]:
    o, lse = ops.mla_prefill(**a)
    blown = (lse > 80).T
    o[blown] = float("nan")
    return o, torch.where(lse > 80, float("inf"), lse)


@fault("mla_prefill", "one sequence sees the next")
def _(**a: Any) -> tuple[Tensor, Tensor]:
    cu_k = a["cu_k"].clone()
    if len(cu_k) > 2 and not a["causal"]:
        cu_k[1] = min(int(cu_k[1]) + 1, int(cu_k[-1]))
    elif len(cu_k) > 2:
        o, lse = ops.mla_prefill(**a)
        first = int(a["cu_q"][1])
        if first and int(cu_k[-1]) > int(cu_k[1]):
            part = {**a, "q": a["q"][:first], "cu_q": a["cu_q"][:2], "cu_k": torch.tensor([0, int(cu_k[1]) + 1])}
            o[:first], lse[:, :first] = ops.mla_prefill(**part)
        return o, lse
    return ops.mla_prefill(**{**a, "cu_k": cu_k})


@fault("mla_prefill", "v assumed contiguous")
def _(**a: Any) -> tuple[Tensor, Tensor]:
    t, h, d = a["v"].shape
    return ops.mla_prefill(**{**a, "v": torch.as_strided(a["v"], (t, h, d), (h * d, d, 1), a["v"].storage_offset())})


def decode(**a: Any) -> tuple[Tensor, Tensor]:
    return ops.mla_decode(**a)


@fault("mla_decode", "all queries see the whole sequence")
def _(**a: Any) -> tuple[Tensor, Tensor]:
    o, lse = decode(**a)
    bounds = a["cu_q"].tolist()
    for s in range(len(bounds) - 1):
        for j in range(bounds[s], bounds[s + 1]):
            one = {**a, "q_c": a["q_c"][j : j + 1], "q_pe": a["q_pe"][j : j + 1], "cu_q": torch.tensor([0, 1])}
            one |= {"block_table": a["block_table"][s : s + 1], "seq_lens": a["seq_lens"][s : s + 1]}
            o[j : j + 1], lse[:, j : j + 1] = decode(**one)
    return o, lse


@fault("mla_decode", "causal mask one off with several queries")
def _(**a: Any) -> tuple[Tensor, Tensor]:
    o, lse = decode(**a)
    bounds = a["cu_q"].tolist()
    for s in range(len(bounds) - 1):
        n = bounds[s + 1] - bounds[s]
        for j in range(n - 1):
            length = int(a["seq_lens"][s]) - n + j + 2  # sees one too many
            i = bounds[s] + j
            one = {**a, "q_c": a["q_c"][i : i + 1], "q_pe": a["q_pe"][i : i + 1], "cu_q": torch.tensor([0, 1])}
            one |= {"block_table": a["block_table"][s : s + 1], "seq_lens": torch.tensor([length])}
            o[i : i + 1], lse[:, i : i + 1] = decode(**one)
    return o, lse


@fault("mla_decode", "pages assumed in order")
def _(**a: Any) -> tuple[Tensor, Tensor]:
    table = a["block_table"]
    ordered = table[:, :1] + torch.arange(table.shape[1])[None, :]
    return decode(**{**a, "block_table": ordered.clamp_max(a["cache"].ckv.shape[0] - 1)})


@fault("mla_decode", "start ignored")
def _(**a: Any) -> tuple[Tensor, Tensor]:
    return decode(**{**a, "start": 0})


@fault("mla_decode", "start shortens the sequence")
def _(**a: Any) -> tuple[Tensor, Tensor]:
    return decode(**{**a, "seq_lens": a["seq_lens"] - a["start"]})


@fault("mla_decode", "NaN of the page's tail leaks")
def _(**a: Any) -> tuple[Tensor, Tensor]:
    o, lse = decode(**a)
    page = a["cache"].ckv.shape[1]
    bounds = a["cu_q"].tolist()
    for s, n in enumerate(a["seq_lens"].tolist()):
        if n % page:
            o[bounds[s] : bounds[s + 1]] += (
                (0 * a["cache"].ckv[int(a["block_table"][s, n // page]), n % page].float()).sum().to(o.dtype)
            )
    return o, lse


@fault("mla_decode", "seq_len excludes this step")
def _(**a: Any) -> tuple[Tensor, Tensor]:
    return decode(**{**a, "seq_lens": (a["seq_lens"] - 1).clamp_min(0)})


@fault("mla_decode", "last slot of a full page lost")
def _(**a: Any) -> tuple[Tensor, Tensor]:
    page = a["cache"].ckv.shape[1]
    full = (a["seq_lens"] % page == 0) & (a["seq_lens"] > 0)
    return decode(**{**a, "seq_lens": torch.where(full, a["seq_lens"] - 1, a["seq_lens"])})


@fault("mla_decode", "scale for the latent part only")
def _(**a: Any) -> tuple[Tensor, Tensor]:
    return decode(**{**a, "q_pe": (a["q_pe"].float() / a["scale"]).to(a["q_pe"].dtype)})


@fault("mla_decode", "rope part forgotten")
def _(**a: Any) -> tuple[Tensor, Tensor]:
    return decode(**{**a, "q_pe": torch.zeros_like(a["q_pe"])})


@fault("mla_decode", "first scale of a row for all of its groups (FP8 cache)")
def _(**a: Any) -> tuple[Tensor, Tensor]:
    c = a["cache"]
    if c.scale is not None:
        a["cache"] = LatentCache(c.ckv, c.kpe, c.scale[..., :1].expand_as(c.scale).contiguous())
    return decode(**a)


@fault("mla_decode", "splits merged without their sums")
def _(**a: Any) -> tuple[Tensor, Tensor]:
    o, lse = decode(**a)
    if int(a["seq_lens"].max()) > 64 and a["start"] == 0 and a["max_q"] == 1:
        part = {**a, "seq_lens": torch.minimum(a["seq_lens"], torch.tensor(32))}
        half, _ = decode(**part)
        o = torch.where((a["seq_lens"] > 64).repeat_interleave(a["cu_q"].diff())[:, None, None], (o + half) / 2, o)
    return o, lse


@fault("merge_attn_states", "weights without subtracting the maximum")
def _(o1: Tensor, lse1: Tensor, o2: Tensor, lse2: Tensor) -> tuple[Tensor, Tensor]:
    a, b = torch.exp(lse1.float()).T[..., None], torch.exp(lse2.float()).T[..., None]
    y = (a * o1.float() + b * o2.float()) / (a + b)
    return y.to(o1.dtype), torch.logaddexp(lse1, lse2)


@fault("merge_attn_states", "NaN of an empty side leaks")
def _(o1: Tensor, lse1: Tensor, o2: Tensor, lse2: Tensor) -> tuple[Tensor, Tensor]:
    o, lse = ops.merge_attn_states(o1, lse1, o2, lse2)
    return o + 0 * o1, lse


@fault("merge_attn_states", "both empty gives NaN")
def _(o1: Tensor, lse1: Tensor, o2: Tensor, lse2: Tensor) -> tuple[Tensor, Tensor]:
    o, lse = ops.merge_attn_states(o1, lse1, o2, lse2)
    return o.masked_fill(torch.isinf(lse).T[..., None], float("nan")), lse


@fault("merge_attn_states", "lse is the larger")
def _(o1: Tensor, lse1: Tensor, o2: Tensor, lse2: Tensor) -> tuple[Tensor, Tensor]:
    o, _ = ops.merge_attn_states(o1, lse1, o2, lse2)
    return o, torch.maximum(lse1, lse2)


@fault("merge_attn_states", "mean")
def _(o1: Tensor, lse1: Tensor, o2: Tensor, lse2: Tensor) -> tuple[Tensor, Tensor]:
    return ops.merge_attn_states(o1, torch.maximum(lse1, lse2), o2, torch.maximum(lse1, lse2))


@fault("kv_cache_write", "slot -1 is written to slot 0")
def _(ckv: Tensor, kpe: Tensor, slots: Tensor, cache: LatentCache) -> None:
    page = cache.ckv.shape[1]
    ops.kv_cache_write(ckv, kpe, slots, cache)
    if bool((slots < 0).any()) and not bool((slots == 0).any()):
        row = int((slots < 0).int().argmax())
        cache.kpe[0, 0] = kpe[row].to(cache.kpe.dtype)
    assert page


@fault("kv_cache_write", "slot -1 wraps to the last")
def _(ckv: Tensor, kpe: Tensor, slots: Tensor, cache: LatentCache) -> None:
    last = cache.ckv.shape[0] * cache.ckv.shape[1] - 1
    keep = slots >= 0
    ops.kv_cache_write(ckv[keep], kpe[keep], slots[keep], cache)
    if not bool(keep.all()) and not bool((slots == last).any()):
        row = int((~keep).int().argmax())
        ops.kv_cache_write(ckv[row : row + 1], kpe[row : row + 1], torch.tensor([last]), cache)


@fault("kv_cache_write", "the key before the latent")
def _(ckv: Tensor, kpe: Tensor, slots: Tensor, cache: LatentCache) -> None:
    ops.kv_cache_write(ckv.flip(1), kpe, slots, cache)


@fault("kv_cache_write", "one scale per page (FP8 cache)")
def _(ckv: Tensor, kpe: Tensor, slots: Tensor, cache: LatentCache) -> None:
    ops.kv_cache_write(ckv, kpe, slots, cache)
    if cache.scale is not None and bool((slots >= 0).any()):
        page = cache.ckv.shape[1]
        for s in slots.tolist():
            if s >= 0:
                cache.scale[s // page] = cache.scale[s // page, s % page]


@fault("kv_cache_write", "the row after is cleared")
def _(ckv: Tensor, kpe: Tensor, slots: Tensor, cache: LatentCache) -> None:
    ops.kv_cache_write(ckv, kpe, slots, cache)
    page = cache.ckv.shape[1]
    named = set(slots.tolist())
    for s in slots.tolist():
        if s >= 0 and s + 1 not in named and (s + 1) % page:
            cache.kpe[s // page, s % page + 1] = 0


@fault("kv_cache_write", "rows assumed contiguous")
def _(ckv: Tensor, kpe: Tensor, slots: Tensor, cache: LatentCache) -> None:
    flat = torch.as_strided(ckv, ckv.shape, (ckv.shape[1], 1), ckv.storage_offset())
    ops.kv_cache_write(flat, kpe, slots, cache)


@fault("kv_cache_gather", "start ignored")
def _(**a: Any) -> tuple[Tensor, Tensor]:
    if a["start"] and a["total"]:
        n = int(a["seq_lens"].sum())
        ckv, kpe = ops.kv_cache_gather(**{**a, "start": 0, "total": n})
        return ckv[: a["total"]].clone(), kpe[: a["total"]].clone()
    return ops.kv_cache_gather(**a)


@fault("kv_cache_gather", "pages of the first sequence")
def _(**a: Any) -> tuple[Tensor, Tensor]:
    table = a["block_table"]
    return ops.kv_cache_gather(**{**a, "block_table": table[:1].expand_as(table).clamp_max(a["cache"].ckv.shape[0] - 1)})


@fault("kv_cache_gather", "FP8 codes without scales")
def _(**a: Any) -> tuple[Tensor, Tensor]:
    c = a["cache"]
    if c.scale is not None:
        a["cache"] = LatentCache(c.ckv, c.kpe, torch.ones_like(c.scale))
    return ops.kv_cache_gather(**a)


@fault("rope_cache_write", "key stored without rotation")
def _(**a: Any) -> Tensor:
    ops.kv_cache_write(a["ckv"], a["kpe"], a["slots"], a["cache"])
    return ops.apply_rope(a["q_pe"], a["positions"], a["cos_sin"], a["interleaved"])


@fault("rope_cache_write", "query not rotated")
def _(**a: Any) -> Tensor:
    ops.rope_cache_write(**a)
    return a["q_pe"].clone()


@fault("rope_cache_write", "slots taken for positions")
def _(**a: Any) -> Tensor:
    return ops.rope_cache_write(**{**a, "positions": a["slots"].clamp(0, a["cos_sin"].shape[0] - 1)})


@fault("mla_prolog", "latent stored before its norm")
def _(**a: Any) -> tuple[Tensor, Tensor]:
    w = a["weights"]
    out = ops.mla_prolog(**a)
    rank = w["w_uk"].shape[2]
    kv = ops.quant_linear(a["x"], w["kv_a"])
    key = ops.apply_rope(kv[:, None, rank:], a["positions"], a["cos_sin"])[:, 0]
    ops.kv_cache_write(kv[:, :rank], key, a["slots"], a["cache"])
    return out


@fault("mla_prolog", "query norm left out")
def _(**a: Any) -> tuple[Tensor, Tensor]:
    w = dict(a["weights"])
    if w.get("q_a") is not None:
        w["q_a_norm"] = torch.ones_like(w["q_a_norm"])
    return ops.mla_prolog(**{**a, "weights": w})


@fault("mla_prolog", "eps of the latent norms 1e-2")
def _(**a: Any) -> tuple[Tensor, Tensor]:
    return ops.mla_prolog(**{**a, "eps": 1e-2})


@fault("mla_prolog", "skipped tokens written to slot 0")
def _(**a: Any) -> tuple[Tensor, Tensor]:
    return ops.mla_prolog(**{**a, "slots": a["slots"].clamp_min(0)})
