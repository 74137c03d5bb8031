"""Which experts a token goes to."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dsv3_cpu.constants import MAX, SIGMOID, SOFTMAX, TOP2_SUM
from dsv3_cpu.linear import router_gemm
from dsv3_cpu.programs import Kernel
from dsv3_cpu.views import array, kept

SCORES = {"sigmoid": SIGMOID, "softmax": SOFTMAX}
GROUP_SCORES = {"top2_sum": TOP2_SUM, "max": MAX}
_choose = Kernel("routing.choose")


def grouped_topk(
    logits: Tensor,
    bias: Tensor | None,
    n_group: int,
    topk_group: int,
    topk: int,
    score: str,
    group_score: str,
    renormalize: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    t, experts = logits.shape
    weights, ids = torch.empty(t, topk), torch.empty(t, topk, dtype=torch.int32)
    added = np.zeros(experts, np.float32) if bias is None else kept(bias)
    _choose(
        8 * logits.numel(), array(logits), added, n_group, topk_group, SCORES[score], GROUP_SCORES[group_score],
        renormalize, scale, array(weights), array(ids),
    )  # fmt: skip
    return weights, ids


def route(
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
    logits = router_gemm(x, gate)
    return grouped_topk(logits, bias, n_group, topk_group, topk, score, group_score, renormalize, scale)
