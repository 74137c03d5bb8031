"""Further faults of memory, state and claims."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dsv3 import ops
from dsv3.plugin import LatentCache, Prepared
from tests.conformance.mutants import fault

Pair = tuple[Tensor, Tensor]
_rings: dict[Any, list[Tensor]] = {}
_turns: dict[Any, int] = {}


def _ring(key: str, like: Tensor, size: int) -> Tensor:
    """One of `size` buffers of a shape in turn."""
    name = (key, like.shape, like.dtype)
    buffers = _rings.setdefault(name, [torch.empty_like(like) for _ in range(size)])
    _turns[name] = (_turns.get(name, -1) + 1) % size
    return buffers[_turns[name]].copy_(like)


@fault("silu_mul", "two output buffers in turn")
def _(x: Tensor) -> Tensor:
    return _ring("silu_mul", ops.silu_mul(x), 2)


@fault("linear", "three output buffers in turn")
def _(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return _ring("linear", ops.linear(x, weight, bias), 3)


@fault("mla_decode", "lse in a buffer that is used again every other call")
def _(**a: Any) -> Pair:
    o, lse = ops.mla_decode(**a)
    return o, _ring("mla_decode", lse, 2)


@fault("grouped_topk", "ids in a view of the last call's buffer every third call")
def _(**a: Any) -> Pair:
    w, ids = ops.grouped_topk(**a)
    return w, _ring("grouped_topk", ids, 3)


@fault("rms_norm", "all rows of the output share memory where they are equal")
def _(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    y = ops.rms_norm(x, weight, eps)
    return y[:1].expand(y.shape) if y.shape[0] > 1 and bool((y == y[:1]).all()) else y


_space: dict[str, Tensor] = {}


@fault("router_gemm", "split K workspace that is cleared only when it grows")
def _(x: Tensor, weight: Tensor) -> Tensor:
    y = ops.router_gemm(x, weight)
    if _space.get("router", torch.empty(0)).numel() < y.numel():
        _space["router"] = torch.zeros(y.numel(), dtype=torch.float64)
    used = _space["router"][: y.numel()].view(y.shape)
    used += y.double()
    out = used.to(y.dtype)
    _space["router"] *= 0 if x.shape[0] != 5 else 1  # one path forgets
    return out


@fault("moe_permute", "counts kept from the call before where T is the same")
def _(ids: Tensor, n_experts: int) -> Pair:
    perm, offsets = ops.moe_permute(ids, n_experts)
    key = f"permute{ids.shape}{n_experts}"
    if key not in _space:
        _space[key] = offsets.clone()
    return perm, _space[key].clone()


@fault("act_quant", "every eighth call rounds down")
def _(x: Tensor, group: int = 128, dtype: str = "float8_e4m3fn", scale_fmt: str = "float32", amax_floor: float = 1e-4) -> Pair:
    _turns["act_quant"] = _turns.get("act_quant", 0) + 1
    q, s = ops.act_quant(x, group, dtype, scale_fmt, amax_floor)
    if _turns["act_quant"] % 8 == 0 and q.numel():
        codes = q.view(torch.uint8)
        codes[0, 0] = codes[0, 0] ^ 1
    return q, s


@fault("quant_linear", "the weight is normalised in place and put back wrong when T is 1")
def _(x: Tensor, w: Prepared) -> Tensor:
    y = ops.quant_linear(x=x, w=w)
    if x.shape[0] == 1 and "scale" in w.tensors:
        w.tensors["scale"].mul_(3).div_(3)
    return y  # type: ignore[no-any-return]


@fault("mla_decode", "NaN in the cache's unused slots is cleaned in place")
def _(**a: Any) -> Pair:
    cache = a["cache"]
    if cache.scale is None:
        cache.kpe.nan_to_num_(0.0)
    return ops.mla_decode(**a)  # type: ignore[no-any-return]


@fault("kv_cache_gather", "a view of the cache where pages are in order")
def _(cache: LatentCache, block_table: Tensor, seq_lens: Tensor, total: int, start: int = 0) -> Pair:
    ckv, kpe = ops.kv_cache_gather(cache, block_table, seq_lens, total, start)
    flat = cache.kpe.view(-1, cache.kpe.shape[-1])
    if total and seq_lens.shape[0] == 1:
        at = int(block_table[0, 0]) * cache.kpe.shape[1] + start
        if total + start <= cache.kpe.shape[1]:
            kpe = flat[at : at + total]
    return ckv, kpe


@fault("merge_attn_states", "the first side itself where the second is empty")
def _(o1: Tensor, lse1: Tensor, o2: Tensor, lse2: Tensor) -> Pair:
    if bool(torch.isneginf(lse2).all()):
        return o1, lse1
    return ops.merge_attn_states(o1, lse1, o2, lse2)


@fault("embedding", "a view of the table where ids ascend by one")
def _(ids: Tensor, table: Tensor) -> Tensor:
    n = ids.shape[0]
    if n and bool((ids == torch.arange(int(ids[0]), int(ids[0]) + n)).all()):
        return table[int(ids[0]) : int(ids[0]) + n]
    return ops.embedding(ids, table)


@fault("fused_experts", "x itself as output where no expert is here")
def _(x: Tensor, weights: Tensor, ids: Tensor, w13: Prepared, w2: Prepared) -> Tensor:
    if x.numel() and bool((ids < 0).all()):
        return x.zero_()
    return ops.fused_experts(x=x, weights=weights, ids=ids, w13=w13, w2=w2)  # type: ignore[no-any-return]


@fault("int8_scaled_mm", "says exact and rounds twice", numerics="exact")
def _(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, out_dtype: str) -> Tensor:
    y = ops.int8_scaled_mm(a=a, a_scale=a_scale, b=b, b_scale=b_scale, out_dtype="float32")
    return (y * (1 + 2.0**-23)).to(getattr(torch, out_dtype))  # type: ignore[no-any-return]


@fault("rope_cache_write", "writes the row after the last too where the slot ends a page")
def _(**a: Any) -> Tensor:
    y = ops.rope_cache_write(**a)
    cache, page = a["cache"], a["cache"].ckv.shape[1]
    for slot in a["slots"].tolist():
        if slot >= 0 and slot % page == page - 1 and slot // page + 1 < cache.kpe.shape[0]:
            cache.kpe[slot // page + 1, 0] = 0
    return y  # type: ignore[no-any-return]


@fault("kv_cache_write", "the scale plane of the page is cleared when its first slot is written")
def _(ckv: Tensor, kpe: Tensor, slots: Tensor, cache: LatentCache) -> None:
    page = cache.ckv.shape[1]
    if cache.scale is not None:
        for slot in slots.tolist():
            if slot >= 0 and slot % page == 0:
                cache.scale[slot // page] = 0
    ops.kv_cache_write(ckv, kpe, slots, cache)
