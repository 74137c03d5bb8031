"""Further faults of what writes and reads the latent cache, and of what comes before attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dsv3 import ops
from dsv3.plugin import LatentCache
from tests.conformance.mutants import fault

Pair = tuple[Tensor, Tensor]


@fault("kv_cache_write", "slots in 16 bits")
def _(ckv: Tensor, kpe: Tensor, slots: Tensor, cache: LatentCache) -> None:
    ops.kv_cache_write(ckv, kpe, slots.to(torch.int16).to(torch.int32), cache)


@fault("kv_cache_write", "tokens past 256 are not written")
def _(ckv: Tensor, kpe: Tensor, slots: Tensor, cache: LatentCache) -> None:
    ops.kv_cache_write(ckv[:256], kpe[:256], slots[:256], cache)


@fault("kv_cache_write", "an FP8 scale of NaN latents is not written")
def _(ckv: Tensor, kpe: Tensor, slots: Tensor, cache: LatentCache) -> None:
    bad = torch.isnan(ckv).any(-1) & torch.tensor(cache.scale is not None)
    ops.kv_cache_write(ckv, kpe, torch.where(bad, -1, slots), cache)


@fault("kv_cache_write", "FP8 floor of 1e-10")
def _(ckv: Tensor, kpe: Tensor, slots: Tensor, cache: LatentCache) -> None:
    ops.kv_cache_write(ckv, kpe, slots, cache)
    if cache.scale is not None and ckv.shape[0]:
        q, s = ops.act_quant(ckv, amax_floor=1e-10)
        page = cache.ckv.shape[1]
        for t, slot in enumerate(slots.tolist()):
            if slot >= 0:
                cache.ckv.view(torch.uint8)[slot // page, slot % page] = q.view(torch.uint8)[t]
                cache.scale[slot // page, slot % page] = s[t]


@fault("kv_cache_write", "rounds through bf16 into a float32 cache")
def _(ckv: Tensor, kpe: Tensor, slots: Tensor, cache: LatentCache) -> None:
    ops.kv_cache_write(ckv, kpe.bfloat16().to(kpe.dtype) if kpe.dtype == torch.float32 else kpe, slots, cache)


@fault("kv_cache_write", "truncates float32 into a bf16 cache")
def _(ckv: Tensor, kpe: Tensor, slots: Tensor, cache: LatentCache) -> None:
    if ckv.dtype == torch.float32 and cache.ckv.dtype == torch.bfloat16:
        ckv, kpe = ((t.contiguous().view(torch.int32) & -65536).view(torch.float32) for t in (ckv, kpe))
    ops.kv_cache_write(ckv, kpe, slots, cache)


@fault("kv_cache_write", "all scales of a row where R is 512 are the first")
def _(ckv: Tensor, kpe: Tensor, slots: Tensor, cache: LatentCache) -> None:
    ops.kv_cache_write(ckv, kpe, slots, cache)
    if cache.scale is not None and cache.scale.shape[-1] == 4:
        page = cache.ckv.shape[1]
        for slot in slots.tolist():
            if slot >= 0:
                cache.scale[slot // page, slot % page] = cache.scale[slot // page, slot % page, :1].clone()


@fault("kv_cache_gather", "rows past 512 repeat")
def _(**a: Any) -> Pair:
    ckv, kpe = ops.kv_cache_gather(**a)
    ckv[512:] = ckv[511:512]
    return ckv, kpe


@fault("kv_cache_gather", "start past 1 ignored")
def _(cache: LatentCache, block_table: Tensor, seq_lens: Tensor, total: int, start: int = 0) -> Pair:
    if start <= 1:
        return ops.kv_cache_gather(cache, block_table, seq_lens, total, start)  # type: ignore[no-any-return]
    return ops.kv_cache_gather(cache, block_table, (seq_lens - (start - 1)).clamp_min(0), total, 1)  # type: ignore[no-any-return]


@fault("kv_cache_gather", "sequences past 16 share a table")
def _(cache: LatentCache, block_table: Tensor, seq_lens: Tensor, total: int, start: int = 0) -> Pair:
    ckv, kpe = ops.kv_cache_gather(cache, block_table, seq_lens, total, start)
    if seq_lens.shape[0] > 16:
        ckv[int((seq_lens[:16] - start).clamp_min(0).sum()) :] = 0
    return ckv, kpe


@fault("kv_cache_gather", "an FP8 latent through bf16 into float32")
def _(**a: Any) -> Pair:
    ckv, kpe = ops.kv_cache_gather(**a)
    return (ckv.bfloat16().to(ckv.dtype), kpe) if a["cache"].scale is not None else (ckv, kpe)


@fault("rope_cache_write", "the key is rotated in bf16 table")
def _(**a: Any) -> Tensor:
    return ops.rope_cache_write(**{**a, "cos_sin": a["cos_sin"].bfloat16().to(a["cos_sin"].dtype)})  # type: ignore[no-any-return]


@fault("rope_cache_write", "tokens past 64 write the unrotated key")
def _(**a: Any) -> Tensor:
    y = ops.rope_cache_write(**a)
    ops.kv_cache_write(a["ckv"][64:], a["kpe"][64:], a["slots"][64:], a["cache"])
    return y  # type: ignore[no-any-return]


@fault("rope_cache_write", "a skipped token's query is not rotated")
def _(**a: Any) -> Tensor:
    y = ops.rope_cache_write(**a)
    return torch.where((a["slots"] < 0)[:, None, None], a["q_pe"], y)


@fault("rope_cache_write", "positions in 16 bits")
def _(**a: Any) -> Tensor:
    rows = a["cos_sin"].shape[0]
    return ops.rope_cache_write(**{**a, "positions": a["positions"].to(torch.int16).to(torch.int64) % rows})  # type: ignore[no-any-return]


@fault("rope_cache_write", "interleaved for the key whatever is asked")
def _(**a: Any) -> Tensor:
    y = ops.rope_cache_write(**a)
    key = ops.apply_rope(a["kpe"][:, None], a["positions"], a["cos_sin"], True)[:, 0]
    ops.kv_cache_write(a["ckv"], key, a["slots"], a["cache"])
    return y  # type: ignore[no-any-return]


@fault("mla_prolog", "latent norm with eps 1e-5")
def _(**a: Any) -> Pair:
    return ops.mla_prolog(**{**a, "eps": 1e-5})  # type: ignore[no-any-return]


@fault("mla_prolog", "query norm left out without q_a's weight being 1")
def _(**a: Any) -> Pair:
    w = dict(a["weights"])
    if "q_a_norm" in w:
        w["q_a_norm"] = torch.ones_like(w["q_a_norm"])
    return ops.mla_prolog(**{**a, "weights": w})  # type: ignore[no-any-return]


@fault("mla_prolog", "tokens past 64: absorbed with the head before")
def _(**a: Any) -> Pair:
    q, p = ops.mla_prolog(**a)
    q[64:] = q[64:].roll(1, 1)
    return q, p


@fault("mla_prolog", "heads past 8 zero")
def _(**a: Any) -> Pair:
    q, p = ops.mla_prolog(**a)
    q[:, 8:] = 0
    return q, p


@fault("mla_prolog", "batch invariant is claimed, small batches in float64", batch_invariant=True)
def _(**a: Any) -> Pair:
    q, p = ops.mla_prolog(**a)
    return (q * (1 + 2.0**-22), p) if a["x"].dtype == torch.float32 and a["x"].shape[0] < 4 else (q, p)
