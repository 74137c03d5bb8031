"""Calls of the mixture of experts: routing, sorting, products by expert."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from dsv3.bench.calls.shapes import Call, Maker, Model, chosen, routed
from dsv3.quant.fp8 import blocks

Calls = Iterator[Call]


def _slices(m: Model) -> dict[str, tuple[int, int]]:
    """Expert parallelism: some experts whole. Tensor parallelism: a slice of every expert. -> experts here, their width."""
    return {f"ep{m.ep}": (m.rank_experts, m.expert), f"tp{m.tp}": (m.experts, m.expert // m.tp)}


def grouped_linear(m: Model, t: int, decode: bool) -> Calls:
    for name, (here, width) in _slices(m).items():
        pairs, present = routed(t, m, here)
        for part, n, k in (("w13", 2 * width, m.hidden), ("w2", m.hidden, width)):

            def make(d: Maker, here: int = here, n: int = n, k: int = k) -> dict[str, Any]:
                counts = chosen(t, m.topk, m.experts, here).flatten().add(1).bincount(minlength=here + 1)[1:]
                offsets = [0, *counts.cumsum(0).tolist()]
                return {"x": d.normal(offsets[-1], k), "w": d.prepared("fp8-w8a8", here, n, k), "offsets": d.given(offsets)}

            reads = {"w": present * (n * k + 4 * blocks(n) * blocks(k))}
            yield Call("grouped_linear", f"{part} {name} fp8-w8a8", t, make, 2 * pairs * n * k, "fp8", reads)


def _expert_reads(m: Model, t: int, here: int, width: int) -> tuple[int, dict[str, int]]:
    """FLOP, and bytes of the experts that are read."""
    pairs, present = routed(t, m, here)
    h = m.hidden
    sizes = {"w13": (2 * width, h), "w2": (h, width)}
    reads = {name: present * (n * k + 4 * blocks(n) * blocks(k)) for name, (n, k) in sizes.items()}
    return 6 * pairs * h * width, reads


def _experts(d: Maker, here: int, width: int) -> dict[str, Any]:
    h = d.m.hidden
    return {"w13": d.prepared("fp8-w8a8", here, 2 * width, h), "w2": d.prepared("fp8-w8a8", here, h, width)}


def fused_experts(m: Model, t: int, decode: bool) -> Calls:
    for name, (here, width) in _slices(m).items():
        flop, reads = _expert_reads(m, t, here, width)
        make = lambda d, here=here, width=width: {  # noqa: E731
            "x": d.normal(t, m.hidden), "weights": d.scales(t, m.topk), "ids": d.given(chosen(t, m.topk, m.experts, here)),
            **_experts(d, here, width),
        }  # fmt: skip
        yield Call("fused_experts", f"{name} fp8-w8a8", t, make, flop, "fp8", reads)


def moe(m: Model, t: int, decode: bool) -> Calls:
    """Only the tensor-parallel slice. The router itself chooses: expected numbers of experts are counted, not those met."""
    here, width = m.experts, m.expert // m.tp
    flop, reads = _expert_reads(m, t, here, width)
    flop += 2 * t * m.experts * m.hidden + 6 * t * m.hidden * width

    def make(d: Maker) -> dict[str, Any]:
        shared = {"shared13": d.prepared("fp8-w8a8", 2 * width, m.hidden), "shared2": d.prepared("fp8-w8a8", m.hidden, width)}
        return {
            "x": d.normal(t, m.hidden), "gate": d.weight(m.experts, m.hidden), "bias": d.scales(m.experts),
            **_experts(d, here, width), **shared, **m.routing,
        }  # fmt: skip

    yield Call("moe", f"tp{m.tp} fp8-w8a8", t, make, flop, "fp8", reads)


def route(m: Model, t: int, decode: bool) -> Calls:
    make = lambda d: {  # noqa: E731
        "x": d.normal(t, m.hidden), "gate": d.weight(m.experts, m.hidden), "bias": d.scales(m.experts), **m.routing,
    }  # fmt: skip
    yield Call("route", "", t, make, 2 * t * m.experts * m.hidden, "bf16")


def _with_ids(op: str, m: Model, t: int, make: Callable[[Maker, Any], dict[str, Any]]) -> Calls:
    yield Call(op, f"ep{m.ep}", t, lambda d: make(d, chosen(t, m.topk, m.experts, m.rank_experts)))


def moe_permute(m: Model, t: int, decode: bool) -> Calls:
    return _with_ids("moe_permute", m, t, lambda d, ids: {"ids": d.given(ids), "n_experts": m.rank_experts})


def moe_combine(m: Model, t: int, decode: bool) -> Calls:
    """All experts here, so that every row counts."""

    def make(d: Maker) -> dict[str, Any]:
        perm = chosen(t, m.topk, m.experts, m.experts).flatten().argsort(stable=True)
        return {"y": d.normal(t * m.topk, m.hidden), "perm": d.given(perm), "weights": d.scales(t, m.topk)}

    yield Call("moe_combine", f"tp{m.tp}", t, make)
