"""Sampling."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dsv3_cpu.constants import CHUNK
from dsv3_cpu.programs import Kernel
from dsv3_cpu.views import array

# Work of one token beside a byte read: noise costs two logarithms and ten rounds of multiplications, a maximum next to nothing.
_WORK = 16
_sample = Kernel("sampling.sample")


def gumbel_argmax(logits: Tensor, seeds: Tensor, positions: Tensor, temperature: Tensor) -> Tensor:
    rows, vocabulary = logits.shape
    ids = torch.empty(rows, dtype=torch.int32)
    if rows:
        chunks = -(-vocabulary // CHUNK)
        _sample(
            _WORK * logits.numel(), array(logits), array(seeds.to(torch.int64)), array(positions.to(torch.int64)),
            array(temperature), np.empty((rows, chunks)), np.empty((rows, chunks), np.int64), array(ids),
        )  # fmt: skip
    return ids
