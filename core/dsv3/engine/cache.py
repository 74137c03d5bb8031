"""The paged latent cache of a batch of sequences, and the steps that run over it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from dsv3.graph.config import ModelConfig
from dsv3.graph.step import Step
from dsv3.plugin import CacheSpec, LatentCache
from dsv3.quant.fp8 import blocks


def allocate_planes(c: ModelConfig, pages: int, spec: CacheSpec, dtype: torch.dtype, device: torch.device) -> LatentCache:
    """One layer's cache. FP8 latents have per-token scales and keep their rotary keys in the activation dtype."""
    shape = (pages, spec.page_size)

    def plane(width: int, of: torch.dtype) -> Tensor:
        return torch.zeros(*shape, width, dtype=of, device=device)

    if spec.kv_dtype == "fp8":
        scale = plane(blocks(c.kv_lora_rank), torch.float32)
        return LatentCache(plane(c.kv_lora_rank, getattr(torch, spec.encoding)), plane(c.qk_rope_head_dim, dtype), scale)
    stored = getattr(torch, spec.kv_dtype)
    return LatentCache(plane(c.kv_lora_rank, stored), plane(c.qk_rope_head_dim, stored))


@dataclass(frozen=True)
class Run:
    """Some tokens of one sequence: its row in the batch, the tokens, and the position of the first. unwritten: how many of the
    first are in the cache already, and not written again."""

    row: int
    ids: Sequence[int]
    position: int
    unwritten: int = 0


@dataclass(frozen=True)
class Indices:
    """What a `Step` has on the device, as lists."""

    ids: list[int]
    positions: list[int]
    slots: list[int]
    block_table: list[list[int]]
    seq_lens: list[int]
    cu_q: list[int]
    cu_k: list[int]


class PagedCache:
    """Latent planes of all layers, in pages, and who has which: `pages` by a sequence's row. captured: decode steps over these
    very planes that can be replayed, see `dsv3.engine.graphs`."""

    def __init__(
        self, c: ModelConfig, layers: int, spec: CacheSpec, dtype: torch.dtype, device: torch.device, total: int
    ) -> None:
        self.page_size, self.device, self.total = spec.page_size, device, total
        self.pages: dict[int, list[int]] = {}
        self._make = functools.partial(allocate_planes, c, spec=spec, dtype=dtype, device=device)
        self.layers = [self._make(total) for _ in range(layers)]
        self.captured: dict[Any, Any] = {}

    def grow(self, total: int) -> None:
        """More pages; what the first ones hold stays."""
        self.captured.clear()  # they hold for the planes that they were captured over
        for n, old in enumerate(self.layers):
            new = self._make(total)
            for name in ("ckv", "kpe", "scale"):
                before, after = getattr(old, name), getattr(new, name)
                if before is not None:
                    # As bytes: not every device copies FP8.
                    after.view(torch.uint8)[: self.total].copy_(before.view(torch.uint8))
            self.layers[n] = new
        self.total = total

    def indices(self, runs: Sequence[Run], start: int = 0) -> Indices:
        """Where the tokens of a step over these runs go, and what they see."""
        size = self.page_size
        ids: list[int] = []
        positions: list[int] = []
        slots, lengths, cu_q, cu_k = [], [], [0], [0]
        for run in runs:
            pages, stop = self.pages[run.row], run.position + len(run.ids)
            ids += run.ids
            positions += range(run.position, stop)
            first = run.position + run.unwritten
            slots += [-1] * (first - run.position) + [pages[p // size] * size + p % size for p in range(first, stop)]
            lengths.append(stop)
            cu_q.append(cu_q[-1] + len(run.ids))
            cu_k.append(cu_k[-1] + max(stop - start, 0))
        used = [-(-n // size) for n in lengths]
        table = [(self.pages[r.row][:u] + [0] * (max(used) - u)) for r, u in zip(runs, used, strict=True)]
        return Indices(ids, positions, slots, table, lengths, cu_q, cu_k)

    def step(self, runs: Sequence[Run], bucket: Callable[[int], int], absorbed: bool, start: int = 0) -> Step:
        """The metadata of one step over these runs, in order. bucket: which bound kernels a number of rows takes."""
        found = self.indices(runs, start)
        tensors: dict[str, Any] = {f.name: self._index(getattr(found, f.name)) for f in fields(Indices)}
        return Step(
            **tensors,
            max_q=max(len(r.ids) for r in runs),
            max_k=max(max(n - start, 0) for n in found.seq_lens),
            total_k=found.cu_k[-1],
            bucket=bucket(len(found.ids)),
            bucket_k=bucket(found.cu_k[-1]),
            absorbed=absorbed,
            start=start,
        )

    def mixed(self, few: Sequence[Run], many: Sequence[Run], bucket: Callable[[int], int], start: int = 0) -> Step:
        """A step over runs that attend over the cache as it is, and after them runs that attend over expanded keys."""
        parts = tuple(self.step(runs, bucket, absorbed, start) for runs, absorbed in ((few, True), (many, False)) if runs)
        if len(parts) == 1:
            return parts[0]
        ids = torch.cat([part.ids for part in parts])
        return replace(parts[0], ids=ids, bucket=bucket(ids.shape[0]), parts=parts)

    def _index(self, values: Sequence[int] | Sequence[Sequence[int]]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.device)


class BatchCache(PagedCache):
    """Pages for a fixed batch: every sequence gets as many as its longest length needs."""

    def __init__(
        self, c: ModelConfig, layers: int, spec: CacheSpec, dtype: torch.dtype, device: torch.device, lengths: Sequence[int]
    ) -> None:
        counts = [max(1, -(-n // spec.page_size)) for n in lengths]
        super().__init__(c, layers, spec, dtype, device, sum(counts))
        first = 0
        for row, count in enumerate(counts):
            self.pages[row] = list(range(first, first + count))
            first += count


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
