"""Absorbed attention over the paged latent cache: one key [latent | rope] and one value, the latent, for all heads.

The rows of a tile are (query, head) pairs of one sequence, so that a cache byte is read once for all of them. A sequence's
keys are split between programs: `decode_combine` merges what they find. The latent is taken in chunks of columns; with an FP8
cache a chunk is a group of 128 that shares a scale, which multiplies products and probabilities, never the codes: those are
exact in bfloat16.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv3.plugin import LatentCache
from dsv3_triton.decode_combine import combine, span_of
from dsv3_triton.decode_read import operand_of, page_of, read_slots
from dsv3_triton.launch import launch

_LOG2E = 1.4426950408889634
_LN2: tl.constexpr = tl.constexpr(0.6931471805599453)
_GROUP = 128


@triton.jit
def _queries(ptr, at, inside, width, CHUNKS: tl.constexpr, CHUNK: tl.constexpr, WIDE: tl.constexpr):
    """Rows of queries [rows, width] in CHUNKS parts [rows, CHUNK]; what lies past rows and width is 0."""
    parts = ()
    for g in tl.static_range(CHUNKS):
        column = g * CHUNK + tl.arange(0, CHUNK)
        part = tl.load(ptr + at[:, None] + column[None, :], mask=inside[:, None] & (column < width)[None, :], other=0.0)
        parts += (part.to(tl.float32) if WIDE else part,)
    return parts


@triton.jit
def _operands(
    stored, CHUNKS: tl.constexpr, FP8: tl.constexpr, FNUZ: tl.constexpr, NATIVE: tl.constexpr, WIDE: tl.constexpr
):  # fmt: skip
    """The parts of the latent, as products take them."""
    parts = ()
    for g in tl.static_range(CHUNKS):
        parts += (operand_of(stored[g], FP8, FNUZ, NATIVE, WIDE),)
    return parts


@triton.jit
def _scores(q, q_pe, latent, kpe, stored, CHUNKS: tl.constexpr, FP8: tl.constexpr):
    """Products of queries and keys [rows, slots]."""
    s = tl.dot(q_pe, tl.trans(kpe), input_precision="ieee")
    for g in tl.static_range(CHUNKS):
        if FP8:
            s += tl.dot(q[g], tl.trans(latent[g]), input_precision="ieee") * stored[CHUNKS + 1 + g][None, :]
        else:
            s = tl.dot(q[g], tl.trans(latent[g]), s, input_precision="ieee")
    return s


@triton.jit
def _absorb(acc, top, total, s, latent, stored, CHUNKS: tl.constexpr, FP8: tl.constexpr):
    """The softmax so far (acc in parts [rows, CHUNK], top and total [rows]) and a block with scores s [rows, slots]."""
    higher = tl.maximum(top, tl.max(s, axis=1))
    shift = tl.where(higher == float("-inf"), 0.0, higher)
    p = tl.exp2(s - shift[:, None])
    alpha = tl.exp2(top - shift)
    sums = ()
    for g in tl.static_range(CHUNKS):
        weights = p * stored[CHUNKS + 1 + g][None, :] if FP8 else p
        sums += (tl.dot(weights.to(latent[g].dtype), latent[g], acc[g] * alpha[:, None], input_precision="ieee"),)
    return sums, higher, total * alpha + tl.sum(p, axis=1)


@triton.jit
def _write(row_ptr, acc, factor, inside, R, CHUNKS: tl.constexpr, CHUNK: tl.constexpr):
    """acc * factor [rows, R] to the rows that are inside."""
    for g in tl.static_range(CHUNKS):
        column = g * CHUNK + tl.arange(0, CHUNK)
        o = (acc[g] * factor[:, None]).to(row_ptr.dtype.element_ty)
        tl.store(row_ptr[:, None] + column[None, :], o, mask=inside[:, None] & (column < R)[None, :])


@triton.jit
def _zeros(CHUNKS: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr):
    parts = ()
    for _ in tl.static_range(CHUNKS):
        parts += (tl.zeros((ROWS, CHUNK), tl.float32),)
    return parts


@triton.jit(do_not_specialize=["T", "splits", "start", "scale", "table_row"])
def decode_kernel(
    q_ptr, pe_ptr, ckv_ptr, kpe_ptr, scale_ptr, table_ptr, lengths_ptr, cu_ptr, o_ptr, lse_ptr,
    T, splits, start, scale, table_row, heads, R, P,
    q_t, q_h, pe_t, pe_h, ckv_page, ckv_row, kpe_page, kpe_row, scale_page, scale_row,
    PAGE: tl.constexpr, FP8: tl.constexpr, FNUZ: tl.constexpr, NATIVE: tl.constexpr, WIDE: tl.constexpr, DIRECT: tl.constexpr,
    CHUNKS: tl.constexpr, CHUNK: tl.constexpr, ROPE: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr,
    SPAN: tl.constexpr, ONE_PAGE: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_H (query, head) pairs of a sequence x one split of its keys. DIRECT: the only split writes o and lse;
    else every split writes its own, normalised, and its lse to base 2. WIDE: float32 operands. ONE_PAGE: BLOCK_N slots from a
    multiple of BLOCK_N lie in one page, whose number is read a block ahead. AHEAD: so is the block; Triton does it for loads
    that go into products as they are. scale: times log2(e)."""
    split, sequence = tl.program_id(1), tl.program_id(2)
    first = tl.load(cu_ptr + sequence)
    queries = (tl.load(cu_ptr + sequence + 1) - first).to(tl.int32)
    length = tl.load(lengths_ptr + sequence).to(tl.int32)
    first_row = tl.program_id(0) * BLOCK_H
    span = span_of(length - start, splits, SPAN)
    low = start + split * span
    if first_row >= queries * heads or (low >= length and not DIRECT):
        return
    row = first_row + tl.arange(0, BLOCK_H)
    inside = row < queries * heads
    query = row // heads
    head = row - query * heads
    token = first.to(tl.int64) + query
    limit = length - queries + query + 1
    last = (tl.minimum(first_row + BLOCK_H, queries * heads) - 1) // heads
    high = tl.minimum(low + span, length - queries + last + 1)

    q = _queries(q_ptr, token * q_t + head * q_h, inside, R, CHUNKS, CHUNK, WIDE)
    q_pe = _queries(pe_ptr, token * pe_t + head * pe_h, inside, P, 1, ROPE, WIDE)[0]
    acc = _zeros(CHUNKS, BLOCK_H, CHUNK)
    top = tl.full((BLOCK_H,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_H,), tl.float32)
    table_ptr += sequence.to(tl.int64) * table_row
    begin = low // BLOCK_N * BLOCK_N
    page = page_of(table_ptr, begin, high, PAGE)
    if AHEAD:
        coming = read_slots(
            ckv_ptr, kpe_ptr, scale_ptr, table_ptr, page, begin, low, high, R, P,
            ckv_page, ckv_row, kpe_page, kpe_row, scale_page, scale_row,
            PAGE, ONE_PAGE, FP8, CHUNKS, CHUNK, ROPE, BLOCK_N,
        )  # fmt: skip
        page = page_of(table_ptr, begin + BLOCK_N, high, PAGE)
    # What a compiler moves out of this loop it cannot keep in registers.
    for at in tl.range(begin, high, BLOCK_N, disable_licm=True):
        read_at = at + BLOCK_N if AHEAD else at
        just_read = read_slots(
            ckv_ptr, kpe_ptr, scale_ptr, table_ptr, page, read_at, low, high, R, P,
            ckv_page, ckv_row, kpe_page, kpe_row, scale_page, scale_row,
            PAGE, ONE_PAGE, FP8, CHUNKS, CHUNK, ROPE, BLOCK_N,
        )  # fmt: skip
        page = page_of(table_ptr, read_at + BLOCK_N, high, PAGE)
        if AHEAD:
            stored = coming
            coming = just_read
        else:
            stored = just_read
        latent = _operands(stored, CHUNKS, FP8, FNUZ, NATIVE, WIDE)
        s = _scores(q, q_pe, latent, operand_of(stored[CHUNKS], False, FNUZ, NATIVE, WIDE), stored, CHUNKS, FP8)
        position = at + tl.arange(0, BLOCK_N)
        there = (position >= low) & (position < high)
        s = tl.where(there[None, :] & (position[None, :] < limit[:, None]), s * scale, float("-inf"))
        acc, top, total = _absorb(acc, top, total, s, latent, stored, CHUNKS, FP8)
    empty = total == 0.0  # a maximum drops NaN, the sum does not
    inverse = 1.0 / tl.where(empty, 1.0, total)
    lse = tl.where(empty, float("-inf"), top + tl.log2(tl.where(empty, 1.0, total)))
    pair = token * heads + head
    if DIRECT:
        tl.store(lse_ptr + head.to(tl.int64) * T + token, lse * _LN2, mask=inside)
    else:
        pair += split.to(tl.int64) * T * heads
        tl.store(lse_ptr + pair, lse, mask=inside)
    _write(o_ptr + pair * R, acc, inverse, inside, R, CHUNKS, CHUNK)


def mla_decode(
    q_c: Tensor, q_pe: Tensor, cache: LatentCache, block_table: Tensor, seq_lens: Tensor, cu_q: Tensor,
    max_q: int, max_k: int, scale: float, start: int, config: Mapping[str, Any],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`dsv3.ops.mla_decode`: q_c [T, Nh, R], q_pe [T, Nh, P], block_table [S, maxp], seq_lens [S], cu_q [S+1] ->
    o [T, Nh, R], lse [Nh, T]. The number of splits follows from host integers; how far each reaches, from seq_lens."""
    t, heads, rank = q_c.shape
    sequences = seq_lens.shape[0]
    o = torch.empty(t, heads, rank, dtype=q_c.dtype, device=q_c.device)
    lse = torch.empty(heads, t, dtype=torch.float32, device=q_c.device)
    if o.numel() == 0 or sequences == 0 or max_q <= 0:
        return o, lse
    q_c, q_pe, block_table = (x if x.stride(-1) == 1 else x.contiguous() for x in (q_c, q_pe, block_table))
    tile = _tile(q_c, q_pe, cache, max_q * heads, config)
    tiles = triton.cdiv(max_q * heads, tile["BLOCK_H"])
    splits = max(1, min(config["TARGET_PROGRAMS"] // (tiles * sequences), triton.cdiv(max_k, config["SPAN"])))
    direct = splits == 1
    out = (o, lse) if direct else (
        torch.empty(splits, t, heads, rank, dtype=torch.float32, device=o.device),
        torch.empty(splits, t, heads, dtype=torch.float32, device=o.device),
    )  # fmt: skip
    ckv = cache.ckv if cache.scale is None else cache.ckv.view(torch.uint8)
    scales = cache.kpe if cache.scale is None else cache.scale
    launch(
        decode_kernel, (tiles, splits, sequences),
        q_c, q_pe, ckv, cache.kpe, scales, block_table, seq_lens, cu_q, *out,
        t, splits, start, scale * _LOG2E, block_table.stride(0), heads, rank, q_pe.shape[2],
        *q_c.stride()[:2], *q_pe.stride()[:2], *(plane.stride(i) for plane in (ckv, cache.kpe, scales) for i in (0, 1)),
        DIRECT=direct, **tile,
    )  # fmt: skip
    if not direct:
        combine(*out, seq_lens, cu_q, o, lse, max_q, start, config)
    return o, lse


def _tile(q_c: Tensor, q_pe: Tensor, cache: LatentCache, rows: int, config: Mapping[str, Any]) -> dict[str, Any]:
    """Constants of a launch. A tile has no more rows than the longest sequence of queries needs."""
    fp8, rank = cache.scale is not None, q_c.shape[2]
    chunk = _GROUP if fp8 else min(config["CHUNK"], _padded(rank))
    planes = (q_c, cache.kpe) if fp8 else (q_c, cache.kpe, cache.ckv)
    kept = {n: v for n, v in config.items() if n not in ("CHUNK", "NATIVE", "TARGET_PROGRAMS", "ROWS", "COMBINE_WARPS")}
    return {
        **kept,
        "BLOCK_H": min(config["BLOCK_H"], _padded(rows)), "PAGE": cache.ckv.shape[1],
        "ONE_PAGE": cache.ckv.shape[1] % config["BLOCK_N"] == 0,
        "FP8": fp8, "FNUZ": cache.ckv.dtype == torch.float8_e4m3fnuz,
        "NATIVE": fp8 and str(cache.ckv.dtype).removeprefix("torch.") == config["NATIVE"],
        "WIDE": any(x.dtype == torch.float32 for x in planes),
        "CHUNK": chunk, "CHUNKS": triton.cdiv(rank, chunk), "ROPE": _padded(q_pe.shape[2]),
    }  # fmt: skip


def _padded(n: int) -> int:
    """A power of two of 16 or more: what matrix instructions take."""
    return max(16, triton.next_power_of_2(n))
