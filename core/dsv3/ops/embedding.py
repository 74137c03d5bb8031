"""Token embedding, and the input of a multi-token-prediction module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dsv3.ops.spec import composite, primitive


@primitive("ids[T]:int table[V,H] -> y[T,H]")
def embedding(ids: Tensor, table: Tensor) -> Tensor:
    """y[t] = table[ids[t]]. ids [T], table [V, H] -> [T, H] in table.dtype; IndexError for an id outside [0, V).

    Invariants:
    - rows of the table bit for bit, NaN included
    """
    return table.index_select(0, ids.to(torch.int64))


@composite("embedding[T,H] hidden[T,H] enorm[H] hnorm[H] eh_proj[H,2*H] -> y[T,H]")
def mtp_combine(
    ops: Any, embedding: Tensor, hidden: Tensor, enorm: Tensor, hnorm: Tensor, eh_proj: Tensor, eps: float
) -> Tensor:
    """eh_proj([rms_norm(embedding, enorm) | rms_norm(hidden, hnorm)]): what an MTP block starts from.

    embedding [T, H] of token i + 1, hidden [T, H] of position i after the final norm, eh_proj [H, 2H] -> [T, H]. The
    embedding comes first, as in the released weights (the technical report's equation 21 writes it second).

    Invariants:
    - position 0 is not zeroed
    - permuting tokens permutes y
    """
    width = hidden.shape[1]
    both = hidden.new_empty(hidden.shape[0], 2 * width)
    both[:, :width] = ops.rms_norm(x=embedding, weight=enorm, eps=eps)
    both[:, width:] = ops.rms_norm(x=hidden, weight=hnorm, eps=eps)
    return ops.linear(x=both, weight=eh_proj, bias=None)
