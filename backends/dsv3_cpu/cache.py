"""The latent cache: writing, rotating on the way in, gathering."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv3 import ops
from dsv3.plugin import LatentCache
from dsv3_cpu.pointwise import apply_rope
from dsv3_cpu.programs import Kernel
from dsv3_cpu.views import array, indices, plane_arrays

_store, _gather = Kernel("latent.store"), Kernel("latent.gather")


def kv_cache_write(ckv: Tensor, kpe: Tensor, slots: Tensor, cache: LatentCache) -> None:
    latents = array(ckv)
    _store(4 * latents.nbytes, latents, array(kpe), indices(slots), cache.ckv.shape[1], *plane_arrays(cache))


def rope_cache_write(
    q_pe: Tensor,
    kpe: Tensor,
    ckv: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    slots: Tensor,
    cache: LatentCache,
    interleaved: bool,
) -> Tensor:
    key = apply_rope(kpe.unsqueeze(1), positions, cos_sin, interleaved)
    kv_cache_write(ckv, key.squeeze(1), slots, cache)
    return apply_rope(q_pe, positions, cos_sin, interleaved)


def kv_cache_gather(cache: LatentCache, block_table: Tensor, seq_lens: Tensor, total: int, start: int) -> tuple[Tensor, Tensor]:
    if cache.kpe.dtype == torch.float64:  # what an FP8 row stands for, exactly: float32 would round it
        return ops.kv_cache_gather(cache=cache, block_table=block_table, seq_lens=seq_lens, total=total, start=start)
    ckv, kpe = torch.empty(total, cache.ckv.shape[2]), torch.empty(total, cache.kpe.shape[2])
    if total:
        ends = (seq_lens.to(torch.int64) - start).clamp_min(0).cumsum(0)
        _gather(
            4 * ckv.numel(), indices(block_table), indices(seq_lens), array(ends), start, cache.ckv.shape[1],
            *plane_arrays(cache),
            array(ckv), array(kpe),
        )  # fmt: skip
    return ckv.to(cache.kpe.dtype), kpe.to(cache.kpe.dtype)
