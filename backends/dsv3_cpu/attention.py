"""Attention: absorbed over the latent cache by a kernel of our own, over expanded keys in tiles of torch's products."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from dsv3.plugin import LatentCache
from dsv3_cpu.constants import HEADS, edge
from dsv3_cpu.kernels.lanes import FORMATS
from dsv3_cpu.programs import Kernel, float_word
from dsv3_cpu.team import crew_size, run
from dsv3_cpu.views import CODES, DEFAULT, Config, as_indices, dense, index_words, planes, scratch_address

_MOST_SCORES = 1 << 21  # of one tile, all heads
_MOST_SUMS = 1 << 24  # float32 numbers of scratch, unless HEADS heads need more
_KEYS = 256
_WIDTH = FORMATS["f32"].numbers  # to whose multiple latents are padded where they are widened
_absorbed = Kernel("decode.absorbed")


def mla_decode(
    q_c: Tensor,
    q_pe: Tensor,
    cache: LatentCache,
    block_table: Tensor,
    seq_lens: Tensor,
    cu_q: Tensor,
    max_q: int,
    max_k: int,
    scale: float,
    start: int,
    config: Config = DEFAULT,
) -> tuple[Tensor, Tensor]:
    """config: keys, of a part, see `edge`. Heads do not touch each other: where the sums of all parts for all heads would take
    more memory than `_MOST_SUMS`, some are answered after the others."""
    q_c, q_pe = dense(q_c), dense(q_pe)
    tokens, heads, rank = q_c.shape
    o, lse = torch.empty_like(q_c), torch.empty(heads, tokens)
    words = as_indices(block_table), as_indices(seq_lens), as_indices(cu_q)
    each = config.get("keys", _KEYS)
    parts = parts_of(start + max_k, each)
    room = _MOST_SUMS // max(1, parts * tokens * (_padded(rank) + 2)) // HEADS * HEADS
    some = max(HEADS, room)
    if some >= heads:
        _absorb(q_c, q_pe, cache, words, max_k, scale, start, parts, each, o, lse)
        return o, lse
    for first in range(0, heads, some):
        these = slice(first, first + some)
        answers = torch.empty_like(o[:, these], memory_format=torch.contiguous_format)
        q, pe = dense(q_c[:, these]), dense(q_pe[:, these])
        _absorb(q, pe, cache, words, max_k, scale, start, parts, each, answers, lse[these])
        o[:, these] = answers
    return o, lse


def _padded(rank: int) -> int:
    return -(-rank // _WIDTH) * _WIDTH


def _absorb(
    q_c: Tensor, q_pe: Tensor, cache: LatentCache, indices: tuple[Tensor, Tensor, Tensor], max_k: int, scale: float, start: int,
    parts: int, each: int, o: Tensor, lse: Tensor,
) -> None:  # fmt: skip
    """One program, into o [T, Nh, R] and lse [Nh, T]. indices: of `mla_decode`'s block_table, seq_lens, cu_q."""
    tokens, heads, rank = q_c.shape
    rope = q_pe.shape[2]
    table, lengths, bounds = indices
    # All heads that may go over the keys together read them once; where that leaves too few tasks, half of them do.
    together = HEADS if lengths.shape[0] * parts * -(-heads // HEADS) >= 2 * crew_size() else HEADS // 2
    padded = _padded(rank)
    direct = cache.scale is None and rank == padded and rope % _WIDTH == 0
    work = tokens * heads * max_k * (rank + rope) // 2
    up = -(-heads // 4) * 4
    sums = scratch_address(parts * tokens * up * (padded + 2))
    shape = (parts, tokens, up)
    words = (
        q_c.data_ptr(), tokens, heads, rank, q_pe.data_ptr(), tokens, heads, rope, *index_words(table), *index_words(lengths),
        *index_words(bounds), float_word(float(scale)),
        start, cache.ckv.shape[1], int(direct), *planes(cache), each, together, sums, *shape, padded,
        sums + 4 * parts * tokens * up * padded,
        *shape, 2, o.data_ptr(), tokens, heads, rank, lse.data_ptr(), heads, tokens,
    )  # fmt: skip
    key = (q_c.dtype, q_pe.dtype, cache.ckv.dtype, cache.kpe.dtype)
    program = _programs.get(key)
    if program is None:
        q, pe, plane, keys = (CODES[dtype] for dtype in key)
        real = f"{q}:3,{pe}:3,i4:2,i4:1,i4:1,f,i,i,i,{plane}:1,i,i,{keys}:1,i,i,f4:1,i,i,i,i,f4:4,f4:4,{q}:3,f4:2"
        program = _programs[key] = _absorbed.program(real)
    run(program, work, words)


_programs: dict[tuple[torch.dtype, ...], int] = {}


@functools.lru_cache(1024)
def parts_of(most: int, each: int) -> int:
    """Parts that so many keys are in."""
    parts = 1
    while edge(parts, each) < most:
        parts += 1
    return parts


def mla_prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    o = torch.zeros(q.shape[0], q.shape[1], v.shape[2], dtype=q.dtype)
    lse = torch.full((q.shape[1], q.shape[0]), float("-inf"))
    bounds_q, bounds_k = cu_q.tolist(), cu_k.tolist()
    for s in range(len(bounds_q) - 1):
        rows, keys = slice(*bounds_q[s : s + 2]), slice(*bounds_k[s : s + 2])
        qs, ks, vs = (t.to(torch.float32).transpose(0, 1) for t in (q[rows], k[keys], v[keys]))
        if qs.shape[1] and ks.shape[1]:
            _sequence(qs, ks, vs, scale, causal, o[rows], lse[:, rows])
    return o, lse


def mla_prefill_bf16(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    """Where there are instructions for products of bfloat16: torch's flash attention, sequence by sequence, over the keys that
    all queries see and then over those that are the queries' own; `mla_prefill` where something is hidden that may not be
    multiplied by 0.

    torch's exponential there has 20 bits, where its vectors are of AVX-512: lse is off by up to 6e-5, o by less than it is
    rounded by."""
    if v.shape[2] > q.shape[2] or not math.isfinite(v.sum(dtype=torch.float32)):
        return mla_prefill(q, k, v, cu_q, cu_k, max_q, max_k, scale, causal)
    o = torch.zeros(q.shape[0], q.shape[1], v.shape[2], dtype=q.dtype)
    lse = torch.full((q.shape[1], q.shape[0]), float("-inf"))
    # It wants one width for all three.
    v = torch.nn.functional.pad(v, (0, q.shape[2] - v.shape[2]))
    bounds_q, bounds_k = cu_q.tolist(), cu_k.tolist()
    for s in range(len(bounds_q) - 1):
        (first, last), (start, end) = bounds_q[s : s + 2], bounds_k[s : s + 2]
        if causal:  # queries before the first key see nothing
            first = max(first, last - (end - start))
        own = end - (last - first) if causal else end
        if last == first or end == start:
            continue
        found: list[tuple[Tensor, Tensor]] = []
        for keys, hides in ((slice(start, own), False), (slice(own, end), True)):
            if keys.stop > keys.start:
                qs, ks, vs = (t.transpose(0, 1)[None] for t in (q[first:last], k[keys], v[keys]))
                part, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(qs, ks, vs, 0.0, hides, scale=scale)
                found.append((part[0], sums[0].view(q.shape[1], -1)))
        part, sums = found[0] if len(found) == 1 else _merged(*found)
        o[first:last] = part.transpose(0, 1)[..., : o.shape[2]]
        lse[:, first:last] = sums
    return o, lse


def _merged(one: tuple[Tensor, Tensor], two: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Of [Nh, n, D] and lse [Nh, n] over some keys, and over others."""
    lse = torch.logaddexp(one[1], two[1])
    o = one[0] * (one[1] - lse).exp_()[..., None]
    return o.addcmul_(two[0], (two[1] - lse).exp_()[..., None]), lse


def _sequence(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, o: Tensor, lse: Tensor) -> None:
    """q [Nh, n, D], k [Nh, m, D], v [Nh, m, Dv] float32, into o [n, Nh, Dv] and lse [Nh, n], some queries at a time over the
    keys that the last of them sees."""
    heads, n = q.shape[:2]
    m = k.shape[1]
    # A value that a query must not see may be NaN, and 0 * NaN is NaN: then one query at a time, over just its own keys.
    clean = not causal or bool(torch.isfinite(v).all())
    step = max(1, _MOST_SCORES // (heads * m)) if clean else 1
    for first in range(0, n, step):
        last = min(n, first + step)
        seen = m - n + last if causal else m
        if seen <= 0:
            continue
        scores = torch.matmul(q[:, first:last], k[:, :seen].transpose(1, 2)).mul_(scale)
        if causal and last - first > 1:  # all of these see the keys before the first's own
            own = scores[:, :, max(0, m - n + first) :]
            limit = torch.arange(first, last)[:, None] + (m - n)
            own.masked_fill_(torch.arange(seen - own.shape[2], seen) > limit, float("-inf"))
        top = scores.amax(dim=-1, keepdim=True)
        p = scores.sub_(top.masked_fill(top.isneginf(), 0)).exp_()
        sums = p.sum(dim=-1, keepdim=True)
        values = torch.matmul(p, v[:, :seen]).div_(sums.clamp_min(torch.finfo(sums.dtype).tiny))
        o[first:last] = values.transpose(0, 1).to(o.dtype)
        lse[:, first:last] = sums.log_().add_(top)[..., 0]
