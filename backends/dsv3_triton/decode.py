"""Absorbed attention over the paged latent cache, for few queries per sequence: multi-query attention whose keys and values are
the latents themselves. Split over the keys where there are too few programs to fill a device.

Source: DeepSeek-V2 report, appendix B and 2.1.2; splitting as in Dao et al. 2023, Flash-Decoding.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv3.plugin import LatentCache
from dsv3_triton.decode_combine import combine
from dsv3_triton.launch import launch
from dsv3_triton.numbers import decode_fp8, round_bf16
from dsv3_triton.softmax import LOG2E, finish, online


@triton.jit
def latents(
    ckv_ptr, scale_ptr, at, at_scale, here, R, WIDTH: tl.constexpr, FP8: tl.constexpr, FNUZ: tl.constexpr,
    NATIVE: tl.constexpr, EVEN: tl.constexpr, ROUND_BITS: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """Cache rows [n, WIDTH] in dtype. EVEN: R is WIDTH, so that no lane needs a mask of its own. Scales are read once per 128
    numbers and spread in registers."""
    lane = tl.arange(0, WIDTH)[None, :]
    if EVEN:
        inside = here[:, None]
    else:
        inside = here[:, None] & (lane < R)
    x = tl.load(ckv_ptr + at[:, None] + lane, mask=inside, other=0.0)
    if FP8:
        lanes: tl.constexpr = min(WIDTH, 128)
        groups: tl.constexpr = WIDTH // lanes
        rows: tl.constexpr = at.shape[0]
        group = tl.arange(0, groups)[None, :]
        present = here[:, None]
        if not EVEN:
            present = present & (group * 128 < R)
        scale = tl.load(scale_ptr + at_scale[:, None] + group, mask=present, other=0.0)
        spread = tl.reshape(tl.broadcast_to(scale[:, :, None], (rows, groups, lanes)), (rows, WIDTH))
        if NATIVE:
            x = x.to(tl.float32) * spread
        else:
            x = decode_fp8(x, FNUZ) * spread
        if ROUND_BITS:
            return round_bf16(x)
    return x.to(dtype)


@triton.jit(do_not_specialize=["split_keys", "start", "stride_table", "tiles", "splits"])
def mla_decode_kernel(
    q_ptr, qpe_ptr, ckv_ptr, kpe_ptr, scale_ptr, table_ptr, lens_ptr, cu_ptr, o_ptr, lse_ptr,
    tiles, split_keys, splits, start, scale_log2, heads, R, P, page_size, tokens_lse,
    stride_qt, stride_qh, stride_pt, stride_ph, stride_table,
    page_ckv, row_ckv, page_kpe, row_kpe, page_scale, row_scale,
    WIDTH: tl.constexpr, ROPE: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr, FP8: tl.constexpr,
    FNUZ: tl.constexpr, NATIVE: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr, EVEN: tl.constexpr,
    ROUND_BITS: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_H (query, head) rows of one sequence x one range of its keys. SPLIT: o is float32
    [tokens, heads, splits, R] and lse [tokens, heads, splits]; else o [tokens, heads, R] and lse [heads, tokens]."""
    sequence, tile, split = tl.program_id(0) // tiles, tl.program_id(0) % tiles, tl.program_id(1)
    first = tl.load(cu_ptr + sequence).to(tl.int32)
    queries = tl.load(cu_ptr + sequence + 1).to(tl.int32) - first
    if tile * BLOCK_H < queries * heads:
        row = tile * BLOCK_H + tl.arange(0, BLOCK_H)
        query, head = row // heads, row % heads
        used = row < queries * heads
        token = (first + query).to(tl.int64)
        length = tl.load(lens_ptr + sequence).to(tl.int32)
        limit = length - queries + query + 1
        low = start + split * split_keys
        high = tl.minimum(length, low + split_keys)
        dtype: tl.constexpr = q_ptr.dtype.element_ty
        lane, rope = tl.arange(0, WIDTH)[None, :], tl.arange(0, ROPE)[None, :]
        q = tl.load(q_ptr + (token * stride_qt + head * stride_qh)[:, None] + lane, mask=used[:, None] & (lane < R), other=0.0)
        q_pe = tl.load(
            qpe_ptr + (token * stride_pt + head * stride_ph)[:, None] + rope, mask=used[:, None] & (rope < P), other=0.0
        )
        largest = tl.full([BLOCK_H], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_H], tl.float32)
        acc = tl.zeros([BLOCK_H, WIDTH], tl.float32)
        for at in range(low, high, BLOCK_N):
            slot = at + tl.arange(0, BLOCK_N)
            here = slot < high
            page = tl.load(table_ptr + sequence * stride_table + slot // page_size, mask=here, other=0).to(tl.int64)
            offset = (slot % page_size).to(tl.int64)
            c = latents(
                ckv_ptr, scale_ptr, page * page_ckv + offset * row_ckv, page * page_scale + offset * row_scale, here, R,
                WIDTH, FP8, FNUZ, NATIVE, EVEN, ROUND_BITS, dtype,
            )  # fmt: skip
            key = (page * page_kpe + offset * row_kpe)[:, None] + rope
            k_pe = tl.load(kpe_ptr + key, mask=here[:, None] & (rope < P), other=0.0).to(dtype)
            scores = tl.dot(q, tl.trans(c), input_precision=PRECISION)
            scores = tl.dot(q_pe, tl.trans(k_pe), scores, input_precision=PRECISION) * scale_log2
            visible = here[None, :] & (slot[None, :] < limit[:, None])
            p, largest, total, acc = online(tl.where(visible, scores, float("-inf")), largest, total, acc)
            acc = tl.dot(p.to(dtype), c, acc, input_precision=PRECISION)
        o, lse = finish(largest, total, acc)
        if SPLIT:
            part = (token * heads + head) * splits + split
            tl.store(lse_ptr + part, lse, mask=used)
            # What a range without keys holds is never read.
            tl.store(o_ptr + part[:, None] * R + lane, o, mask=(used & (lse > float("-inf")))[:, None] & (lane < R))
        else:
            tl.store(lse_ptr + head.to(tl.int64) * tokens_lse + token, lse, mask=used)
            place = (token * heads + head)[:, None] * R + lane
            tl.store(o_ptr + place, o.to(o_ptr.dtype.element_ty), mask=used[:, None] & (lane < R))


def splits_of(programs: int, max_k: int, target: int, least: int) -> int:
    """How many ranges the keys are split into: enough for `target` programs, none shorter than `least` keys."""
    return max(1, min(triton.cdiv(target, max(programs, 1)), triton.cdiv(max_k, least)))


def mla_decode(
    q_c: Tensor, q_pe: Tensor, cache: LatentCache, block_table: Tensor, seq_lens: Tensor, cu_q: Tensor, max_q: int, max_k: int,
    scale: float, start: int, config: Mapping[str, Any],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`dsv3.ops.mla_decode`. config: BLOCK_H rows and BLOCK_N keys a tile, TARGET programs to aim for, LEAST keys a split,
    FP8, the encoding that the device decodes by itself, ROUND_BITS where it cannot round to
    bfloat16 by itself."""
    tokens, heads, rank = q_c.shape
    sequences = len(seq_lens)
    o = torch.empty(tokens, heads, rank, dtype=q_c.dtype, device=q_c.device)
    lse = torch.empty(heads, tokens, dtype=torch.float32, device=q_c.device)
    tiles = triton.cdiv(max(max_q, 1) * heads, config["BLOCK_H"])
    splits = splits_of(sequences * tiles, max_k, config["TARGET"], config["LEAST"])
    keys = triton.cdiv(triton.cdiv(max(max_k, 1), splits), config["BLOCK_N"]) * config["BLOCK_N"]
    splits = triton.cdiv(max(max_k, 1), keys)
    split = splits > 1
    if split:
        part_o = torch.empty(tokens, heads, splits, rank, dtype=torch.float32, device=q_c.device)
        part_lse = torch.full((tokens, heads, splits), float("-inf"), dtype=torch.float32, device=q_c.device)
    fp8 = cache.scale is not None
    encoding = str(cache.ckv.dtype).removeprefix("torch.")
    native = fp8 and config["FP8"] == encoding
    codes = cache.ckv.view(torch.uint8) if fp8 and not native else cache.ckv
    scales = cache.scale if cache.scale is not None else cache.kpe
    launch(
        mla_decode_kernel, (sequences * tiles, splits),
        q_c, q_pe, codes, cache.kpe, scales, block_table, seq_lens, cu_q, part_o if split else o, part_lse if split else lse,
        tiles, keys, splits, start, scale * LOG2E, heads, rank, q_pe.shape[2], codes.shape[1], tokens,
        q_c.stride(0), q_c.stride(1), q_pe.stride(0), q_pe.stride(1), block_table.stride(0),
        codes.stride(0), codes.stride(1), cache.kpe.stride(0), cache.kpe.stride(1), scales.stride(0), scales.stride(1),
        WIDTH=max(16, triton.next_power_of_2(rank)), ROPE=max(16, triton.next_power_of_2(q_pe.shape[2])),
        BLOCK_H=config["BLOCK_H"], BLOCK_N=config["BLOCK_N"], FP8=fp8, FNUZ=encoding == "float8_e4m3fnuz", NATIVE=native,
        SPLIT=split, PRECISION="ieee", EVEN=rank == max(16, triton.next_power_of_2(rank)),
        ROUND_BITS=config.get("ROUND_BITS", False) and q_c.dtype == torch.bfloat16, num_warps=config["num_warps"],
        num_stages=config["num_stages"],
    )  # fmt: skip
    if split:
        combine(part_o, part_lse, o, lse)
    return o, lse
