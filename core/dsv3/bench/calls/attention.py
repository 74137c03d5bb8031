"""Calls of attention and of the latent cache."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dsv3.bench.calls.shapes import Call, Maker, Model, cache_row, projections

CACHES = ("fp8", "bfloat16")
Calls = Iterator[Call]


def mla_decode(m: Model, t: int, decode: bool) -> Calls:
    if not decode:
        return
    flop = 2 * t * m.rank_heads * m.context * (2 * m.latent + m.rope)
    for kv in CACHES:
        make = lambda d, kv=kv: {  # noqa: E731
            "q_c": d.normal(t, m.rank_heads, m.latent), "q_pe": d.normal(t, m.rank_heads, m.rope),
            "cache": d.cache(kv, t * -(-m.context // d.page) * d.page), **d.tables(t, m.context),
            "cu_q": d.given(range(t + 1)), "max_q": 1, "max_k": m.context, "scale": (m.nope + m.rope) ** -0.5,
        }  # fmt: skip
        yield Call("mla_decode", f"{kv} cache", t, make, flop, "bf16", {"cache": t * m.context * cache_row(m, kv)})


def mla_prefill(m: Model, t: int, decode: bool) -> Calls:
    if decode:
        return
    heads, width = m.rank_heads, m.nope + m.rope
    make = lambda d: {  # noqa: E731
        "q": d.normal(t, heads, width), "k": d.normal(t, heads, width), "v": d.normal(t, heads, m.value),
        "cu_q": d.given([0, t]), "cu_k": d.given([0, t]), "max_q": t, "max_k": t, "scale": width**-0.5, "causal": True,
    }  # fmt: skip
    yield Call("mla_prefill", "causal", t, make, t * (t + 1) * heads * (width + m.value), "bf16")


def merge_attn_states(m: Model, t: int, decode: bool) -> Calls:
    heads, width = m.rank_heads, m.latent if decode else m.value

    def make(d: Maker) -> dict[str, Any]:
        sides = {f"o{i}": d.normal(t, heads, width) for i in (1, 2)}
        return {**sides, **{f"lse{i}": d.scales(heads, t) for i in (1, 2)}}

    yield Call("merge_attn_states", "", t, make)


def mla_prolog(m: Model, t: int, decode: bool) -> Calls:
    if not decode:
        return
    layers = {name: projections(m)[name] for name in ("q_a", "q_b", "kv_a")}
    flop = 2 * t * sum(n * k for n, k in layers.values()) + 2 * t * m.rank_heads * m.nope * m.latent
    for kv in CACHES:

        def make(d: Maker, kv: str = kv) -> dict[str, Any]:
            weights: dict[str, Any] = {name: d.prepared("fp8-w8a8", *shape) for name, shape in layers.items()}
            kv_b = d.weight(m.rank_heads, m.nope + m.value, m.latent)
            weights |= {"q_a_norm": d.norm(m.q_rank), "kv_a_norm": d.norm(m.latent), "w_uk": kv_b[:, : m.nope]}
            return {"x": d.normal(t, m.hidden), "weights": weights, **_places(d, t, kv), "eps": 1e-6, "n_heads": m.rank_heads}

        yield Call("mla_prolog", f"fp8-w8a8 {kv} cache", t, make, flop, "fp8", _placed(m, t, kv))


def _places(d: Maker, t: int, kv: str) -> dict[str, Any]:
    """Where tokens stand, and a slot for each."""
    return {
        "positions": d.integers(d.m.context, t), "cos_sin": d.angles(d.m.context), "slots": d.given(range(t)),
        "cache": d.cache(kv, t),
    }  # fmt: skip


def _placed(m: Model, t: int, kv: str) -> dict[str, int]:
    return {"cos_sin": 4 * t * m.rope, "cache": t * cache_row(m, kv)}


def rope_cache_write(m: Model, t: int, decode: bool) -> Calls:
    for kv in CACHES:
        make = lambda d, kv=kv: {  # noqa: E731
            "q_pe": d.normal(t, m.rank_heads, m.nope + m.rope)[..., m.nope :],
            "kpe": d.normal(t, m.latent + m.rope)[:, m.latent :], "ckv": d.normal(t, m.latent), **_places(d, t, kv),
        }  # fmt: skip
        yield Call("rope_cache_write", f"{kv} cache", t, make, reads=_placed(m, t, kv))


def kv_cache_write(m: Model, t: int, decode: bool) -> Calls:
    for kv in CACHES:
        make = lambda d, kv=kv: {  # noqa: E731
            "ckv": d.normal(t, m.latent), "kpe": d.normal(t, m.rope), "slots": d.given(range(t)), "cache": d.cache(kv, t),
        }  # fmt: skip
        yield Call("kv_cache_write", f"{kv} cache", t, make, reads={"cache": t * cache_row(m, kv)})


def kv_cache_gather(m: Model, t: int, decode: bool) -> Calls:
    if decode:
        return
    for kv in CACHES:
        make = lambda d, kv=kv: {"cache": d.cache(kv, t), **d.tables(1, t), "total": t}  # noqa: E731
        yield Call("kv_cache_gather", f"{kv} cache", t, make, reads={"cache": t * cache_row(m, kv)})


def apply_rope(m: Model, t: int, decode: bool) -> Calls:
    make = lambda d: {  # noqa: E731
        "x": d.normal(t, m.rank_heads, m.nope + m.rope)[..., m.nope :], "positions": d.integers(m.context, t),
        "cos_sin": d.angles(m.context),
    }  # fmt: skip
    yield Call("apply_rope", "", t, make, reads={"cos_sin": 4 * t * m.rope})
