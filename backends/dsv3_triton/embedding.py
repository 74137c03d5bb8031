"""Rows of the embedding table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv3_triton.launch import launch


@triton.jit
def embedding_kernel(ids_ptr, table_ptr, y_ptr, V, H, stride, BLOCK: tl.constexpr):
    """One program: BLOCK columns of one token's row. An id outside the table is not read: its row is NaN."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ids = tl.load(ids_ptr + token).to(tl.int64) + tl.zeros([BLOCK], tl.int64)
    inside = (ids >= 0) & (ids < V)
    row = tl.load(table_ptr + ids * stride + column, mask=inside & (column < H), other=float("nan"))
    tl.store(y_ptr + token * H + column, row, mask=column < H)


def embedding(ids: Tensor, table: Tensor, config: Mapping[str, Any]) -> Tensor:
    """`dsv3.ops.embedding`. A device cannot raise for an id outside the table: the row is NaN."""
    width = table.shape[1]
    y = torch.empty(len(ids), width, dtype=table.dtype, device=table.device)
    launch(
        embedding_kernel, (len(ids), triton.cdiv(width, config["BLOCK"])), ids, table, y, table.shape[0], width,
        table.stride(0), BLOCK=config["BLOCK"], num_warps=config["num_warps"],
    )  # fmt: skip
    return y
