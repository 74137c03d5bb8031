"""The paged latent cache: one compressed key-value row of R + P numbers per token and layer.

slot = page * page_size + offset. A cache row is found through the block table of its sequence; what lies past a sequence's end
may be anything, NaN included, and is never read.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dsv3.ops.quantize import act_quant
from dsv3.ops.spec import composite, primitive
from dsv3.plugin import LatentCache
from dsv3.quant.fp8 import BLOCK, decode


def _store(plane: Tensor, rows: Tensor, slots: Tensor) -> None:
    """plane[slot] = row for the slots that are not negative, without a shape that depends on how many those are.

    A skipped row is redirected to the slot and the value of the first row that is not skipped: writing the same value twice
    changes nothing, and needs no scratch slot.
    """
    valid = slots >= 0
    first = valid.to(torch.int32).argmax().view(1)
    target = torch.where(valid, slots, slots.index_select(0, first)).clamp_min(0).to(torch.int64)
    values = torch.where(valid[:, None], rows, rows.index_select(0, first))
    pages = torch.div(target, plane.shape[1], rounding_mode="floor")
    offsets = target - pages * plane.shape[1]
    plane[pages, offsets] = torch.where(valid.any(), values, plane[pages, offsets])


@primitive("ckv[T,R] kpe[T,P] slots[T]:int cache<pages,page_size,R,P> -> None", mutates=("cache",))
def kv_cache_write(ckv: Tensor, kpe: Tensor, slots: Tensor, cache: LatentCache) -> None:
    """Write latents and rotated keys of T tokens into the cache.

    ckv [T, R] and kpe [T, P] (rows may be strided), slots [T]; -1 skips a token; only the named slots change; the
    same slot twice is undefined. With an FP8 cache the latent is stored as act_quant(group 128, float32 scales) in
    the encoding of cache.ckv.

    Invariants:
    - all other slots keep their bits
    - a call in which every slot is -1 changes nothing
    """
    if ckv.shape[0] == 0:
        return
    if cache.scale is not None:
        encoding = str(cache.ckv.dtype).removeprefix("torch.")
        codes, scale = act_quant(x=ckv, group=BLOCK, dtype=encoding, scale_fmt="float32", amax_floor=1e-4)
        # As bytes: torch has no FP8 indexing kernels.
        _store(cache.ckv.view(torch.uint8), codes.view(torch.uint8), slots)
        _store(cache.scale, scale, slots)
    else:
        _store(cache.ckv, ckv.to(cache.ckv.dtype), slots)
    _store(cache.kpe, kpe.to(cache.kpe.dtype), slots)


def read_latent(cache: LatentCache, pages: Tensor, offsets: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """ckv [n, R] and kpe [n, P] at the given places, dequantised if the cache is FP8, in dtype: attention takes them in
    what it computes in, so that nothing is rounded on the way."""
    kpe = cache.kpe[pages, offsets].to(dtype)
    if cache.scale is None:
        return cache.ckv[pages, offsets].to(dtype), kpe
    codes = cache.ckv.view(torch.uint8)[pages, offsets].view(cache.ckv.dtype)
    work = torch.float64 if dtype == torch.float64 else torch.float32
    scale = cache.scale[pages, offsets].to(work).repeat_interleave(BLOCK, dim=-1)[:, : codes.shape[-1]]
    return (decode(codes, work) * scale).to(dtype), kpe


@primitive("cache<pages,page_size,R,P> block_table[S,maxp]:int seq_lens[S]:int -> ckv[total,R]:kv kpe[total,P]:kv")
def kv_cache_gather(
    cache: LatentCache, block_table: Tensor, seq_lens: Tensor, total: int, start: int = 0
) -> tuple[Tensor, Tensor]:
    """All cached rows of the sequences, back to back.

    block_table [S, maxp], seq_lens [S], total = sum of max(seq_lens - start, 0) as a host integer, start: first slots of every
    sequence that hold no key -> ckv [total, R], kpe [total, P] in cache.kpe.dtype, dequantised if the cache is FP8.

    Invariants:
    - relabelling pages in cache and table changes nothing
    - what lies past a sequence's end, or past the table's last page, never shows
    """
    lengths = (seq_lens.to(torch.int64) - start).clamp_min(0)
    ends = lengths.cumsum(0)
    row = torch.arange(total, device=seq_lens.device)
    sequence = torch.searchsorted(ends, row, right=True)
    if total:
        position = row - (ends - lengths)[sequence] + start
        page_size = cache.ckv.shape[1]
        block = torch.div(position, page_size, rounding_mode="floor")
        pages = block_table[sequence, block].to(torch.int64)
        return read_latent(cache, pages, position - block * page_size, cache.kpe.dtype)
    dtype, device = cache.kpe.dtype, cache.kpe.device
    return (
        torch.empty(0, cache.ckv.shape[-1], dtype=dtype, device=device),
        torch.empty(0, cache.kpe.shape[-1], dtype=dtype, device=device),
    )


@composite(
    "q_pe[T,Nh,P] kpe[T,P] ckv[T,R] positions[T]:int cos_sin[L,P]:f32 slots[T]:int cache<pages,page_size,R,P> -> q_pe'[T,Nh,P]",
    mutates=("cache",),
)
def rope_cache_write(
    ops: Any,
    q_pe: Tensor,
    kpe: Tensor,
    ckv: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    slots: Tensor,
    cache: LatentCache,
    interleaved: bool = True,
) -> Tensor:
    """Rotate queries and keys, and write the latent and the rotated key into the cache.

    q_pe [T, Nh, P], kpe [T, P] (one head), ckv [T, R] already normalised -> rotated q_pe [T, Nh, P].

    Invariants:
    - q_pe is rotated for skipped tokens too
    - all other slots keep their bits
    """
    key = ops.apply_rope(x=kpe.unsqueeze(1), positions=positions, cos_sin=cos_sin, interleaved=interleaved)
    ops.kv_cache_write(ckv=ckv, kpe=key.squeeze(1), slots=slots, cache=cache)
    return ops.apply_rope(x=q_pe, positions=positions, cos_sin=cos_sin, interleaved=interleaved)
