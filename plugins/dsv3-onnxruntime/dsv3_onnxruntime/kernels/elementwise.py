"""Norms, the gated activation, rotary embedding, token embedding."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv3_onnxruntime.emit import elementwise
from dsv3_onnxruntime.graph import FLOAT, Graph
from dsv3_onnxruntime.session import run


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, provider: str = "cpu") -> Tensor:
    y = x.new_empty(x.shape)
    run("rms_norm", _rms_norm, {"x": x, "weight": weight}, {"y": y}, provider, eps=eps)
    return y


def _rms_norm(g: Graph, eps: float) -> None:
    g.give("y", elementwise.rms_norm(g, g.real("x"), g.real("weight"), eps))


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, provider: str = "cpu") -> tuple[Tensor, Tensor]:
    y, total = x.new_empty(x.shape), x.new_empty(x.shape)
    inputs = {"x": x, "residual": residual, "weight": weight}
    run("add_rms_norm", _add_rms_norm, inputs, {"y": y, "total": total}, provider, eps=eps)
    return y, total


def _add_rms_norm(g: Graph, eps: float) -> None:
    total = g.op("Add", g.real("x"), g.real("residual"))
    g.give("total", total)
    rounded = g.cast(g.cast(total, g.outputs["total"]), FLOAT)
    g.give("y", elementwise.rms_norm(g, rounded, g.real("weight"), eps))


def silu_mul(x: Tensor, *, provider: str = "cpu") -> Tensor:
    y = x.new_empty(x.shape[0], x.shape[1] // 2)
    run("silu_mul", _silu_mul, {"x": x}, {"y": y}, provider)
    return y


def _silu_mul(g: Graph) -> None:
    g.give("y", elementwise.silu_mul(g, g.real("x")))


def apply_rope(x: Tensor, positions: Tensor, cos_sin: Tensor, interleaved: bool = True, *, provider: str = "cpu") -> Tensor:
    y = x.new_empty(x.shape)
    inputs = {"x": x, "positions": positions, "cos_sin": cos_sin}
    run("apply_rope", _apply_rope, inputs, {"y": y}, provider, interleaved=interleaved)
    return y


def _apply_rope(g: Graph, interleaved: bool) -> None:
    g.give("y", elementwise.rope(g, g.real("x"), "positions", g.real("cos_sin"), interleaved))


def embedding(ids: Tensor, table: Tensor, *, provider: str = "cpu") -> Tensor:
    """IndexError for an id outside [0, V): ONNX's Gather counts negative ones from the end."""
    y = table.new_empty(ids.shape[0], table.shape[1])
    if ids.numel():
        low, high = (int(bound) for bound in torch.aminmax(ids))
        if low < 0 or high >= table.shape[0]:
            raise IndexError(f"embedding: ids from {low} to {high}; the table has rows 0 to {table.shape[0] - 1}")
    run("embedding", _embedding, {"ids": ids, "table": table}, {"y": y}, provider)
    return y


def _embedding(g: Graph) -> None:
    rows = g.op("Gather", "table", "ids", axis=0)
    g.give("y", g.cast(rows, FLOAT))
