"""Products of rows sorted by expert: which tile a program has, one tile's sum over K, and what is done with it."""

from __future__ import annotations

import triton
import triton.language as tl

from dsv3_triton.numbers import decode_fp8, exp_accurate
from dsv3_triton.quantize import quantize_group


@triton.jit
def find_tile(tile, offsets_ptr, M, E, BLOCK_M: tl.constexpr, LANES: tl.constexpr, TAIL: tl.constexpr):
    """tile -> expert, the tile's first row, the row after the expert's last. Tiles are counted expert by expert, so that none
    has rows of two; a tile past the last has no rows. TAIL: rows that belong to nobody are those of expert E. LANES > E."""
    lane = tl.arange(0, LANES)
    start = tl.load(offsets_ptr + lane, mask=lane <= E, other=0).to(tl.int32)
    end = tl.load(offsets_ptr + lane + 1, mask=lane < E, other=0).to(tl.int32)
    end = tl.where(lane < E, end, start)
    if TAIL:
        end = tl.where(lane == E, M, end)
    tiles = (end - start + BLOCK_M - 1) // BLOCK_M
    past = tl.cumsum(tiles, axis=0)
    expert = tl.sum((past <= tile).to(tl.int32), axis=0)
    mine = lane == expert
    first = tl.sum(tl.where(mine, start + (tile - past + tiles) * BLOCK_M, 0), axis=0)
    return expert, first, tl.sum(tl.where(mine, end, 0), axis=0)


@triton.jit
def load_weight(w_ptr, stride, n, inside, first, K, KIND: tl.constexpr, NATIVE: tl.constexpr, FNUZ: tl.constexpr,
                DTYPE: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """[BLOCK_K, BLOCK_N] of a weight [N, K], or its codes as exact numbers; zeros outside. n: rows of the weight."""
    row = n.to(tl.int64) * stride
    if KIND == "int4":
        byte = first // 2 + tl.arange(0, BLOCK_K // 2)
        packed = tl.load(w_ptr + row[:, None] + byte[None, :], mask=inside[:, None] & (byte < stride)[None, :], other=0x88)
        both = tl.interleave((packed & 15).to(tl.int8), (packed >> 4).to(tl.int8)) - 8
        return tl.trans(both.to(DTYPE))
    else:
        k = first + tl.arange(0, BLOCK_K)
        w = tl.load(w_ptr + row[None, :] + k[:, None], mask=inside[None, :] & (k < K)[:, None], other=0.0 if NATIVE else 0)
        if KIND == "fp8" and NATIVE:
            return w
        elif KIND == "fp8":
            return decode_fp8(w, FNUZ).to(DTYPE)
        elif KIND == "int8":
            return w
        elif KIND == "fp8a16":
            return w.to(tl.float32).to(DTYPE) if NATIVE else decode_fp8(w, FNUZ).to(DTYPE)
        else:
            return w.to(DTYPE)


@triton.jit
def load_scale(scale_ptr, n, inside, first, groups, KIND: tl.constexpr):
    """What the weight's codes of 128 values of K are to be multiplied with: [BLOCK_N]."""
    if KIND == "int4":
        return tl.load(scale_ptr + n.to(tl.int64) * groups + first // 128, mask=inside, other=0.0)
    else:
        return tl.load(scale_ptr + (n // 128) * groups + first // 128, mask=inside, other=0.0)


@triton.jit
def swiglu(gate, up):
    """silu(gate) * up."""
    return tl.div_rn(gate, 1.0 + exp_accurate(-gate)) * up


@triton.jit
def sums(
    x_ptr, x_scale_ptr, source, there, w_ptr, w_scale_ptr, n, N, K, stride_x, stride_w,
    KIND: tl.constexpr, NATIVE: tl.constexpr, FNUZ: tl.constexpr, GATED: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Rows `source` of x, where `there`, times rows n of one expert's weight, and with GATED times rows n + N: two tiles, the
    second nothing otherwise. Scales of 128 values of K are multiplied in here, those of whole rows are not."""
    gate = tl.zeros([BLOCK_M, BLOCK_N], tl.int32 if KIND == "int8" else tl.float32)
    up = gate
    groups = (K + 127) // 128
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        inside = there[:, None] & (k < K)[None, :]
        x = tl.load(x_ptr + source[:, None] * stride_x + k[None, :], mask=inside, other=0.0 if NATIVE else 0)
        if KIND == "fp8" and not NATIVE:
            x = decode_fp8(x, FNUZ).to(DTYPE)
        w = load_weight(w_ptr, stride_w, n, n < N, start, K, KIND, NATIVE, FNUZ, DTYPE, BLOCK_K)
        if GATED:
            v = load_weight(w_ptr, stride_w, n + N, n < N, start, K, KIND, NATIVE, FNUZ, DTYPE, BLOCK_K)
        if KIND == "int8":
            gate = tl.dot(x, w, gate, out_dtype=tl.int32)
            if GATED:
                up = tl.dot(x, v, up, out_dtype=tl.int32)
        elif KIND == "none" or KIND == "int8a16":
            gate = tl.dot(x, w, gate, input_precision="ieee")
            if GATED:
                up = tl.dot(x, v, up, input_precision="ieee")
        else:
            scale = load_scale(w_scale_ptr, n, n < N, start, groups, KIND)[None, :]
            if KIND == "fp8":
                a = tl.load(x_scale_ptr + source * groups + start // 128, mask=there, other=0.0)[:, None]
                scale = a * scale
            gate += tl.dot(x, w, input_precision="ieee") * scale
            if GATED:
                scale = load_scale(w_scale_ptr, n + N, n < N, start, groups, KIND)[None, :]
                if KIND == "fp8":
                    scale = a * scale
                up += tl.dot(x, v, input_precision="ieee") * scale
    return gate, up


@triton.jit
def scaled(tile, x_scale_ptr, source, there, w_scale_ptr, n, inside, KIND: tl.constexpr):
    """A tile of sums as float32, times the scales of whole rows of x and of the weight."""
    if KIND == "int8":
        tile = tile.to(tl.float32) * tl.load(x_scale_ptr + source, mask=there, other=0.0)[:, None]
    if KIND == "int8" or KIND == "int8a16":
        tile = tile * tl.load(w_scale_ptr + n, mask=inside, other=0.0)[None, :]
    return tile


@triton.jit(do_not_specialize=["M", "tall"])
def grouped_kernel(
    x_ptr, x_scale_ptr, perm_ptr, w_ptr, w_scale_ptr, offsets_ptr, y_ptr, y_scale_ptr,
    M, tall, N, K, E, stride_x, stride_w, stride_e, stride_scale, largest,
    KIND: tl.constexpr, NATIVE: tl.constexpr, FNUZ: tl.constexpr, GATED: tl.constexpr, REQUANTISE: tl.constexpr,
    UE8M0: tl.constexpr, TOPK: tl.constexpr, TAIL: tl.constexpr, DTYPE: tl.constexpr, LANES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M rows of one expert x BLOCK_N columns of y [M, N].

    x [.., K] rows in order, or with TOPK those of perm // TOPK. GATED: w has 2N rows, and y is the gate's columns through silu
    times the up's. REQUANTISE: y as FP8 codes with a scale per 128 columns, which BLOCK_N is. KIND: "none", "fp8" and "int8"
    (activations too), "fp8a16", "int8a16", "int4". DTYPE: what the dot takes where it is neither NATIVE's FP8 nor int8. BAND
    tile rows go through the columns together.
    """
    wide = tl.cdiv(N, BLOCK_N)
    band = tl.program_id(0) // (BAND * wide) * BAND
    inner = tl.program_id(0) % (BAND * wide)
    height = tl.minimum(tall - band, BAND)
    expert, first, stop = find_tile(band + inner % height, offsets_ptr, M, E, BLOCK_M, LANES, TAIL)
    if first >= stop:
        return
    column = inner // height
    n = column * BLOCK_N + tl.arange(0, BLOCK_N)
    row = first + tl.arange(0, BLOCK_M)
    there = row < stop
    inside = there[:, None] & (n < N)[None, :]
    at = row.to(tl.int64)[:, None] * N + n[None, :]
    if TAIL:  # noqa: SIM102  decided when compiled; the other when it runs
        if expert == E:
            tl.store(y_ptr + at, tl.zeros([BLOCK_M, BLOCK_N], y_ptr.dtype.element_ty), mask=inside)
            return
    source = row
    if TOPK > 0:
        source = tl.load(perm_ptr + row, mask=there, other=0) // TOPK
    source = source.to(tl.int64)
    w_ptr += expert.to(tl.int64) * stride_e
    if KIND != "none":
        w_scale_ptr += expert.to(tl.int64) * stride_scale
    gate, up = sums(
        x_ptr, x_scale_ptr, source, there, w_ptr, w_scale_ptr, n, N, K, stride_x, stride_w,
        KIND, NATIVE, FNUZ, GATED, DTYPE, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    y = scaled(gate, x_scale_ptr, source, there, w_scale_ptr, n, n < N, KIND)
    if GATED:
        y = swiglu(y, scaled(up, x_scale_ptr, source, there, w_scale_ptr, n + N, n < N, KIND))
    if REQUANTISE:
        q, scale = quantize_group(y, 1e-4, largest, UE8M0, FNUZ)
        tl.store(y_ptr + at, q, mask=inside)
        tl.store(y_scale_ptr + row.to(tl.int64) * wide + column, scale, mask=there)
    else:
        tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)
