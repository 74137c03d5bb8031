"""Cases of the mixture of experts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from dsv3.conformance.case import Case, Make, Setting, down, each, gate_up, index, lowest_codes, weight
from dsv3.conformance.cases.products import SCHEMES
from dsv3.conformance.cases.routing import LAYOUTS, MODES, bias, routing
from dsv3.conformance.data import Data
from dsv3.conformance.result import Size
from dsv3.ops import moe_permute
from dsv3.plugin import Quant

# how tokens are spread over experts
SPREADS = ("random", "one", "holes", "missing", "none")


def cases() -> Iterator[Case]:
    yield from _permute()
    yield from _combine()
    yield from _grouped()
    yield from _fused()
    yield from _moe()


def choose(d: Data, spread: str, t: int, k: int, experts: int) -> Tensor:
    """ids int64 [t, k], distinct per token. "one": the first choice is always expert E - 2; "holes": odd experts only where
    that leaves k of them; "missing": some entries -1; "none": all."""
    if spread == "turns":  # for many tokens: each starts where a random number says, and takes every seventh expert; some -1
        first = d.integers("ids", 0, experts, t, 1)
        return torch.where(d.uniform("missing", t, k) < 0.1, -1, (first + 7 * torch.arange(k)) % experts)
    order = (
        torch.stack([d.permutation(f"ids.{i}", experts)[:k] for i in range(t)]) if t else torch.zeros(0, k, dtype=torch.int64)
    )
    if spread == "one" and t:
        hot = experts - 2 if experts > 1 else 0
        order = torch.where(order == hot, order[:, :1], order)
        order[:, 0] = hot
    if spread == "holes" and experts // 2 >= k:
        order = torch.stack([d.permutation(f"ids.{i}", experts // 2)[:k] * 2 + 1 for i in range(t)]) if t else order
    if spread == "missing":
        order = torch.where(d.uniform("missing", t, k) < 0.4, -1, order)
        order[:1] = -1
    if spread == "none":
        order = torch.full_like(order, -1)
    return order


def _permute() -> Iterator[Case]:
    def make(t: int, k: int, experts: int, spread: str, wide: bool = False) -> Make:
        return lambda d, dtype, s: {"ids": index(choose(d, spread, t, k, experts), wide), "n_experts": experts}

    for t, k, experts in ((1, 2, 8), (5, 3, 16), (0, 2, 4), (65, 8, 256), (33, 1, 5), (7, 6, 6), (129, 4, 9)):
        for spread in SPREADS:
            size: Size = "quick" if t <= 5 else "small"
            name = f"t{t}-k{k}-e{experts}/{spread}"
            yield from each("moe_permute", name, make(t, k, experts, spread), size, ("f32",))
    for t, k, experts in ((9, 1, 1), (5, 10, 16), (300, 2, 3), (4200, 8, 300)):
        made = make(t, k, experts, "missing" if t < 4000 else "turns")
        yield from each("moe_permute", f"t{t}-k{k}-e{experts}/missing", made, "quick", ("f32",))
    yield from each("moe_permute", "t9-k2-e8/int64", make(9, 2, 8, "missing", True), "small", ("f32",))
    yield from each("moe_permute", "t4097-k8-e256/random", make(4097, 8, 256, "random"), "full", ("f32",))


def _combine() -> Iterator[Case]:
    def make(t: int, k: int, experts: int, width: int, spread: str, signed: bool = False) -> Make:
        def arguments(d: Data, dtype: torch.dtype, s: Setting) -> dict[str, Any]:
            ids = choose(d, spread, t, k, experts)
            perm, _ = moe_permute(index(ids), experts)
            y = d.real("y", "outliers", t * k, width)
            y[perm < 0] = float("nan")
            weights = d.uniform("weights", t, k) + (-0.6 if signed else 0.1)
            weights[ids < 0] = float("nan")
            weights = weights if dtype != torch.float64 else weights.to(dtype)
            return {"y": y.to(dtype), "perm": perm, "weights": weights}

        return arguments

    for t, k, experts, width in ((1, 2, 8, 64), (5, 3, 16, 33), (0, 2, 4, 16), (65, 8, 64, 48), (17, 1, 5, 129), (9, 6, 6, 40)):
        for spread in ("random", "missing", "none"):
            size: Size = "quick" if t <= 5 else "small"
            yield from each("moe_combine", f"t{t}-k{k}-h{width}/{spread}", make(t, k, experts, width, spread), size)
    yield from each("moe_combine", "t5-k3-h20/signed", make(5, 3, 16, 20, "missing", True), "quick")
    for t, k, width in ((300, 8, 3), (1100, 1, 2), (2, 2, 2100)):
        yield from each("moe_combine", f"t{t}-k{k}-h{width}/turns", make(t, k, 64, width, "turns"), "quick", ("f32",))
    yield from each("moe_combine", "t300-k8-h2048/missing", make(300, 8, 256, 2048, "missing"), "full")


def _grouped() -> Iterator[Case]:
    def make(
        counts: tuple[int, ...], extra: int, n: int, k: int, quant: Quant, fmt: str, kind: str, lowest: bool = False
    ) -> Make:
        def arguments(d: Data, dtype: torch.dtype, s: Setting) -> dict[str, Any]:
            rows = sum(counts)
            x = d.real("x", kind, rows + extra, k)
            x[rows:] = float("nan")  # rows that belong to no expert
            offsets = torch.tensor([0, *counts]).cumsum(0)
            grid = "integers" if kind == "integers" else "normal"
            w = weight(d, "w", quant, (len(counts), n, k), dtype, grid, fmt)
            w = lowest_codes(d, w) if lowest else w
            return {"x": x.to(dtype), "w": w, "offsets": index(offsets)}

        return arguments

    spreads = {
        "mixed": ((3, 0, 5, 1), 0),
        "tail": ((2, 1, 0), 4),
        "hot": ((0, 0, 70, 0), 0),
        "empty": ((0, 0), 3),
        "none": ((0, 0), 0),
    }
    for name, quant, fmt in SCHEMES:
        for spread, (counts, extra) in spreads.items():
            size: Size = "quick" if spread in ("mixed", "tail") and quant != "int4-w4a16" else "small"
            made = make(counts, extra, 72, 200, quant, fmt, "normal")
            yield from each("grouped_linear", f"{name}/{spread}-n72-k200/normal", made, size)
        for kind in ("outliers", "integers"):
            made = make((3, 0, 5, 1), 2, 136, 300, quant, fmt, kind)
            yield from each("grouped_linear", f"{name}/mixed-n136-k300/{kind}", made)
        for text, counts, extra, n, k in (("e40", (1, 0, 2) * 13 + (1,), 3, 24, 40), ("rows300", (0, 300, 1), 40, 16, 40),
                                          ("k2100", (2, 1), 1, 16, 2100)):  # fmt: skip
            made = make(counts, extra, n, k, quant, fmt, "normal")
            yield from each(
                "grouped_linear",
                f"{name}/{text}-n{n}-k{k}/normal",
                made,
                "quick" if quant in ("none", "fp8-w8a8") else "small",
                ("f32",),
            )
        if quant.startswith("int"):
            made = make((3, 0, 2), 1, 24, 140, quant, fmt, "normal", True)
            yield from each("grouped_linear", f"{name}/mixed-n24-k140/lowest", made, "quick")
    for name, quant, fmt in SCHEMES[:2]:
        made = make((65, 1, 128, 0, 63, 129), 7, 256, 384, quant, fmt, "normal")
        yield from each("grouped_linear", f"{name}/blocks-n256-k384/normal", made, "full")


def _fused() -> Iterator[Case]:
    def make(
        t: int, h: int, i: int, experts: int, k: int, quant: Quant, fmt: str, spread: str, kind: str, wide: bool = False,
        signed: bool = False,
    ) -> Make:  # fmt: skip
        def arguments(d: Data, dtype: torch.dtype, s: Setting) -> dict[str, Any]:
            ids = choose(d, spread, t, k, experts)
            weights = d.uniform("weights", t, k) + (-0.6 if signed else 0.1)
            weights[ids < 0] = float("nan")
            weights = weights if dtype != torch.float64 else weights.to(dtype)
            return {
                "x": d.real("x", kind, t, h).to(dtype), "weights": weights, "ids": index(ids, wide),
                "w13": gate_up(d, "w13", quant, (experts,), i, h, dtype, fmt),
                "w2": down(d, "w2", quant, (experts,), h, i, dtype, fmt),
            }  # fmt: skip

        return arguments

    for name, quant, fmt in SCHEMES:
        for t, spread in ((5, "random"), (1, "random"), (0, "random"), (9, "missing"), (17, "one"), (6, "holes"), (3, "none")):
            size: Size = "quick" if t in (5, 0, 9) and quant in ("none", "fp8-w8a8", "int8-w8a8") else "small"
            made = make(t, 96, 56, 6, 2, quant, fmt, spread, "normal", False)
            yield from each("fused_experts", f"{name}/t{t}-e6-k2/{spread}", made, size)
        made = make(7, 200, 150, 4, 4, quant, fmt, "random", "outliers", True)
        yield from each("fused_experts", f"{name}/t7-e4-k4/outliers-int64", made)
        made = make(4, 256, 128, 8, 2, quant, fmt, "random", "normal", False)
        yield from each("fused_experts", f"{name}/t4-e8-k2/blocks", made)
    for t, h, i, experts, k, spread in ((300, 16, 8, 2, 1, "one"), (3, 16, 8, 40, 6, "random"), (20, 16, 8, 40, 10, "missing")):
        made = make(t, h, i, experts, k, "none", "float32", spread, "normal")
        yield from each("fused_experts", f"none/t{t}-e{experts}-k{k}/{spread}-long", made, "quick", ("f32",))
    for name, quant, fmt in (SCHEMES[1], SCHEMES[4]):  # FP8 and INT8 activations
        made = make(140, 40, 24, 2, 1, quant, fmt, "one", "normal")
        yield from each("fused_experts", f"{name}/t140-e2-k1/one-long", made, tags=("f32",))
    yield from each(
        "fused_experts",
        "none/t5-e6-k2/signed",
        make(5, 40, 24, 6, 2, "none", "float32", "random", "normal", signed=True),
        "quick",
    )
    for name, quant, fmt in SCHEMES[:3]:
        made = make(65, 256, 128, 16, 4, quant, fmt, "random", "normal", False)
        yield from each("fused_experts", f"{name}/t65-e16-k4/random", made, "full")


def _moe() -> Iterator[Case]:
    def make(t: int, layout: str, mode: str, quant: Quant, fmt: str, shared: int, local: bool) -> Make:
        def arguments(d: Data, dtype: torch.dtype, s: Setting) -> dict[str, Any]:
            h, i, experts = 96, 40, LAYOUTS[layout][0]
            mine = experts // 2 if local else experts
            expert_map = None
            if local:  # this rank has the upper half, in another order
                expert_map = torch.full((experts,), -1)
                expert_map[experts - mine :] = d.permutation("map", mine)
                expert_map = index(expert_map)
            return {
                "x": d.normal("x", t, h).to(dtype), "gate": (d.normal("w.gate", experts, h) * 0.2).to(dtype),
                "bias": bias(d, MODES[mode][4], experts), "w13": gate_up(d, "w13", quant, (mine,), i, h, dtype, fmt),
                "w2": down(d, "w2", quant, (mine,), h, i, dtype, fmt),
                "shared13": gate_up(d, "s13", quant, (), i * shared, h, dtype, fmt) if shared else None,
                "shared2": down(d, "s2", quant, (), h, i * shared, dtype, fmt) if shared else None,
                **routing(layout, mode), "expert_map": expert_map,
            }  # fmt: skip

        return arguments

    for name, quant, fmt in SCHEMES:
        for t, layout, mode, shared, local in ((9, "tiny", "noaux", 1, False), (5, "odd", "softmax", 2, False),
                                               (1, "tiny", "negative", 1, False), (7, "tiny", "raw", 0, True)):  # fmt: skip
            size: Size = "quick" if quant in ("none", "fp8-w8a8") and t in (9, 7) else "small"
            if quant not in ("none", "fp8-w8a8") and t == 5:
                continue
            text = f"{name}/{layout}-{mode}-t{t}-shared{shared}{'-half' if local else ''}"
            yield from each("moe", text, make(t, layout, mode, quant, fmt, shared, local), size)
    for t, layout, mode, shared, local in (
        (7, "tiny", "noaux", 1, True), (6, "tiny", "greedy", 1, False), (6, "tiny", "softmax-bias", 2, True),
        (5, "lite", "greedy", 2, False), (70, "open", "noaux", 1, False),
    ):  # fmt: skip
        text = f"none/{layout}-{mode}-t{t}-shared{shared}{'-half' if local else ''}"
        yield from each("moe", text, make(t, layout, mode, "none", "float32", shared, local), "quick")
    yield from each("moe", "none/tiny-noaux-t0-shared1", make(0, "tiny", "noaux", "none", "float32", 1, False))
