"""Both ends of the model, and FP8 weights."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from dsv3 import ops
from dsv3.quant.fp8 import expand_scale


def gumbel_argmax(logits: Tensor, seeds: Tensor, positions: Tensor, temperature: Tensor) -> Tensor:
    """On the host: noise is float64, which an NPU does not have. A row of logits per sequence is little to move."""
    given = {"logits": logits, "seeds": seeds, "positions": positions, "temperature": temperature}
    return ops.gumbel_argmax(**{name: t.cpu() for name, t in given.items()}).to(logits.device)


def dequant_block(weight: Tensor, scale: Tensor, dtype: str = "bfloat16") -> Tensor:
    """By a table of the 256 codes: there is no FP8 arithmetic, so codes are bytes."""
    codes = weight.contiguous().view(torch.uint8).flatten().to(torch.int32)
    values = _table(weight.dtype, weight.device).index_select(0, codes).view(weight.shape)
    return (values * expand_scale(scale.to(torch.float32), *weight.shape)).to(getattr(torch, dtype))


@functools.cache
def _table(encoding: torch.dtype, device: torch.device) -> Tensor:
    return torch.arange(256, dtype=torch.uint8).view(encoding).to(torch.float32).to(device)
