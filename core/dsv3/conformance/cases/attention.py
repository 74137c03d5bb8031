"""Cases of attention, expanded and absorbed, and of merging."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from dsv3.conformance.case import Case, Make, Setting, each, index, strided
from dsv3.conformance.cases.cache import KV, filled, lengths
from dsv3.conformance.data import Data
from dsv3.conformance.result import Size


def cases() -> Iterator[Case]:
    yield from _prefill()
    yield from _decode()
    yield from _merge()


def pairs(spec: str) -> list[tuple[int, int]]:
    """ "5x5.1x9" -> (queries, keys) per sequence."""
    return [(int(q), int(k)) for q, _, k in (word.partition("x") for word in spec.split("."))]


def _prefill() -> Iterator[Case]:
    def make(spec: str, heads: int, width: int, value: int, causal: bool = True, scale: float = 0.0, kind: str = "normal",
             extra: int = 0, view: bool = False, wide: bool = False) -> Make:  # fmt: skip
        def arguments(d: Data, dtype: torch.dtype, s: Setting) -> dict[str, Any]:
            seq = pairs(spec)
            tq, tk = sum(q for q, _ in seq), sum(k for _, k in seq)
            loud = 12.0 if kind == "loud" else 1.0
            q = d.normal("q", tq + extra, heads, width) * loud
            k, v = d.normal("k", tk + extra, heads, width) * loud, d.real("v", "outliers" if kind == "outliers" else "normal",
                                                                         tk + extra, heads, value)  # fmt: skip
            if kind == "same":  # equal scores: the mean of what is visible
                k = k * 0
            k[tk:], v[tk:] = float("nan"), float("nan")
            v = v.to(dtype)
            return {
                "q": q.to(dtype), "k": k.to(dtype), "v": strided(v, 8) if view else v,
                "cu_q": index(torch.tensor([0, *(n for n, _ in seq)]).cumsum(0), wide),
                "cu_k": index(torch.tensor([0, *(n for _, n in seq)]).cumsum(0), wide),
                "max_q": max(n for n, _ in seq), "max_k": max(n for _, n in seq),
                "scale": scale or width**-0.5, "causal": causal,
            }  # fmt: skip

        return arguments

    shapes: tuple[tuple[str, int, int, int, Size], ...] = (
        ("1x1", 2, 24, 20, "quick"), ("5x5.1x1.0x0.7x7", 3, 24, 20, "quick"), ("3x10.1x64.5x65", 2, 32, 16, "quick"),
        ("2x2.63x63", 1, 48, 32, "small"), ("64x64", 2, 24, 16, "small"), ("65x129.2x3", 2, 20, 24, "small"),
        ("4x2.3x0.2x5", 2, 24, 20, "quick"), ("1x200", 4, 192, 128, "small"), ("130x130", 1, 40, 33, "small"),
        ("0x0", 2, 24, 20, "small"), ("0x5.3x3", 2, 24, 20, "small"), ("1x1.1x2.1x3.1x4", 5, 17, 9, "small"),
        ("33x33.70x100", 16, 192, 128, "full"), ("3x4097", 2, 192, 128, "full"), ("600x600", 2, 192, 128, "full"),
    )  # fmt: skip
    for spec, heads, width, value, size in shapes:
        yield from each("mla_prefill", f"{spec}/h{heads}-d{width}-v{value}/causal", make(spec, heads, width, value), size)
    for spec in ("5x5.1x1", "3x10.7x2.2x0", "65x70"):
        size = "quick" if spec == "5x5.1x1" else "small"
        yield from each("mla_prefill", f"{spec}/h2-d24-v20/full", make(spec, 2, 24, 20, causal=False), size)
    for kind in ("loud", "same", "outliers"):
        yield from each("mla_prefill", f"7x9.4x4/h2-d24-v20/{kind}", make("7x9.4x4", 2, 24, 20, kind=kind), "quick")
    yield from each("mla_prefill", "6x6.3x8/h2-d24-v20/view", make("6x6.3x8", 2, 24, 20, view=True), "quick")
    yield from each("mla_prefill", "6x6.3x8/h2-d24-v20/padded", make("6x6.3x8", 2, 24, 20, extra=5), "quick")
    yield from each("mla_prefill", "6x6.3x8/h2-d24-v20/scale", make("6x6.3x8", 2, 24, 20, scale=0.7))
    yield from each("mla_prefill", "6x6.3x8/h2-d24-v20/int64", make("6x6.3x8", 2, 24, 20, wide=True))


def _decode() -> Iterator[Case]:
    def make(queries: str, spec: str, heads: int, rank: int, rope: int, kv: str, start: int = 0, kind: str = "normal",
             scale: float = 0.0, extra: int = 0, wide: bool = False, **how: Any) -> Make:  # fmt: skip
        def arguments(d: Data, dtype: torch.dtype, s: Setting) -> dict[str, Any]:
            seq = lengths(spec, s.page_size)
            counts = [int(n) for n in queries.split(".")]
            counts = counts if len(counts) == len(seq) else counts * len(seq)
            counts = [min(n, length) for n, length in zip(counts, seq, strict=True)]
            cache, block_table = filled(d, kv, dtype, s, rank, rope, seq, start, **how)
            t = sum(counts) + extra
            loud = 8.0 if kind == "loud" else 1.0
            return {
                "q_c": (d.normal("q_c", t, heads, rank) * loud).to(dtype),
                "q_pe": (d.normal("q_pe", t, heads, rope) * loud).to(dtype),
                "cache": cache, "block_table": block_table, "seq_lens": index(seq, wide),
                "cu_q": index(torch.tensor([0, *counts]).cumsum(0), wide), "max_q": max(counts),
                "max_k": max(max(n - start, 0) for n in seq), "scale": scale or (rank / 4 + rope) ** -0.5, "start": start,
            }  # fmt: skip

        return arguments

    for kv in KV:
        fp8: dict[str, Any] = {"kv": kv} if kv == "fp8" else {}
        shapes: tuple[tuple[str, str, int, int, int, Size], ...] = (
            ("1", "1", 2, 32, 8, "quick"), ("1", "1.p-1.p.p+1", 3, 64, 8, "quick"), ("2", "2.p.p+1.2p", 2, 48, 16, "quick"),
            ("1.4.0.2", "5.2p+3.7.p+1", 4, 160, 8, "quick"), ("3", "3.9", 1, 100, 10, "small"),
            ("1", "3p-1.2", 16, 32, 8, "small"),
            ("5", "p+2.p-1", 2, 129, 6, "small"), ("1", "4.4.4.4.4.4", 2, 32, 4, "small"), ("1", "2p+5", 2, 512, 64, "small"),
            ("1.2", "p+1.9", 16, 512, 64, "small"),
            ("1", "4097.1.300", 16, 512, 64, "full"), ("2", "600.129", 128, 512, 64, "full"),
        )  # fmt: skip
        for queries, spec, heads, rank, rope, size in shapes:
            name = f"{kv}/q{queries}/len-{spec}/h{heads}-r{rank}-p{rope}"
            yield from each("mla_decode", name, make(queries, spec, heads, rank, rope, kv), size, **fp8)
        for queries, spec in (("1", "2.p+1"), ("2", "3.p.1")):
            made = make(queries, spec, 2, 64, 8, kv, start=1)
            yield from each("mla_decode", f"{kv}/q{queries}/len-{spec}/start1", made, "quick", **fp8)
        for name, how in (("ordered", {"order": "ordered"}), ("shared", {"shared": True}), ("garbage", {"order": "garbage"})):
            made = make("1", "p+3.2p.p", 2, 64, 8, kv, **how)
            yield from each("mla_decode", f"{kv}/q1/len-p+3.2p.p/{name}", made, "quick", **fp8)
        for kind in ("loud",):
            yield from each(
                "mla_decode", f"{kv}/q2/len-9.p+1/{kind}", make("2", "9.p+1", 2, 64, 8, kv, kind=kind), "quick", **fp8
            )
        yield from each("mla_decode", f"{kv}/q1/len-9.p+1/scale", make("1", "9.p+1", 2, 64, 8, kv, scale=0.3), **fp8)
        yield from each("mla_decode", f"{kv}/q2/len-9.p+1/padded", make("2", "9.p+1", 2, 64, 8, kv, extra=3), **fp8)
        yield from each("mla_decode", f"{kv}/q2/len-9.p+1/int64", make("2", "9.p+1", 2, 64, 8, kv, wide=True), **fp8)


def _merge() -> Iterator[Case]:
    def make(t: int, heads: int, width: int, kind: str) -> Make:
        def arguments(d: Data, dtype: torch.dtype, s: Setting) -> dict[str, Any]:
            sides = {}
            for i in (1, 2):
                o = d.normal(f"o{i}", t, heads, width)
                lse = d.normal(f"lse{i}", heads, t) * 3
                if kind == "far":
                    lse = torch.where(d.integers(f"far{i}", 0, 2, heads, t) > 0, 200.0, -200.0) + lse
                if kind == "empty":  # what an empty side holds is not read
                    gone = d.integers(f"gone{i}", 0, 2, heads, t) > 0
                    lse = lse.masked_fill(gone, float("-inf"))
                    o = torch.where(gone.T[..., None], torch.full_like(o, float("nan")), o)
                sides[f"o{i}"], sides[f"lse{i}"] = o.to(dtype), lse if dtype != torch.float64 else lse.to(dtype)
            return {"o1": sides["o1"], "lse1": sides["lse1"], "o2": sides["o2"], "lse2": sides["lse2"]}

        return arguments

    for t, heads, width in ((1, 2, 16), (5, 3, 33), (0, 2, 8), (65, 16, 20)):
        for kind in ("normal", "far", "empty"):
            yield from each(
                "merge_attn_states",
                f"t{t}-h{heads}-d{width}/{kind}",
                make(t, heads, width, kind),
                "quick" if t < 9 else "small",
            )
    yield from each("merge_attn_states", "t129-h128-d512/normal", make(129, 128, 512, "normal"), "full")
