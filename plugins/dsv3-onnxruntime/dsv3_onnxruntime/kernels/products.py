"""The linear family: plain, prepared, batched over heads, the router's, the MTP module's."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv3.plugin import Prepared
from dsv3_onnxruntime.emit import weights
from dsv3_onnxruntime.emit.elementwise import rms_norm
from dsv3_onnxruntime.emit.quantise import BLOCK
from dsv3_onnxruntime.graph import Graph
from dsv3_onnxruntime.session import run


def weight_of(w: Prepared) -> weights.Weight:
    """The facts about a prepared weight that its model is specialised on."""
    if w.layout != "canonical":
        raise ValueError(f"backend 'onnxruntime' reads canonical weights; this one has layout {w.layout!r}")
    n, k = w.shape[-2:]
    return weights.Weight(w.quant, n % BLOCK, k % BLOCK, w.scale_fmt)


def tensors_of(name: str, w: Prepared) -> dict[str, Tensor | None]:
    """A prepared weight's tensors as the inputs `name` and `name`_scale."""
    return {name: w.tensors["weight"], f"{name}_scale": w.tensors.get("scale")}


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, provider: str = "cpu") -> Tensor:
    y = x.new_empty(x.shape[0], weight.shape[0])
    run("linear", _linear, {"x": x, "weight": weight, "bias": bias}, {"y": y}, provider)
    return y


def _linear(g: Graph) -> None:
    bias = (g.real("bias"),) if g.has("bias") else ()
    g.give("y", g.op("Gemm", g.real("x"), g.real("weight"), *bias, transB=1))


def router_gemm(x: Tensor, weight: Tensor, *, provider: str = "cpu") -> Tensor:
    y = x.new_empty(x.shape[0], weight.shape[0], dtype=torch.float32)
    run("linear", _linear, {"x": x, "weight": weight}, {"y": y}, provider)
    return y


def quant_linear(x: Tensor, w: Prepared, *, provider: str = "cpu") -> Tensor:
    y = x.new_empty(x.shape[0], w.shape[0])
    run("quant_linear", _quant_linear, {"x": x, **tensors_of("w", w)}, {"y": y}, provider, w=weight_of(w))
    return y


def _quant_linear(g: Graph, w: weights.Weight) -> None:
    scale = "w_scale" if g.has("w_scale") else None
    g.give("y", weights.product(g, g.real("x"), w, "w", scale, g.types["w"][0]))


def bmm(x: Tensor, weight: Tensor, *, provider: str = "cpu") -> Tensor:
    y = x.new_empty(x.shape[0], x.shape[1], weight.shape[2])
    run("bmm", _bmm, {"x": x, "weight": weight}, {"y": y}, provider)
    return y


def _bmm(g: Graph) -> None:
    by_head = g.op("Transpose", g.real("x"), perm=[1, 0, 2])
    g.give("y", g.op("Transpose", g.op("MatMul", by_head, g.real("weight")), perm=[1, 0, 2]))


def mtp_combine(
    embedding: Tensor,
    hidden: Tensor,
    enorm: Tensor,
    hnorm: Tensor,
    eh_proj: Tensor,
    eps: float,
    *,
    provider: str = "cpu",
) -> Tensor:
    y = embedding.new_empty(hidden.shape)
    inputs = {"embedding": embedding, "hidden": hidden, "enorm": enorm, "hnorm": hnorm, "eh_proj": eh_proj}
    run("mtp_combine", _mtp_combine, inputs, {"y": y}, provider, eps=eps)
    return y


def _mtp_combine(g: Graph, eps: float) -> None:
    first = rms_norm(g, g.real("embedding"), g.real("enorm"), eps)
    second = rms_norm(g, g.real("hidden"), g.real("hnorm"), eps)
    g.give("y", g.op("Gemm", g.op("Concat", first, second, axis=1), g.real("eh_proj"), transB=1))
