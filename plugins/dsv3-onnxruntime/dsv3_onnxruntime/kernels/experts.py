"""The mixture of experts, whole and one product at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv3.plugin import Prepared
from dsv3_onnxruntime.emit import experts
from dsv3_onnxruntime.kernels.products import tensors_of, weight_of
from dsv3_onnxruntime.session import run


def fused_experts(x: Tensor, weights: Tensor, ids: Tensor, w13: Prepared, w2: Prepared, *, provider: str = "cpu") -> Tensor:
    y = x.new_empty(x.shape)
    inputs = {"x": x, "weights": weights, "ids": ids, **tensors_of("w13", w13), **tensors_of("w2", w2)}
    run("fused_experts", experts.fused_experts, inputs, {"y": y}, provider, w13=weight_of(w13), w2=weight_of(w2))
    return y


def grouped_linear(x: Tensor, w: Prepared, offsets: Tensor, *, provider: str = "cpu") -> Tensor:
    y = x.new_empty(x.shape[0], w.shape[1])
    inputs = {"x": x, "offsets": offsets, "n": offsets.new_tensor([w.shape[1]], dtype=torch.int64), **tensors_of("w", w)}
    run("grouped_linear", experts.grouped_linear, inputs, {"y": y}, provider, w=weight_of(w))
    return y
