"""Which experts a token goes to."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv3 import ops
from dsv3_ascend import vendor

_MOST_EXPERTS = 2048


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
    """The vendor's where it has what is asked for, which is known on the host; else torch's operators."""
    if logits.shape[0] and fits(logits.shape[1], n_group, score, renormalize):
        given = None if bias is None else bias.to(torch.float32)
        sigmoid, top2 = score == "sigmoid", group_score == "top2_sum"
        return vendor.of(logits).gating_top_k(logits.contiguous(), given, n_group, topk_group, topk, sigmoid, top2, scale)
    return ops.grouped_topk(
        logits=logits, bias=bias, n_group=n_group, topk_group=topk_group, topk=topk, score=score, group_score=group_score,
        renormalize=renormalize, scale=scale,
    )  # fmt: skip


def fits(experts: int, n_group: int, score: str, renormalize: bool) -> bool:
    """The vendor divides by the sum after a sigmoid and never after a softmax, and wants groups of more than two."""
    size = experts // n_group
    padded = -(-size // 32) * 32 * n_group
    return size > 2 and padded <= _MOST_EXPERTS and (score, renormalize) in (("sigmoid", True), ("softmax", False))
