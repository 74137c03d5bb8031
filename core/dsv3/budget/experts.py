"""Budgets of routing and of the mixture of experts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dsv3.budget.approx import Approx
from dsv3.budget.expectation import Exact, Expectation
from dsv3.budget.routing import Routing
from dsv3.budget.rules import Arguments, against_decomposition, real, rule
from dsv3.budget.units import work_ulp
from dsv3.ops import moe_permute
from dsv3.ops.experts import expert_weight
from dsv3.plugin import Prepared

_PARTS = ("n_group", "topk_group", "topk", "score", "group_score", "renormalize", "scale")
_ROUTING = (
    "the chosen experts as sets: one that differs is legal only where its float64 score is within the error of the other's "
    "(near-tie rule); weights within the errors of the scores, for the experts that were chosen"
)


def _routing(logits: Approx, a: Arguments) -> Routing:
    return Routing("weights", logits.value, logits.radius, a["bias"], w=logits.w, **{p: a[p] for p in _PARTS})


@rule("grouped_topk", text=f"{_ROUTING}.")
def grouped_topk(a: Arguments, n: str) -> list[Expectation]:
    return [_routing(Approx.of(a["logits"]), a)]


@rule("route", text=f"{_ROUTING}; the scores err as the logits do.")
def route(a: Arguments, n: str) -> list[Expectation]:
    return [_routing(Approx.of(a["x"]).product(a["gate"], n), a)]


@rule("moe_permute", text="exact.")
def permute(a: Arguments, n: str) -> list[Expectation]:
    perm, offsets = moe_permute(a["ids"], a["n_experts"])
    return [Exact("perm", 0, perm), Exact("offsets", 1, offsets)]


@rule("moe_combine", text="u |y| + (k + 1) 2^-24 sum |w_j y_j|.")
def moe_combine(a: Arguments, n: str) -> list[Expectation]:
    perm, weights = a["perm"].to(torch.int64), a["weights"].to(torch.float64)
    t, k = weights.shape
    y = a["y"].to(torch.float64)
    value = torch.zeros(t, y.shape[1], dtype=torch.float64)
    spread, squares = torch.zeros_like(value), torch.zeros_like(value)
    rows = torch.nonzero(perm >= 0)[:, 0]
    pairs = perm[rows]
    terms = weights.flatten()[pairs][:, None] * y[rows]
    value.index_add_(0, pairs // max(k, 1), terms)
    spread.index_add_(0, pairs // max(k, 1), terms.abs())
    squares.index_add_(0, pairs // max(k, 1), terms.square())
    made = Approx(value, (k + 1) * work_ulp(a["y"].dtype) * spread, a["y"].dtype)
    return [real("out", 0, made, a["y"].dtype, n, spread=spread, squares=squares)]


def mlp(x: Approx, w13: Prepared, w2: Prepared, n: str) -> Approx:
    """down(silu(gate x) * (up x)), with what is between the steps kept in 16 bits or not."""
    return x.through(w13, n).stored().silu_mul().stored().through(w2, n).stored()


def experts(x: Approx, weights: Approx, ids: Tensor, w13: Prepared, w2: Prepared, n: str) -> Approx:
    """The routed experts' sum for each token."""
    value, radius, variance = (torch.zeros_like(x.value[:, : w2.shape[1]]) for _ in range(3))
    for e in range(w13.shape[0]):
        tokens, slot = torch.nonzero(ids == e, as_tuple=True)
        if tokens.numel() == 0:
            continue
        y = mlp(x.rows(tokens), expert_weight(w13, e), expert_weight(w2, e), n)
        w, rw = weights.value[tokens, slot][:, None], weights.radius[tokens, slot][:, None]
        value.index_add_(0, tokens, w * y.value)
        error = w.abs() * y.radius + rw * y.value.abs() + (ids.shape[1] + 1) * x.w * (w * y.value).abs()
        radius.index_add_(0, tokens, error)
        variance.index_add_(0, tokens, (w * y.loose).square())
    return Approx(value, radius, x.dtype, variance.sqrt())


@rule(
    "fused_experts",
    text="u |y| + the errors of both products through the chain, with intermediates in 16 bits or not (4 times the root of "
    "their squares), or 4 times (per row) what the decomposition errs at the same dtypes, whichever is larger.",
)
def fused_experts(a: Arguments, n: str) -> list[Expectation]:
    x = Approx.of(a["x"])
    weights = Approx.of(a["weights"])
    ids = torch.where((a["ids"] < 0) | (a["ids"] >= a["w13"].shape[0]), -1, a["ids"].to(torch.int64))
    made = experts(x, weights, ids, a["w13"], a["w2"], n)
    return against_decomposition("fused_experts", a, [real("y", 0, made.settled(), a["x"].dtype, n)], n, always=True)


@rule("moe", text="that of fused_experts plus the shared experts; rows whose routing is a near tie are not judged.")
def moe(a: Arguments, n: str) -> list[Expectation]:
    x = Approx.of(a["x"])
    routing = _routing(x.product(a["gate"], n), a)
    assert routing.tolerance is not None
    ids: Any = routing.ids.to(torch.int64)
    if a["expert_map"] is not None:
        ids = a["expert_map"].to(torch.int64)[ids]
    made = experts(x, Approx(routing.reference, routing.tolerance, x.dtype), ids, a["w13"], a["w2"], n)
    if a["shared13"] is not None and a["shared2"] is not None:
        made, shared = made.stored(), mlp(x, a["shared13"], a["shared2"], n)
        radius = made.radius + shared.radius + x.w * made.value.abs()
        made = Approx(made.value + shared.value, radius, x.dtype, torch.hypot(made.loose, shared.loose))
    skip = routing.near_ties()[:, None] if a["x"].shape[0] else None
    return against_decomposition("moe", a, [real("y", 0, made.settled(), a["x"].dtype, n, skip)], n, always=True)
