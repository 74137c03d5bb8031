"""The kernels. Torch tensors in and out; NumPy in between, on the same memory."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dsv3.plugin import Prepared


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    v = x.numpy()
    scale = 1.0 / np.sqrt(np.mean(np.square(v), axis=-1, keepdims=True) + np.float32(eps))
    return torch.from_numpy(v * scale * weight.numpy())


def silu_mul(x: Tensor) -> Tensor:
    gate, up = np.split(x.numpy(), 2, axis=-1)
    small = np.exp(-np.abs(gate))  # never overflows, whatever the sign
    sigmoid = np.where(gate >= 0, 1.0, small) / (1.0 + small)
    return torch.from_numpy(gate * sigmoid.astype(np.float32) * up)


def router_gemm(x: Tensor, weight: Tensor) -> Tensor:
    return torch.from_numpy(x.numpy() @ weight.float().numpy().T)


def quant_linear(x: Tensor, w: Prepared) -> Tensor:
    return torch.from_numpy(x.numpy() @ w.tensors["weight"].numpy())


def moe_permute(ids: Tensor, n_experts: int) -> tuple[Tensor, Tensor]:
    flat = ids.numpy().reshape(-1)
    key = np.where(flat < 0, n_experts, flat)
    order = np.argsort(key, kind="stable").astype(np.int32)
    bounds = np.searchsorted(key[order], np.arange(n_experts + 1)).astype(np.int32)
    perm = np.where(np.arange(len(order)) < bounds[-1], order, np.int32(-1))
    return torch.from_numpy(perm), torch.from_numpy(bounds)
