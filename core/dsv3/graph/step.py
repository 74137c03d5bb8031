"""The metadata of one step: a flat batch of tokens of several sequences."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(slots=True)
class Step:
    """Index tensors are int32 on the device; sizes are host integers.

    ids, positions, slots [T]; block_table [S, maxp]; seq_lens [S] cached tokens per sequence, this step's included,
    counting the `start` empty slots before the first; cu_q [S+1] bounds of the sequences in the batch; cu_k [S+1]
    bounds of their cached rows; max_q, max_k, total_k; bucket: which of the bound kernels to use; bucket_k: which for
    what has a row per cached key; absorbed: attend over the latent cache itself (few queries) instead of expanded keys
    and values (many). parts: where a step has both kinds, a step for the first rows and one for the rest, by which attention
    goes; of the step itself, ids and bucket are then all that is used.
    """

    ids: Tensor
    positions: Tensor
    slots: Tensor
    block_table: Tensor
    seq_lens: Tensor
    cu_q: Tensor
    cu_k: Tensor
    max_q: int
    max_k: int
    total_k: int
    bucket: int
    bucket_k: int
    absorbed: bool
    start: int = 0
    parts: tuple[Step, ...] = ()
