"""Quantisation of activations, dequantisation of weights, products of quantised operands."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv3_onnxruntime.emit import quantise, weights
from dsv3_onnxruntime.emit.quantise import BLOCK
from dsv3_onnxruntime.graph import FLOAT, Graph
from dsv3_onnxruntime.session import run


def act_quant(
    x: Tensor,
    group: int = 128,
    dtype: str = "float8_e4m3fn",
    scale_fmt: str = "float32",
    amax_floor: float = 1e-4,
    *,
    provider: str = "cpu",
) -> tuple[Tensor, Tensor]:
    t, k = x.shape
    q = x.new_empty(t, k, dtype=getattr(torch, dtype))
    scale = x.new_empty(t, -(-k // group), dtype=torch.float32)
    facts = {"group": group, "padding": -k % group, "scale_fmt": scale_fmt, "floor": amax_floor}
    run("act_quant", _act_quant, {"x": x}, {"q": q, "scale": scale}, provider, **facts)
    return q, scale


def _act_quant(g: Graph, group: int, padding: int, scale_fmt: str, floor: float) -> None:
    q, scale = quantise.fp8(g, g.real("x"), g.outputs["q"], group, padding, scale_fmt, floor)
    g.give("q", q)
    g.give("scale", scale)


def quant_int8(x: Tensor, amax_floor: float = 1e-10, *, provider: str = "cpu") -> tuple[Tensor, Tensor]:
    q = x.new_empty(x.shape, dtype=torch.int8)
    scale = x.new_empty(x.shape[0], 1, dtype=torch.float32)
    run("quant_int8", _quant_int8, {"x": x}, {"q": q, "scale": scale}, provider, floor=amax_floor)
    return q, scale


def _quant_int8(g: Graph, floor: float) -> None:
    q, scale = quantise.int8(g, g.real("x"), floor)
    g.give("q", q)
    g.give("scale", scale)


def dequant_block(weight: Tensor, scale: Tensor, dtype: str = "bfloat16", *, provider: str = "cpu") -> Tensor:
    n, k = weight.shape
    y = weight.new_empty(n, k, dtype=getattr(torch, dtype))
    ragged = {"ragged_n": bool(n % BLOCK), "ragged_k": bool(k % BLOCK)}
    run("dequant_block", _dequant_block, {"weight": weight, "scale": scale}, {"y": y}, provider, **ragged)
    return y


def _dequant_block(g: Graph, ragged_n: bool, ragged_k: bool) -> None:
    g.give("y", weights.fp8_blocks(g, g.cast("weight", FLOAT), g.real("scale"), ragged_n, ragged_k))


def block_scaled_mm(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, out_dtype: str, *, provider: str = "cpu") -> Tensor:
    (t, k), n = a.shape, b.shape[0]
    y = a.new_empty(t, n, dtype=getattr(torch, out_dtype))
    inputs = {"a": a, "a_scale": a_scale, "b": b, "b_scale": b_scale}
    run("block_scaled_mm", _block_scaled_mm, inputs, {"y": y}, provider, ragged_n=n % BLOCK, ragged_k=k % BLOCK)
    return y


def _block_scaled_mm(g: Graph, ragged_n: int, ragged_k: int) -> None:
    x = weights.columns(g, g.cast("a", FLOAT), g.real("a_scale"), -ragged_k % BLOCK)
    w = weights.fp8_blocks(g, g.cast("b", FLOAT), g.real("b_scale"), bool(ragged_n), bool(ragged_k))
    g.give("y", g.op("Gemm", x, w, transB=1))


def int8_scaled_mm(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, out_dtype: str, *, provider: str = "cpu") -> Tensor:
    y = a.new_empty(a.shape[0], b.shape[0], dtype=getattr(torch, out_dtype))
    inputs = {"a": a, "a_scale": a_scale, "b": b, "b_scale": b_scale}
    run("int8_scaled_mm", _int8_scaled_mm, inputs, {"y": y}, provider)
    return y


def _int8_scaled_mm(g: Graph) -> None:
    g.give("y", weights.int8_product(g, "a", g.real("a_scale"), "b", g.real("b_scale")))
