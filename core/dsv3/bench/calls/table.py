"""The 34 operators at the model's sizes: a table from operator to its calls with a number of tokens.

Decoding: each token is the next of a sequence with `context` tokens. Prefill: the tokens are one sequence's. An operator that a
phase does not have (sampling, absorbed attention, attention over expanded keys) has no calls in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from dsv3.bench.calls.attention import (
    apply_rope,
    kv_cache_gather,
    kv_cache_write,
    merge_attn_states,
    mla_decode,
    mla_prefill,
    mla_prolog,
    rope_cache_write,
)
from dsv3.bench.calls.experts import fused_experts, grouped_linear, moe, moe_combine, moe_permute, route
from dsv3.bench.calls.shapes import Call, Maker, Model, projections
from dsv3.ops import names
from dsv3.quant.fp8 import blocks

# Scheme -> what its products run on.
SCHEMES = {
    "none": "bf16", "fp8-w8a8": "fp8", "fp8-w8a16": "bf16", "int8-w8a8": "int8", "int8-w8a16": "bf16", "int4-w4a16": "bf16",
}  # fmt: skip
# Numbers of tokens in the order in which they are measured, so that what time does not suffice for matters least.
ORDER = (32, 2048, 1, 128, 8192, 8, 512)
_QUANT = {"group": 128, "scale_fmt": "float32"}
Calls = Iterator[Call]
# From model, number of tokens, and whether they decode, to the calls of one operator.
Calling = Callable[[Model, int, bool], Calls]


def all_calls(m: Model) -> list[Call]:
    """Every call, the most telling numbers of tokens first, then in the order of the contract."""
    sizes = [*((t, True) for t in m.decode), *((t, False) for t in m.prefill)]
    sizes.sort(key=lambda s: ORDER.index(s[0]) if s[0] in ORDER else s[0])
    return [call for t, decode in sizes for op in names() for call in TABLE[op](m, t, decode)]


def _product(op: str, variant: str, t: int, n: int, k: int, unit: str, make: Callable[[Maker], dict[str, Any]]) -> Call:
    return Call(op, variant, t, make, 2 * t * n * k, unit)


def quant_linear(m: Model, t: int, decode: bool) -> Calls:
    """All layers in FP8, which is how the model is released; two of them in every other scheme."""
    for quant, unit in SCHEMES.items():
        for name, (n, k) in projections(m).items():
            if (quant == "fp8-w8a8" and (name != "kv_b" or not decode)) or name in ("o", "dense13"):
                yield _product(
                    "quant_linear", f"{name} {quant}", t, n, k, unit,
                    lambda d, q=quant, n=n, k=k: {"x": d.normal(t, k), "w": d.prepared(q, n, k)},
                )  # fmt: skip


def linear(m: Model, t: int, decode: bool) -> Calls:
    layers = {"o": projections(m)["o"], **({"head": (m.vocabulary // m.tp, m.hidden)} if decode else {})}
    for name, (n, k) in layers.items():
        make = lambda d, n=n, k=k: {"x": d.normal(t, k), "weight": d.weight(n, k)}  # noqa: E731
        yield _product("linear", f"{name} bf16", t, n, k, "bf16", make)


def block_scaled_mm(m: Model, t: int, decode: bool) -> Calls:
    for name in ("o", "dense13"):
        n, k = projections(m)[name]
        make = lambda d, n=n, k=k: {  # noqa: E731
            "a": d.codes(t, k), "a_scale": d.scales(t, blocks(k)),
            "b": d.codes(n, k), "b_scale": d.scales(blocks(n), blocks(k)), "out_dtype": "bfloat16",
        }  # fmt: skip
        yield _product("block_scaled_mm", name, t, n, k, "fp8", make)


def int8_scaled_mm(m: Model, t: int, decode: bool) -> Calls:
    n, k = projections(m)["dense13"]

    def make(d: Maker) -> dict[str, Any]:
        a, b = (d.prepared("int8-w8a8", rows, k).tensors for rows in (t, n))
        return {
            "a": a["weight"], "a_scale": a["scale"], "b": b["weight"], "b_scale": b["scale"], "out_dtype": "bfloat16",
        }  # fmt: skip

    yield _product("int8_scaled_mm", "dense13", t, n, k, "int8", make)


def bmm(m: Model, t: int, decode: bool) -> Calls:
    """W_UK and W_UV as the graph has them: views of kv_b."""
    if not decode:
        return

    def make(d: Maker, up: bool) -> dict[str, Any]:
        kv_b = d.weight(m.rank_heads, m.nope + m.value, m.latent)
        if up:
            return {"x": d.normal(t, m.rank_heads, m.latent), "weight": kv_b[:, m.nope :].transpose(1, 2)}
        return {"x": d.normal(t, m.rank_heads, m.nope + m.rope)[..., : m.nope], "weight": kv_b[:, : m.nope]}

    for name, width, up in (("w_uk", m.nope, False), ("w_uv", m.value, True)):
        flop = 2 * t * m.rank_heads * width * m.latent
        yield Call("bmm", name, t, lambda d, up=up: make(d, up), flop, "bf16")


def router_gemm(m: Model, t: int, decode: bool) -> Calls:
    make = lambda d: {"x": d.normal(t, m.hidden), "weight": d.weight(m.experts, m.hidden)}  # noqa: E731
    yield _product("router_gemm", "", t, m.experts, m.hidden, "bf16", make)


def mtp_combine(m: Model, t: int, decode: bool) -> Calls:
    h = m.hidden
    make = lambda d: {  # noqa: E731
        "embedding": d.normal(t, h), "hidden": d.normal(t, h), "enorm": d.norm(h), "hnorm": d.norm(h),
        "eh_proj": d.weight(h, 2 * h), "eps": 1e-6,
    }  # fmt: skip
    yield _product("mtp_combine", "", t, h, 2 * h, "bf16", make)


# ---------------------------------------------------------------------------------------------------------------- pointwise


def _plain(op: str, make: Callable[[Maker, Model, int], dict[str, Any]], variant: str = "") -> Calling:
    """An operator with one call, all of whose arguments are read whole."""
    return lambda m, t, decode: iter([Call(op, variant, t, lambda d: make(d, m, t))])


def embedding(m: Model, t: int, decode: bool) -> Calls:
    rows, h = m.vocabulary // m.tp, m.hidden
    make = lambda d: {"ids": d.integers(rows, t), "table": d.normal(rows, h)}  # noqa: E731
    yield Call("embedding", "", t, make, reads={"table": 2 * t * h})


def gumbel_argmax(m: Model, t: int, decode: bool) -> Calls:
    make = lambda d: {  # noqa: E731
        "logits": d.normal(t, m.vocabulary), "seeds": d.integers(1 << 40, t, dtype=torch.int64),
        "positions": d.integers(m.context, t), "temperature": d.normal(t).fill_(0.8),
    }  # fmt: skip
    if decode:
        yield Call("gumbel_argmax", "", t, make)


def _weight_only(op: str, encoding: str, name: str) -> Calling:
    """What is done to a weight once, at load: the same for every number of tokens, so it goes with the first."""

    def calls(m: Model, t: int, decode: bool) -> Calls:
        if t != m.decode[0]:
            return
        n, k = projections(m)[name]
        make = lambda d: {"weight": d.codes(n, k, encoding=encoding), "scale": d.scales(blocks(n), blocks(k))}  # noqa: E731
        yield Call(op, name, t, make)

    return calls


TABLE: dict[str, Calling] = {
    **{f.__name__: f for f in (
        quant_linear, linear, block_scaled_mm, int8_scaled_mm, bmm, router_gemm, mtp_combine, mla_decode, mla_prefill,
        merge_attn_states, mla_prolog, rope_cache_write, kv_cache_write, kv_cache_gather, apply_rope, grouped_linear,
        fused_experts, moe, route, moe_permute, moe_combine, embedding, gumbel_argmax,
    )},
    "dequant_block": _weight_only("dequant_block", "", "dense13"),
    "fn_to_fnuz": _weight_only("fn_to_fnuz", "float8_e4m3fn", "dense13"),
    "all_reduce": _plain("all_reduce", lambda d, m, t: {"x": d.normal(t, m.hidden), "group": None}, "one rank"),
    "rms_norm": _plain("rms_norm", lambda d, m, t: {"x": d.normal(t, m.hidden), "weight": d.norm(m.hidden), "eps": 1e-6}),
    "add_rms_norm": _plain("add_rms_norm", lambda d, m, t: {
        "x": d.normal(t, m.hidden), "residual": d.normal(t, m.hidden), "weight": d.norm(m.hidden), "eps": 1e-6}),
    "rms_norm_quant": _plain("rms_norm_quant", lambda d, m, t: {
        "x": d.normal(t, m.hidden), "weight": d.norm(m.hidden), "eps": 1e-6, "dtype": d.encoding, **_QUANT}),
    "act_quant": _plain("act_quant", lambda d, m, t: {
        "x": d.normal(t, m.hidden), "dtype": d.encoding, "amax_floor": 1e-4, **_QUANT}),
    "quant_int8": _plain("quant_int8", lambda d, m, t: {"x": d.normal(t, m.hidden)}),
    "silu_mul": _plain("silu_mul", lambda d, m, t: {"x": d.normal(t, 2 * m.dense // m.tp)}),
    "silu_mul_quant": _plain("silu_mul_quant", lambda d, m, t: {
        "x": d.normal(t, 2 * m.dense // m.tp), "dtype": d.encoding, **_QUANT}),
    "grouped_topk": _plain("grouped_topk", lambda d, m, t: {
        "logits": d.normal(t, m.experts).float(), "bias": d.scales(m.experts), **m.routing}),
}  # fmt: skip
