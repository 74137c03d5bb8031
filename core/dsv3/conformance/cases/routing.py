"""Cases of the router."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from dsv3.conformance.case import Case, Make, Setting, each
from dsv3.conformance.data import Data
from dsv3.conformance.result import Size

# name: experts, groups, kept groups, k
LAYOUTS: dict[str, tuple[int, int, int, int]] = {
    "v3": (256, 8, 4, 8), "tiny": (16, 4, 2, 3), "lite": (64, 1, 1, 6), "v2": (160, 8, 3, 6), "k1": (24, 4, 1, 1),
    "all": (12, 1, 1, 12), "odd": (9, 3, 2, 2), "kimi": (384, 1, 1, 8),
}  # fmt: skip
# name: score, group_score, renormalize, scale, bias
MODES: dict[str, tuple[str, str, bool, float, str]] = {
    "noaux": ("sigmoid", "top2_sum", True, 2.5, "normal"), "negative": ("sigmoid", "top2_sum", True, 2.5, "negative"),
    "wide": ("sigmoid", "top2_sum", True, 1.0, "wide"), "raw": ("sigmoid", "top2_sum", False, 2.5, "normal"),
    "nobias": ("sigmoid", "top2_sum", True, 1.0, "none"), "greedy": ("softmax", "max", False, 16.0, "none"),
    "softmax": ("softmax", "max", True, 1.0, "none"), "softmax-bias": ("softmax", "top2_sum", False, 2.5, "small"),
}  # fmt: skip


def cases() -> Iterator[Case]:
    yield from _topk()
    yield from _route()


def bias(d: Data, kind: str, experts: int) -> torch.Tensor | None:
    """Router biases f32 [E]: "negative" around -3, so that a masked group at 0 would win; "wide" outweighs the scores."""
    x = d.normal("bias", experts)
    made = {"normal": x * 0.2, "negative": x * 0.3 - 3, "wide": x * 3, "small": x * 0.01}
    return made.get(kind)


def routing(layout: str, mode: str) -> dict[str, Any]:
    """The host arguments of grouped_topk."""
    _, groups, kept, k = LAYOUTS[layout]
    score, group_score, renormalize, scale, _ = MODES[mode]
    return {
        "n_group": groups, "topk_group": kept, "topk": k, "score": score, "group_score": group_score,
        "renormalize": renormalize, "scale": scale,
    }  # fmt: skip


def _applies(layout: str, mode: str) -> bool:
    experts, groups, _, _ = LAYOUTS[layout]
    return MODES[mode][1] == "max" or experts // groups >= 2


def _topk() -> Iterator[Case]:
    def make(t: int, layout: str, mode: str, kind: str) -> Make:
        def arguments(d: Data, dtype: torch.dtype, s: Setting) -> dict[str, Any]:
            experts = LAYOUTS[layout][0]
            logits = d.normal("logits", t, experts) * 2
            if kind == "huge":
                logits = d.normal("logits", t, experts) * 1e4
            if kind == "equal":
                logits = logits * 0 + 0.5
            if kind == "close":  # differ where bf16 cannot tell
                logits = 1 + d.permutation("logits", t * experts).view(t, experts).float() * 2.0**-14
            if kind == "negative":
                logits = logits - 12
            return {"logits": logits, "bias": bias(d, MODES[mode][4], experts), **routing(layout, mode)}

        return arguments

    for layout in LAYOUTS:
        for mode in MODES:
            if _applies(layout, mode):
                size: Size = "quick" if layout in ("v3", "tiny", "lite") else "small"
                yield from each("grouped_topk", f"{layout}-{mode}/t33/normal", make(33, layout, mode, "normal"), size, ("f32",))
    for t, size in ((0, "quick"), (1, "quick"), (2, "small"), (129, "small"), (4097, "full")):
        yield from each("grouped_topk", f"v3-noaux/t{t}/normal", make(t, "v3", "noaux", "normal"), size, ("f32",))
    for kind in ("huge", "equal", "close", "negative"):
        for mode in ("noaux", "nobias", "greedy", "negative"):
            yield from each("grouped_topk", f"tiny-{mode}/t9/{kind}", make(9, "tiny", mode, kind), "quick", ("f32",))


def _route() -> Iterator[Case]:
    def make(t: int, width: int, layout: str, mode: str, kind: str = "normal") -> Make:
        def arguments(d: Data, dtype: torch.dtype, s: Setting) -> dict[str, Any]:
            experts = LAYOUTS[layout][0]
            gate = (d.normal("w.gate", experts, width) * (2 / width**0.5)).to(dtype)
            return {
                "x": d.real("x", kind, t, width).to(dtype), "gate": gate, "bias": bias(d, MODES[mode][4], experts),
                **routing(layout, mode),
            }  # fmt: skip

        return arguments

    for layout, mode in (("v3", "noaux"), ("tiny", "negative"), ("lite", "greedy"), ("v2", "softmax"), ("tiny", "raw"),
                         ("kimi", "noaux"), ("all", "wide"), ("odd", "nobias")):  # fmt: skip
        size: Size = "quick" if layout in ("v3", "tiny", "lite") else "small"
        yield from each("route", f"{layout}-{mode}/t17-h100", make(17, 100, layout, mode), size)
    for t in (0, 1, 65):
        yield from each("route", f"tiny-noaux/t{t}-h64", make(t, 64, "tiny", "noaux"))
    yield from each("route", "v3-noaux/t9-h129/outliers", make(9, 129, "v3", "noaux", "outliers"))
    yield from each("route", "v3-noaux/t5-h7168", make(5, 7168, "v3", "noaux"), "full")
