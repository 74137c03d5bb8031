"""Cases of the latent cache, and of what writes to it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from dsv3.conformance.case import Case, Make, Setting, each, empty_cache, index, strided, weight
from dsv3.conformance.cases.pointwise import norm_weight, table
from dsv3.conformance.cases.products import SCHEMES
from dsv3.conformance.data import Data
from dsv3.conformance.result import Size
from dsv3.ops import kv_cache_write
from dsv3.plugin import KvDType, LatentCache, Quant

KV = ("act", "fp8")
# Caches that are neither FP8 nor in the dtype of the activations: (dtype, tag of the activations, what the backend must offer).
MIXED: tuple[tuple[str, str, KvDType], ...] = (("bf16", "f32", "bfloat16"), ("f32", "bf16", "float32"))


def cases() -> Iterator[Case]:
    yield from _write()
    yield from _gather()
    yield from _rope_write()
    yield from _prolog()


def slots_of(d: Data, kind: str, t: int, capacity: int) -> Tensor:
    """Distinct slots int64 [t] in a cache of this capacity: "ordered", "shuffled", "skip" (some -1, the first among them), or
    "none" (all -1)."""
    if kind == "ordered":
        return torch.arange(t) + 3
    order = d.permutation("slots", capacity)[:t]
    if kind == "skip":
        order = torch.where(d.uniform("skip", t) < 0.4, -1, order)
        order[:1] = -1
    if kind == "none":
        order = torch.full_like(order, -1)
    return order


def _rows(d: Data, t: int, rank: int, rope: int, dtype: torch.dtype, kind: str) -> tuple[Tensor, Tensor]:
    """ckv and kpe: "views" are slices of one projection's output, as the graph has them."""
    both = d.real("kv", kind if kind in ("outliers", "nanone", "faint") else "normal", t, rank + rope).to(dtype)
    if kind == "views":
        wide = strided(both, 4)
        return wide[:, :rank], wide[:, rank:]
    return both[:, :rank].contiguous(), both[:, rank:].contiguous()


def _write() -> Iterator[Case]:
    def make(t: int, rank: int, rope: int, kv: str, slots: str, kind: str = "views", wide: bool = False, far: int = 0) -> Make:
        def arguments(d: Data, dtype: torch.dtype, s: Setting) -> dict[str, Any]:
            pages = -(-(t + 5 + far) // s.page_size) + 2
            ckv, kpe = _rows(d, t, rank, rope, dtype, kind)
            where = index(slots_of(d, slots, t, pages * s.page_size), wide)
            if far:  # every slot past 16 bits
                where = where % (where.new_tensor(t + 5)) + far
            cache = empty_cache(pages, s, rank, rope, kv, dtype)
            return {"ckv": ckv, "kpe": kpe, "slots": where, "cache": cache}

        return arguments

    for kv in KV:
        fp8: dict[str, Any] = {"kv": kv} if kv == "fp8" else {}
        for t, rank, rope, size in ((1, 32, 8, "quick"), (5, 160, 16, "quick"), (0, 64, 8, "quick"), (65, 129, 10, "small"),
                                    (3, 512, 64, "small"), (129, 100, 4, "small"), (4097, 512, 64, "full")):  # fmt: skip
            for slots in ("shuffled", "skip"):
                made = make(t, rank, rope, kv, slots)
                yield from each("kv_cache_write", f"{kv}/t{t}-r{rank}-p{rope}/{slots}", made, size, **fp8)  # type: ignore[arg-type]
        for slots in ("ordered", "none"):
            yield from each("kv_cache_write", f"{kv}/t6-r160-p8/{slots}", make(6, 160, 8, kv, slots, "plain"), "quick", **fp8)
        yield from each("kv_cache_write", f"{kv}/t6-r160-p8/outliers", make(6, 160, 8, kv, "skip", "outliers"), **fp8)
        for kind in ("nanone", "faint"):
            yield from each("kv_cache_write", f"{kv}/t6-r160-p8/{kind}", make(6, 160, 8, kv, "ordered", kind), "quick", **fp8)
        yield from each("kv_cache_write", f"{kv}/t1030-r6-p2/shuffled", make(1030, 6, 2, kv, "shuffled"), tags=("f32",), **fp8)
        yield from each("kv_cache_write", f"{kv}/t6-r160-p8/int64", make(6, 160, 8, kv, "skip", "plain", True), **fp8)

    for kv, tag, offered in MIXED:
        for t, slots in ((5, "shuffled"), (9, "skip")):
            yield Case(
                "kv_cache_write", f"{kv}-cache/t{t}-r160-p8/{slots}", tag, make(t, 160, 8, kv, slots), "quick", kv=offered
            )
    far = make(5, 4, 2, "act", "ordered", "plain", far=33000)
    yield from each("kv_cache_write", "act/t5-r4-p2/far", far, "quick", ("f32",))


def lengths(spec: str, page: int) -> list[int]:
    """ "1.p-1.p.p+1.2p" -> lengths, p the page size."""
    found = []
    for word in spec.split("."):
        if "p" not in word:
            found.append(int(word))
            continue
        times, _, plus = word.partition("p")
        found.append(int(times or 1) * page + int(plus or 0))
    return found


def filled(
    d: Data, kv: str, dtype: torch.dtype, s: Setting, rank: int, rope: int, seq: Sequence[int], start: int = 0,
    order: str = "shuffled", shared: bool = False, kind: str = "normal",
) -> tuple[LatentCache, Tensor]:  # fmt: skip
    """A cache that holds sequences of these lengths, NaN everywhere else, and their block table.

    Table entries past the last page of a sequence name a page full of NaN (the last one). shared: the first page of all
    sequences that have one full page is the same.
    """
    page = s.page_size
    used = [-(-n // page) for n in seq]
    total = sum(used) + 2
    labels = d.permutation("pages", total - 1).tolist() if order == "shuffled" else list(range(total - 1))
    if order == "garbage":
        labels = d.permutation("pages", total - 1).tolist()
    width = max([1, *used]) + 1
    poison = 1 << 29 if order == "garbage" else total - 1
    block_table = torch.full((len(seq), width), poison, dtype=torch.int64)
    at = 0
    for i, n in enumerate(used):
        block_table[i, :n] = torch.tensor(labels[at : at + n], dtype=torch.int64)
        at += n
    if shared:
        full = [i for i, n in enumerate(seq) if n >= page]
        for i in full[1:]:
            block_table[i, 0] = block_table[full[0], 0]
    cache = empty_cache(total, s, rank, rope, kv, dtype)
    slots = [int(block_table[i, p // page]) * page + p % page for i, n in enumerate(seq) for p in range(start, n)]
    slots = list(dict.fromkeys(slots))
    rows = d.real("cache", kind, max(len(slots), 1), rank + rope)[: len(slots)].to(dtype)
    kv_cache_write(rows[:, :rank], rows[:, rank:], torch.tensor(slots, dtype=torch.int64), cache)
    return cache, index(block_table)


def _gather() -> Iterator[Case]:
    def make(spec: str, rank: int, rope: int, kv: str, start: int = 0, wide: bool = False, **how: Any) -> Make:
        def arguments(d: Data, dtype: torch.dtype, s: Setting) -> dict[str, Any]:
            seq = lengths(spec, s.page_size)
            cache, block_table = filled(d, kv, dtype, s, rank, rope, seq, start, **how)
            total = sum(max(n - start, 0) for n in seq)
            block_table = index(block_table, wide)
            return {"cache": cache, "block_table": block_table, "seq_lens": index(seq, wide), "total": total, "start": start}

        return arguments

    for kv in KV:
        fp8: dict[str, Any] = {"kv": kv} if kv == "fp8" else {}
        for name in ("1", "p-1.p.p+1", "0.5.0.2p", "7.1.3p+2", "0"):
            size: Size = "quick" if name in ("1", "p-1.p.p+1") else "small"
            for start in (0, 1):
                yield from each("kv_cache_gather", f"{kv}/len-{name}/start{start}", make(name, 160, 8, kv, start), size, **fp8)
        yield from each("kv_cache_gather", f"{kv}/len-2p+1.p/ordered", make("2p+1.p", 100, 6, kv, order="ordered"), **fp8)
        yield from each("kv_cache_gather", f"{kv}/len-p+3.2p/shared", make("p+3.2p", 64, 8, kv, shared=True), **fp8)
        yield from each("kv_cache_gather", f"{kv}/len-2.p+1/garbage", make("2.p+1", 64, 8, kv, order="garbage"), **fp8)
        yield from each("kv_cache_gather", f"{kv}/len-9.p+1/int64", make("9.p+1", 64, 8, kv, wide=True), "quick", **fp8)
        yield from each("kv_cache_gather", f"{kv}/len-9.2.p+1.4/start4", make("9.2.p+1.4", 64, 8, kv, 4), "quick", **fp8)
        for name in ("1100.3", ".".join(["2", "5", "1"] * 12)):
            short = name if len(name) < 9 else "2.5.1-x12"
            yield from each("kv_cache_gather", f"{kv}/len-{short}/r6-p2", make(name, 6, 2, kv), "quick", ("f32",), **fp8)
        yield from each("kv_cache_gather", f"{kv}/len-4097.100/r512", make("4097.100", 512, 64, kv), "full", **fp8)

    for kv, tag, offered in MIXED:
        yield Case("kv_cache_gather", f"{kv}-cache/len-p+1.3/start0", tag, make("p+1.3", 160, 8, kv), "quick", kv=offered)


def _rope_write() -> Iterator[Case]:
    def make(
        t: int, heads: int, rank: int, rope: int, kv: str, slots: str, interleaved: bool = True, length: int = 3000
    ) -> Make:
        def arguments(d: Data, dtype: torch.dtype, s: Setting) -> dict[str, Any]:
            pages = -(-(t + 5) // s.page_size) + 2
            ckv, kpe = _rows(d, t, rank, rope, dtype, "views")
            cos_sin = table(length, rope)
            return {
                "q_pe": strided(d.normal("q", t, heads, rope).to(dtype), 5), "kpe": kpe, "ckv": ckv,
                "positions": index(d.integers("positions", 0, length, t)),
                "cos_sin": cos_sin if dtype != torch.float64 else cos_sin.to(dtype),
                "slots": index(slots_of(d, slots, t, pages * s.page_size)),
                "cache": empty_cache(pages, s, rank, rope, kv, dtype), "interleaved": interleaved,
            }  # fmt: skip

        return arguments

    for kv in KV:
        fp8: dict[str, Any] = {"kv": kv} if kv == "fp8" else {}
        for t, heads, rank, rope in ((1, 2, 32, 8), (5, 3, 160, 16), (0, 2, 32, 8), (33, 16, 100, 10)):
            for slots in ("shuffled", "skip"):
                size: Size = "quick" if t <= 5 else "small"
                made = make(t, heads, rank, rope, kv, slots)
                yield from each("rope_cache_write", f"{kv}/t{t}-h{heads}-r{rank}-p{rope}/{slots}", made, size, **fp8)
        yield from each("rope_cache_write", f"{kv}/t6-h2-r64-p8/halves", make(6, 2, 64, 8, kv, "skip", False), **fp8)
        yield from each(
            "rope_cache_write", f"{kv}/t300-h1-r6-p2/shuffled", make(300, 1, 6, 2, kv, "shuffled"), "quick", ("f32",), **fp8
        )
    yield from each("rope_cache_write", "act/t9-h2-r6-p2/far", make(9, 2, 6, 2, "act", "skip", length=70000), "quick", ("f32",))
    yield from each("rope_cache_write", "act/t2-h130-r6-p4/shuffled", make(2, 130, 6, 4, "act", "shuffled"), tags=("f32",))
    for kv, tag, offered in MIXED:
        yield Case(
            "rope_cache_write", f"{kv}-cache/t5-h3-r160-p16/skip", tag, make(5, 3, 160, 16, kv, "skip"), "quick", kv=offered
        )


def _prolog() -> Iterator[Case]:
    def make(t: int, heads: int, lora: int, quant: Quant, fmt: str, kv: str, slots: str) -> Make:
        def arguments(d: Data, dtype: torch.dtype, s: Setting) -> dict[str, Any]:
            h, rank, rope, nope, value = 96, 160, 8, 24, 20
            pages = -(-(t + 5) // s.page_size) + 2
            kv_b = (d.normal("w.kv_b", heads, nope + value, rank) / rank**0.5).to(dtype)
            weights: dict[str, Any] = {
                "kv_a": weight(d, "kv_a", quant, (rank + rope, h), dtype, fmt=fmt),
                "kv_a_norm": norm_weight(d, "kv_a_norm", rank, dtype), "w_uk": kv_b[:, :nope],
            }  # fmt: skip
            if lora:
                weights["q_a"] = weight(d, "q_a", quant, (lora, h), dtype, fmt=fmt)
                weights["q_a_norm"] = norm_weight(d, "q_a_norm", lora, dtype)
                weights["q_b"] = weight(d, "q_b", quant, (heads * (nope + rope), lora), dtype, fmt=fmt)
            else:
                weights["q"] = weight(d, "q", quant, (heads * (nope + rope), h), dtype, fmt=fmt)
            cos_sin = table(3000, rope)
            return {
                "x": d.normal("x", t, h).to(dtype), "weights": weights, "positions": index(d.integers("positions", 0, 3000, t)),
                "cos_sin": cos_sin if dtype != torch.float64 else cos_sin.to(dtype),
                "slots": index(slots_of(d, slots, t, pages * s.page_size)),
                "cache": empty_cache(pages, s, rank, rope, kv, dtype), "eps": 1e-6, "n_heads": heads,
            }  # fmt: skip

        return arguments

    for t, heads in ((130, 2), (3, 20)):
        made = make(t, heads, 48, "none", "float32", "act", "skip")
        yield from each("mla_prolog", f"none/act-t{t}-h{heads}-q48/skip", made, "quick", ("f32",))
    for kv, tag, offered in MIXED:
        made = make(5, 3, 48, "none", "float32", kv, "skip")
        yield Case("mla_prolog", f"none/{kv}-cache-t5-h3-q48/skip", tag, made, "quick", kv=offered)
    for name, quant, fmt in SCHEMES:
        for t, heads, lora, slots in ((5, 3, 48, "skip"), (1, 2, 0, "shuffled"), (0, 2, 48, "shuffled"), (33, 2, 100, "skip")):
            for kv in KV:
                if kv == "fp8" and quant not in ("none", "fp8-w8a8"):
                    continue
                size: Size = "quick" if t <= 1 and quant in ("none", "fp8-w8a8") else "small"
                text = f"{name}/{kv}-t{t}-h{heads}-q{lora}/{slots}"
                more: dict[str, Any] = {"kv": kv} if kv == "fp8" else {}
                yield from each("mla_prolog", text, make(t, heads, lora, quant, fmt, kv, slots), size, **more)
