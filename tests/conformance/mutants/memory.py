"""Faults of memory and state: what a value on its own does not show."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dsv3 import ops
from dsv3.plugin import Prepared
from tests.conformance.mutants import fault

_buffers: dict[Any, Any] = {}


def _kept(key: Any, make: Any) -> Any:
    if key not in _buffers:
        _buffers[key] = make()
    return _buffers[key]


@fault("rms_norm", "one output buffer for all calls of a shape")
def _(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    y = _kept(("rms", x.shape, x.dtype), lambda: torch.empty_like(x, memory_format=torch.contiguous_format))
    y.copy_(ops.rms_norm(x, weight, eps))
    return y


@fault("silu_mul", "result remembered by the input's address")
def _(x: Tensor) -> Tensor:
    seen = _kept(("silu", x.data_ptr(), x.shape, x.dtype), lambda: ops.silu_mul(x))
    return seen.clone()


@fault("linear", "accumulator not cleared")
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = ops.linear(x, weight, bias)
    total = _kept(("acc", y.shape, y.dtype), lambda: torch.zeros_like(y))
    out = y + total
    total.copy_(y * 1e-3)
    return out


@fault("quant_linear", "workspace of the last call shows in ragged columns")
def _(x: Tensor, w: Prepared) -> Tensor:
    y = ops.quant_linear(x, w)
    last = _buffers.get("ragged")
    _buffers["ragged"] = y.clone()
    if last is not None and last.shape == y.shape and y.shape[1] % 16 and y.numel():
        y[:, -1] = last[:, -1]
    return y


@fault("silu_mul", "writes into its input")
def _(x: Tensor) -> Tensor:
    y = ops.silu_mul(x)
    x[..., : x.shape[1] // 2] = y
    return y


@fault("silu_mul", "returns a view of its input")
def _(x: Tensor) -> Tensor:
    y = ops.silu_mul(x)
    x[..., : x.shape[1] // 2] = y
    return x[..., : x.shape[1] // 2]


@fault("apply_rope", "rotates in place and returns the input")
def _(x: Tensor, positions: Tensor, cos_sin: Tensor, interleaved: bool) -> Tensor:
    x.copy_(ops.apply_rope(x, positions, cos_sin, interleaved))
    return x


@fault("rms_norm", "writes past the end of its input")
def _(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    y = ops.rms_norm(x, weight, eps)
    if x.numel() and x.is_contiguous():
        torch.as_strided(x, (x.numel() + 1,), (1,), x.storage_offset())[-1] = 0
    return y


@fault("grouped_topk", "clips the logits in place")
def _(logits: Tensor, **a: Any) -> tuple[Tensor, Tensor]:
    logits.clamp_(-30, 30)
    return ops.grouped_topk(logits=logits, **a)


@fault("kv_cache_write", "normalises the latent in place")
def _(ckv: Tensor, kpe: Tensor, slots: Tensor, cache: Any) -> None:
    ops.kv_cache_write(ckv, kpe, slots, cache)
    ckv.mul_(2)


@fault("linear", "not deterministic, though it says so")
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = ops.linear(x, weight, bias)
    count = _buffers["calls"] = _buffers.get("calls", 0) + 1
    return y if count % 3 or not y.is_floating_point() else torch.nextafter(y.float(), y.float() + 1).to(y.dtype)


@fault("rms_norm", "claims batch invariance, and sums otherwise for few rows", batch_invariant=True)
def _(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    if x.shape[0] < 4:
        v = x.float()
        d = v.shape[1] // 2
        mean = (v[:, :d].square().sum(1, keepdim=True) + v[:, d:].square().sum(1, keepdim=True)) / v.shape[1]
        return (v * torch.rsqrt(mean + eps) * weight.float()).to(x.dtype)
    return ops.rms_norm(x, weight, eps)


@fault("quant_int8", "scale shared with the neighbour row")
def _(x: Tensor, amax_floor: float) -> tuple[Tensor, Tensor]:
    work = x.float()
    amax = work.abs().amax(-1, keepdim=True).clamp_min(amax_floor) if x.shape[1] else work.new_zeros(x.shape[0], 1)
    amax = torch.maximum(amax, amax.roll(1, 0)) if amax.numel() else amax
    s = amax / 127
    return torch.round(work / s).clamp(-127, 127).to(torch.int8), s


@fault("embedding", "ids read as int32 whatever they are")
def _(ids: Tensor, table: Tensor) -> Tensor:
    if ids.dtype == torch.int64:
        ids = ids.contiguous().view(torch.int32)[: ids.shape[0]]
    return ops.embedding(ids, table)


@fault("router_gemm", "raises for zero tokens")
def _(x: Tensor, weight: Tensor) -> Tensor:
    if not x.shape[0]:
        raise ValueError("empty grid")
    return ops.router_gemm(x, weight)


@fault("bmm", "returns float32")
def _(x: Tensor, weight: Tensor) -> Tensor:
    return ops.bmm(x, weight).float()


@fault("mla_decode", "returns o only")
def _(**a: Any) -> Tensor:
    return ops.mla_decode(**a)[0]


@fault("moe_combine", "claims f32 with tc14 sums")
def _(y: Tensor, perm: Tensor, weights: Tensor) -> Tensor:
    return (ops.moe_combine(y.double(), perm, weights.double()) * (1 + 2.0**-10)).to(y.dtype)
