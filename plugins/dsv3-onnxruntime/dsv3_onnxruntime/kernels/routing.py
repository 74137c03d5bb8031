"""The router, from logits or from hidden states."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv3_onnxruntime.emit import routing
from dsv3_onnxruntime.graph import Graph
from dsv3_onnxruntime.session import run


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
    *,
    provider: str = "cpu",
) -> tuple[Tensor, Tensor]:
    outputs = _outputs(logits, topk)
    run(
        "grouped_topk", _grouped_topk, {"logits": logits, "bias": bias}, outputs, provider,
        n_group=n_group, topk_group=topk_group, topk=topk, score=score, group_score=group_score,
        renormalize=renormalize, scale=scale,
    )  # fmt: skip
    return outputs["weights"], outputs["ids"]


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
    *,
    provider: str = "cpu",
) -> tuple[Tensor, Tensor]:
    outputs = _outputs(x, topk)
    run(
        "route", _route, {"x": x, "gate": gate, "bias": bias}, outputs, provider,
        n_group=n_group, topk_group=topk_group, topk=topk, score=score, group_score=group_score,
        renormalize=renormalize, scale=scale,
    )  # fmt: skip
    return outputs["weights"], outputs["ids"]


def _outputs(rows: Tensor, topk: int) -> dict[str, Tensor]:
    shape = (rows.shape[0], topk)
    return {"weights": rows.new_empty(shape, dtype=torch.float32), "ids": rows.new_empty(shape, dtype=torch.int32)}


def _route(g: Graph, **how: int | float | str | bool) -> None:
    _choose(g, g.op("Gemm", g.real("x"), g.real("gate"), transB=1), **how)


def _grouped_topk(g: Graph, **how: int | float | str | bool) -> None:
    _choose(g, g.real("logits"), **how)


def _choose(g: Graph, logits: str, **how: int | float | str | bool) -> None:
    bias = g.real("bias") if g.has("bias") else None
    weights, ids = routing.grouped_topk(g, logits, bias, **how)  # type: ignore[arg-type]
    g.give("weights", weights)
    g.give("ids", ids)
