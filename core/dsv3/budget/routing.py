"""Chosen experts and their weights: sets, not order; near ties are legal either way."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dsv3.budget.expectation import Expectation, Finding, combine, within, wrong


@dataclass
class Routing(Expectation):
    """weights [T, k] and ids [T, k] for logits known within a radius, float64 [T, E].

    A differing expert is legal only where its float64 score is within the error of the scores of the one it replaces (the
    near-tie rule); weights are compared for the experts that were chosen.
    """

    name: str
    logits: Tensor
    radius: Tensor
    bias: Tensor | None
    n_group: int
    topk_group: int
    topk: int
    score: str
    group_score: str
    renormalize: bool
    scale: float
    w: float

    def __post_init__(self) -> None:
        x = self.logits
        if self.score == "sigmoid":
            self.scores = torch.sigmoid(x)
            slope = self.scores * (1 - self.scores)
            self.error = slope * self.radius + self.scores * (8 + 2 * x.abs()) * self.w
        else:
            self.scores = torch.softmax(x, dim=-1)
            spread = x.amax(dim=-1, keepdim=True) - x if x.shape[1] else x
            own = self.radius + (8 + 2 * spread + math.sqrt(max(x.shape[1], 1))) * self.w
            self.error = self.scores * (own + (self.scores * self.radius).sum(dim=-1, keepdim=True))
        self.choice = self.scores if self.bias is None else self.scores + self.bias.to(torch.float64)
        self.choice_error = self.error + 2 * self.w * self.choice.abs() + 2.0**-125
        from dsv3.ops import grouped_topk

        self.reference, self.ids = grouped_topk(
            x, self.bias, self.n_group, self.topk_group, self.topk, self.score, self.group_score, self.renormalize, self.scale
        )
        self.tolerance = self._weight_error(self.ids.to(torch.int64), self.reference)

    def near_ties(self) -> Tensor:
        """Rows [T] in which another set of experts would be legal too: some unchosen expert is as good as the worst chosen."""
        kept = self._kept()
        choice = torch.where(kept, self.choice, torch.full_like(self.choice, -math.inf))
        chosen = torch.zeros_like(kept).scatter_(1, self.ids.to(torch.int64), True)
        worst = torch.where(chosen, choice - self.choice_error, torch.full_like(choice, math.inf)).amin(dim=-1)
        rest = torch.where(~chosen & kept, choice + self.choice_error, torch.full_like(choice, -math.inf)).amax(dim=-1)
        unsure = rest >= worst
        if self.n_group > 1:
            value, error = self._groups()
            best = value.topk(self.topk_group, dim=-1).values[:, -1:]
            unsure = unsure | (((value - best).abs() <= error * 2).sum(dim=-1) > 1)
        return unsure

    def _groups(self) -> tuple[Tensor, Tensor]:
        """Score and error of each group, [T, n_group]."""
        t = self.choice.shape[0]
        width = self.choice.shape[1] // self.n_group
        grouped, error = (v.view(t, self.n_group, width) for v in (self.choice, self.choice_error))
        two = 1 if self.group_score == "max" else 2
        value = grouped.topk(two, dim=-1).values.sum(dim=-1)
        return value, two * error.amax(dim=-1) + 2 * self.w * value.abs()

    def _kept(self) -> Tensor:
        """Experts [T, E] of groups that are kept, or might be."""
        if self.n_group == 1:
            return torch.ones_like(self.choice, dtype=torch.bool)
        value, error = self._groups()
        ordered = value.topk(min(self.topk_group + 1, self.n_group), dim=-1)
        threshold = ordered.values[:, self.topk_group - 1 : self.topk_group]
        slack = 2 * error.gather(1, ordered.indices).amax(dim=-1, keepdim=True)
        return (value >= threshold - slack).repeat_interleave(self.choice.shape[1] // self.n_group, dim=-1)

    def check(self, outputs: Sequence[Any]) -> Finding:
        weights, ids = outputs[0], outputs[1].to(torch.int64)
        experts = self.choice.shape[1]
        for t in range(ids.shape[0]):
            row = ids[t].tolist()
            outside = [i for i in row if not 0 <= i < experts]
            if outside or len(set(row)) < len(row):
                return wrong("ids", [t], sorted(self.ids[t].tolist()), row, "ids are distinct and inside [0, E)")
        if mistake := self._sets(ids):
            return mistake
        reference = self.scores.gather(1, ids)
        if self.renormalize:
            reference = reference / (reference.sum(dim=-1, keepdim=True) + 1e-20)
        reference = reference * self.scale
        found = within("weights", weights, reference, self._weight_error(ids, reference))
        return combine([found])

    def _weight_error(self, ids: Tensor, weights: Tensor) -> Tensor:
        scores, error = self.scores.gather(1, ids), self.error.gather(1, ids)
        own = error * abs(self.scale) + 8 * self.w * weights.abs() + 2.0**-125 * abs(self.scale)
        if not self.renormalize:
            return own
        total = scores.sum(dim=-1, keepdim=True) + 1e-20
        drift = (error.sum(dim=-1, keepdim=True) + 2.0**-125) / total
        return (
            error / total * abs(self.scale)
            + weights.abs() * drift
            + 10 * self.w * weights.abs()
            + 2.0**-105 * abs(self.scale) / total.clamp_max(1)
        )

    def _sets(self, ids: Tensor) -> Finding | None:
        """Every chosen expert is at least as good as every other that might be kept, within both errors; its group is kept."""
        kept = self._kept()
        chosen = torch.zeros_like(kept).scatter_(1, ids, True)
        bad_group = (chosen & ~kept).any(dim=-1)
        if self.n_group > 1:
            per_group = chosen.view(ids.shape[0], self.n_group, chosen.shape[1] // self.n_group).any(dim=-1)
            bad_group = bad_group | (per_group.sum(dim=-1) > self.topk_group)
            sure = self._sure_groups().repeat_interleave(self.choice.shape[1] // self.n_group, dim=-1) | (
                per_group.repeat_interleave(self.choice.shape[1] // self.n_group, dim=-1)
            )
        else:
            sure = kept
        low = torch.where(chosen, self.choice + self.choice_error, torch.full_like(self.choice, math.inf)).amin(dim=-1)
        rest = torch.where(~chosen & sure, self.choice - self.choice_error, torch.full_like(self.choice, -math.inf)).amax(
            dim=-1
        )
        bad = bad_group | (low < rest)
        if not bool(bad.any()):
            return None
        t = int(bad.to(torch.int8).argmax())
        why = "an expert of a masked group" if bool(bad_group[t]) else "a better expert was left out"
        return wrong(
            "ids", [t], sorted(self.ids[t].tolist()), sorted(ids[t].tolist()), f"{why}; {int(bad.sum())} rows are wrong"
        )

    def _sure_groups(self) -> Tensor:
        """Groups [T, n_group] that are kept whatever the errors."""
        value, error = self._groups()
        if self.topk_group == self.n_group:
            return torch.ones_like(value, dtype=torch.bool)
        ordered = value.topk(self.topk_group + 1, dim=-1)
        next_best = ordered.values[:, -1:] + 2 * error.gather(1, ordered.indices).amax(dim=-1, keepdim=True)
        return value > next_best


@dataclass
class Sampled(Expectation):
    """Token ids: the largest perturbed logit, or one that float64 cannot tell from it; the lowest id for temperature 0."""

    name: str
    scores: Tensor
    greedy: Tensor
    reference: Tensor
    slack: float = 1e-6

    def check(self, outputs: Sequence[Any]) -> Finding:
        ids = outputs[0].to(torch.int64)
        if ids.numel() == 0:
            return Finding()
        vocab = self.scores.shape[1]
        inside = (ids >= 0) & (ids < vocab)
        best = self.scores.amax(dim=-1)
        taken = self.scores.gather(1, ids.clamp(0, vocab - 1)[:, None])[:, 0]
        near = taken >= best - self.slack * best.abs().clamp_min(1)
        right = inside & torch.where(self.greedy, ids == self.reference, near | (ids == self.reference))
        if bool(right.all()):
            return Finding()
        s = int((~right).to(torch.int8).argmax())
        return wrong("ids", [s], int(self.reference[s]), int(ids[s]), f"{int((~right).sum())} of {ids.numel()} rows are wrong")
