"""Sampling."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv3_cpu.constants import CHUNK
from dsv3_cpu.programs import Kernel
from dsv3_cpu.team import run
from dsv3_cpu.views import CODES, dense, scratch_address

# Work of one token beside a byte read: noise costs two logarithms and ten rounds of multiplications, a maximum next to nothing.
_WORK = 16
_sample = Kernel("sampling.sample")


def gumbel_argmax(logits: Tensor, seeds: Tensor, positions: Tensor, temperature: Tensor) -> Tensor:
    rows, vocabulary = logits.shape
    ids = torch.empty(rows, dtype=torch.int32)
    if not rows:
        return ids
    logits, temperature = dense(logits), dense(temperature if temperature.dtype in CODES else temperature.to(torch.float32))
    seeds, positions = dense(seeds.to(torch.int64)), dense(positions.to(torch.int64))
    chunks = -(-vocabulary // CHUNK)
    size = rows * chunks
    found = scratch_address(4 * size)  # a float64 and an int64 for each chunk
    key = (logits.dtype, temperature.dtype)
    program = _programs.get(key)
    if program is None:
        code, warm = (CODES[dtype] for dtype in key)
        program = _programs[key] = _sample.program(f"{code}:2,i8:1,i8:1,{warm}:1,f8:2,i8:2,i4:1")
    words = (
        logits.data_ptr(), rows, vocabulary, seeds.data_ptr(), rows, positions.data_ptr(), rows, temperature.data_ptr(), rows,
        found, rows, chunks, found + 8 * size, rows, chunks, ids.data_ptr(), rows,
    )  # fmt: skip
    run(program, _WORK * logits.numel(), words)
    return ids


_programs: dict[tuple[torch.dtype, torch.dtype], int] = {}
