"""The paged latent cache of a batch of sequences, and the steps that run over it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dsv3.graph.config import ModelConfig
from dsv3.graph.step import Step
from dsv3.plugin import CacheSpec, KvDType, LatentCache
from dsv3.quant.fp8 import blocks


def allocate_planes(
    c: ModelConfig, pages: int, page_size: int, kv_dtype: KvDType, dtype: torch.dtype, device: torch.device
) -> LatentCache:
    """One layer's cache. FP8 latents have per-token scales and keep their rotary keys in the activation dtype."""
    shape = (pages, page_size)

    def plane(width: int, of: torch.dtype) -> Tensor:
        return torch.zeros(*shape, width, dtype=of, device=device)

    if kv_dtype == "fp8":
        scale = plane(blocks(c.kv_lora_rank), torch.float32)
        return LatentCache(plane(c.kv_lora_rank, torch.float8_e4m3fn), plane(c.qk_rope_head_dim, dtype), scale)
    stored = getattr(torch, kv_dtype)
    return LatentCache(plane(c.kv_lora_rank, stored), plane(c.qk_rope_head_dim, stored))


@dataclass(frozen=True)
class Run:
    """Some tokens of one sequence: its row in the batch, the tokens, and the position of the first."""

    row: int
    ids: Sequence[int]
    position: int


class BatchCache:
    """Pages for a fixed batch: every sequence gets as many as its longest length needs."""

    def __init__(
        self, c: ModelConfig, layers: int, spec: CacheSpec, dtype: torch.dtype, device: torch.device, lengths: Sequence[int]
    ) -> None:
        self.page_size, self.device = spec.page_size, device
        counts = [max(1, -(-n // spec.page_size)) for n in lengths]
        total, first = sum(counts), 0
        self.pages: list[list[int]] = []
        for count in counts:
            self.pages.append(list(range(first, first + count)))
            first += count
        self.layers = [allocate_planes(c, total, spec.page_size, spec.kv_dtype, dtype, device) for _ in range(layers)]

    def step(self, runs: Sequence[Run], bucket: Callable[[int], int], absorbed: bool, start: int = 0) -> Step:
        """The metadata of one step over these runs, in order. bucket: which bound kernels a number of rows takes."""
        size = self.page_size
        ids: list[int] = []
        positions: list[int] = []
        slots, lengths, cu_q, cu_k = [], [], [0], [0]
        for run in runs:
            pages, stop = self.pages[run.row], run.position + len(run.ids)
            ids += run.ids
            positions += range(run.position, stop)
            slots += [pages[p // size] * size + p % size for p in range(run.position, stop)]
            lengths.append(stop)
            cu_q.append(cu_q[-1] + len(run.ids))
            cu_k.append(cu_k[-1] + max(stop - start, 0))
        used = [-(-n // size) for n in lengths]
        table = [(self.pages[r.row][:u] + [0] * (max(used) - u)) for r, u in zip(runs, used, strict=True)]
        return Step(
            ids=self._index(ids),
            positions=self._index(positions),
            slots=self._index(slots),
            block_table=self._index(table),
            seq_lens=self._index(lengths),
            cu_q=self._index(cu_q),
            cu_k=self._index(cu_k),
            max_q=max(len(r.ids) for r in runs),
            max_k=max(max(n - start, 0) for n in lengths),
            total_k=cu_k[-1],
            bucket=bucket(len(ids)),
            bucket_k=bucket(cu_k[-1]),
            absorbed=absorbed,
            start=start,
        )

    def _index(self, values: Sequence[int] | Sequence[Sequence[int]]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.device)


def meta_step(tokens: int, absorbed: bool, start: int = 0) -> Step:
    """One sequence of this many tokens, in shapes only."""

    def index(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device="meta")

    return Step(
        ids=index(tokens),
        positions=index(tokens),
        slots=index(tokens),
        block_table=index(1, 1),
        seq_lens=index(1),
        cu_q=index(2),
        cu_k=index(2),
        max_q=tokens,
        max_k=tokens,
        total_k=tokens,
        bucket=0,
        bucket_k=0,
        absorbed=absorbed,
        start=start,
    )
