"""Which experts a token goes to."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dsv3.errors import OperatorError
from dsv3.ops.norm import work_dtype
from dsv3.ops.spec import composite, primitive


@primitive("logits[T,E]:f32 bias[E]:f32? k=topk -> weights[T,k]:f32 ids[T,k]:i32")
def grouped_topk(
    logits: Tensor,
    bias: Tensor | None,
    n_group: int,
    topk_group: int,
    topk: int,
    score: str = "sigmoid",
    group_score: str = "top2_sum",
    renormalize: bool = True,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Choose topk experts out of the best topk_group groups, and weigh them.

    logits f32 [T, E], bias f32 [E] or None -> weights f32 [T, topk], ids i32 [T, topk], in any order. score: "sigmoid" or
    "softmax" of the logits. The bias takes part in choosing only; weights are the unbiased scores, divided by their sum
    (+ 1e-20) if renormalize, times scale. A group's score is the sum of its two best biased scores ("top2_sum") or its best
    ("max"); experts of other groups are masked with -inf, so a negative bias cannot bring them back. Ties go to the lower id.
    n_group 1 means no grouping. Source: DeepSeek-V3 technical report, equations 12 to 16; DeepSeek-V2 report, 2.2.2.

    Invariants:
    - ids of a token are distinct, and lie in at most topk_group groups
    - adding one number to the whole bias changes nothing but for rounding
    - with renormalize the weights of a token sum to scale
    """
    t, e = logits.shape
    _check_routing(e, n_group, topk_group, topk, score, group_score)
    work = logits.to(work_dtype(logits))
    scores = torch.sigmoid(work) if score == "sigmoid" else torch.softmax(work, dim=-1)
    choice = scores if bias is None else scores + bias.to(scores.dtype)
    if n_group > 1:
        grouped = choice.view(t, n_group, e // n_group)
        best = grouped.amax(dim=-1) if group_score == "max" else grouped.topk(2, dim=-1).values.sum(dim=-1)
        kept = _first(best, topk_group)
        mask = torch.ones_like(best, dtype=torch.bool).scatter_(1, kept, False)
        choice = grouped.masked_fill(mask[..., None], float("-inf")).view(t, e)
    ids = _first(choice, topk)
    weights = scores.gather(1, ids)
    if renormalize:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
    return weights * scale, ids.to(torch.int32)


def _first(values: Tensor, k: int) -> Tensor:
    """Indices of the k largest per row; a stable sort, because torch.topk leaves ties unspecified."""
    return torch.sort(values, dim=-1, descending=True, stable=True).indices[:, :k]


def _check_routing(e: int, n_group: int, topk_group: int, topk: int, score: str, group_score: str) -> None:
    if score not in ("sigmoid", "softmax"):
        raise OperatorError(f"grouped_topk: score {score!r} is neither 'sigmoid' nor 'softmax'")
    if group_score not in ("top2_sum", "max"):
        raise OperatorError(f"grouped_topk: group_score {group_score!r} is neither 'top2_sum' nor 'max'")
    if n_group < 1 or e % n_group or not 1 <= topk_group <= n_group:
        raise OperatorError(f"grouped_topk: {e} experts do not split into {n_group} groups of which {topk_group} are kept")
    if not 1 <= topk <= e // n_group * topk_group:
        raise OperatorError(
            f"grouped_topk: topk {topk} of {e // n_group * topk_group} experts ({topk_group} groups of {e // n_group})"
        )
    if n_group > 1 and group_score == "top2_sum" and e // n_group < 2:
        raise OperatorError(f"grouped_topk: group_score 'top2_sum' needs 2 experts a group; there is {e // n_group}")


@composite("x[T,H] gate[E,H] bias[E]:f32? k=topk -> weights[T,k]:f32 ids[T,k]:i32")
def route(
    ops: Any,
    x: Tensor,
    gate: Tensor,
    bias: Tensor | None,
    n_group: int,
    topk_group: int,
    topk: int,
    score: str,
    group_score: str,
    renormalize: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """grouped_topk(router_gemm(x, gate), bias, ...): the whole router.

    Invariants:
    - equal to its two parts called one after the other
    """
    return ops.grouped_topk(
        logits=ops.router_gemm(x=x, weight=gate),
        bias=bias,
        n_group=n_group,
        topk_group=topk_group,
        topk=topk,
        score=score,
        group_score=group_score,
        renormalize=renormalize,
        scale=scale,
    )
