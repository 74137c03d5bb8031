"""The running softmax of flash attention, in base 2. Source: Milakov and Gimelshein 2018; Dao 2023."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = 1.4426950408889634
_LN2: tl.constexpr = tl.constexpr(0.6931471805599453)


@triton.jit
def online(scores, largest, total, acc):
    """scores [rows, keys] in base 2, -inf where hidden; largest, total [rows], acc [rows, width] so far -> p, and these three,
    acc scaled but without the new keys. NaN scores stay NaN."""
    block = tl.max(scores, axis=1)
    new = tl.maximum(largest, block)
    shift = tl.where(new == float("-inf"), 0.0, new)
    p = tl.exp2(scores - shift[:, None])
    rescale = tl.exp2(largest - shift)
    return p, new, total * rescale + tl.sum(p, axis=1), acc * rescale[:, None]


@triton.jit
def finish(largest, total, acc):
    """o [rows, width] and the natural lse [rows]; a row without keys is 0 and -inf."""
    empty = largest == float("-inf")
    o = acc / tl.where(empty, 1.0, total)[:, None]
    lse = (largest + tl.log2(tl.where(empty, 1.0, total))) * _LN2
    return o, tl.where(empty, float("-inf"), lse)
