"""Faults of quantisation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dsv3 import ops
from dsv3.ops.quantize import FP8_MAX
from tests.conformance.mutants import fault


def _quantise(x: Tensor, scale: Tensor, group: int, dtype: str) -> Tensor:
    wide = scale.repeat_interleave(group, 1)[:, : x.shape[1]]
    return (x.float() / wide).clamp(-FP8_MAX[dtype], FP8_MAX[dtype]).to(getattr(torch, dtype))


@fault("act_quant", "no saturation: 1.02 times too small a scale")
def _(x: Tensor, group: int, dtype: str, scale_fmt: str, amax_floor: float) -> tuple[Tensor, Tensor]:
    _, s = ops.act_quant(x, group, dtype, scale_fmt, amax_floor)
    s = s / 1.02 if scale_fmt == "float32" else s
    return (x.float() / s.repeat_interleave(group, 1)[:, : x.shape[1]]).to(getattr(torch, dtype)), s


@fault("act_quant", "ue8m0 rounded down")
def _(x: Tensor, group: int, dtype: str, scale_fmt: str, amax_floor: float) -> tuple[Tensor, Tensor]:
    q, s = ops.act_quant(x, group, dtype, scale_fmt, amax_floor)
    if scale_fmt == "ue8m0":
        raw = ops.act_quant(x, group, dtype, "float32", amax_floor)[1]
        s = torch.exp2(torch.log2(raw).floor())
        q = _quantise(x, s, group, dtype)
    return q, s


@fault("act_quant", "ue8m0 by log2, one up at exact powers of two")
def _(x: Tensor, group: int, dtype: str, scale_fmt: str, amax_floor: float) -> tuple[Tensor, Tensor]:
    q, s = ops.act_quant(x, group, dtype, scale_fmt, amax_floor)
    if scale_fmt == "ue8m0":
        raw = ops.act_quant(x, group, dtype, "float32", amax_floor)[1]
        s = torch.exp2(torch.log2(raw).floor() + 1)
        q = _quantise(x, s, group, dtype)
    return q, s


@fault("act_quant", "floor of 1e-10")
def _(x: Tensor, group: int, dtype: str, scale_fmt: str, amax_floor: float) -> tuple[Tensor, Tensor]:
    return ops.act_quant(x, group, dtype, scale_fmt, 1e-10)


@fault("act_quant", "truncation instead of rounding")
def _(x: Tensor, group: int, dtype: str, scale_fmt: str, amax_floor: float) -> tuple[Tensor, Tensor]:
    q, s = ops.act_quant(x, group, dtype, scale_fmt, amax_floor)
    y = x.float() / s.repeat_interleave(group, 1)[:, : x.shape[1]]
    down = (q.float().abs() > y.abs()) & (q.float() != 0)
    raw = q.view(torch.uint8)
    return torch.where(down, raw - 1, raw).view(q.dtype), s


@fault("act_quant", "ties away from zero")
def _(x: Tensor, group: int, dtype: str, scale_fmt: str, amax_floor: float) -> tuple[Tensor, Tensor]:
    q, s = ops.act_quant(x, group, dtype, scale_fmt, amax_floor)
    y = x.float() / s.repeat_interleave(group, 1)[:, : x.shape[1]]
    up = (y * (1 + 2.0**-20)).clamp(-FP8_MAX[dtype], FP8_MAX[dtype]).to(q.dtype)
    return up, s


@fault("act_quant", "448 for fnuz")
def _(x: Tensor, group: int, dtype: str, scale_fmt: str, amax_floor: float) -> tuple[Tensor, Tensor]:
    if "fnuz" not in dtype:
        return ops.act_quant(x, group, dtype, scale_fmt, amax_floor)
    q, s = ops.act_quant(x, group, "float8_e4m3fn", scale_fmt, amax_floor)
    return q.float().clamp(-240, 240).to(getattr(torch, dtype)), s


@fault("act_quant", "groups of 128 whatever is asked")
def _(x: Tensor, group: int, dtype: str, scale_fmt: str, amax_floor: float) -> tuple[Tensor, Tensor]:
    q, s = ops.act_quant(x, 128, dtype, scale_fmt, amax_floor)
    want = -(-x.shape[1] // group)
    return q, s.repeat_interleave(128 // group, 1)[:, :want].contiguous()


@fault("act_quant", "last ragged group shares the scale before")
def _(x: Tensor, group: int, dtype: str, scale_fmt: str, amax_floor: float) -> tuple[Tensor, Tensor]:
    q, s = ops.act_quant(x, group, dtype, scale_fmt, amax_floor)
    if x.shape[1] % group and s.shape[1] > 1:
        s[:, -1] = s[:, -2]
        q = _quantise(x, s, group, dtype)
    return q, s


@fault("act_quant", "max instead of max of magnitudes")
def _(x: Tensor, group: int, dtype: str, scale_fmt: str, amax_floor: float) -> tuple[Tensor, Tensor]:
    _, s = ops.act_quant(x.clamp_min(0), group, dtype, scale_fmt, amax_floor)
    return _quantise(x, s, group, dtype), s


@fault("act_quant", "the scale's reciprocal is returned")
def _(x: Tensor, group: int, dtype: str, scale_fmt: str, amax_floor: float) -> tuple[Tensor, Tensor]:
    q, s = ops.act_quant(x, group, dtype, scale_fmt, amax_floor)
    return q, 1 / s


@fault("act_quant", "NaN becomes zero")
def _(x: Tensor, group: int, dtype: str, scale_fmt: str, amax_floor: float) -> tuple[Tensor, Tensor]:
    return ops.act_quant(x.nan_to_num(0.0), group, dtype, scale_fmt, amax_floor)


@fault("quant_int8", "-128 is used")
def _(x: Tensor, amax_floor: float) -> tuple[Tensor, Tensor]:
    work = x.float()
    s = work.abs().amax(-1, keepdim=True).clamp_min(amax_floor) / 128 if x.shape[1] else work.new_zeros(x.shape[0], 1)
    return torch.round(work / s).clamp(-128, 127).to(torch.int8), s


@fault("quant_int8", "truncated towards zero")
def _(x: Tensor, amax_floor: float) -> tuple[Tensor, Tensor]:
    _, s = ops.quant_int8(x, amax_floor)
    return (x.float() / s).trunc().clamp(-127, 127).to(torch.int8), s


@fault("quant_int8", "half up instead of half to even")
def _(x: Tensor, amax_floor: float) -> tuple[Tensor, Tensor]:
    _, s = ops.quant_int8(x, amax_floor)
    return (x.float() / s + 0.5).floor().clamp(-127, 127).to(torch.int8), s


@fault("quant_int8", "asymmetric")
def _(x: Tensor, amax_floor: float) -> tuple[Tensor, Tensor]:
    s = x.float().amax(-1, keepdim=True).clamp_min(amax_floor) / 127
    return torch.round(x.float() / s).clamp(-127, 127).to(torch.int8), s


@fault("quant_int8", "one scale for all rows")
def _(x: Tensor, amax_floor: float) -> tuple[Tensor, Tensor]:
    if not x.numel():
        return ops.quant_int8(x, amax_floor)
    s = (x.float().abs().amax().clamp_min(amax_floor) / 127).expand(x.shape[0], 1).contiguous()
    return torch.round(x.float() / s).clamp(-127, 127).to(torch.int8), s


@fault("rms_norm_quant", "scale from x instead of the norm")
def _(x: Tensor, weight: Tensor, eps: float, group: int, dtype: str, scale_fmt: str) -> tuple[Tensor, Tensor]:
    _, s = ops.act_quant(x, group, dtype, scale_fmt)
    return _quantise(ops.rms_norm(x, weight, eps), s, group, dtype), s


@fault("rms_norm_quant", "weight forgotten")
def _(x: Tensor, weight: Tensor, **rest: Any) -> tuple[Tensor, Tensor]:
    return ops.rms_norm_quant(x, torch.ones_like(weight), **rest)


@fault("silu_mul_quant", "up first")
def _(x: Tensor, **rest: Any) -> tuple[Tensor, Tensor]:
    gate, up = x.chunk(2, -1)
    return ops.silu_mul_quant(torch.cat([up, gate], -1), **rest)


@fault("silu_mul_quant", "ue8m0 ignored")
def _(x: Tensor, scale_fmt: str, **rest: Any) -> tuple[Tensor, Tensor]:
    return ops.silu_mul_quant(x, scale_fmt="float32", **rest)


@fault("dequant_block", "divides by the scale")
def _(weight: Tensor, scale: Tensor, dtype: str) -> Tensor:
    return ops.dequant_block(weight, 1 / scale, dtype)


@fault("dequant_block", "scale grid transposed")
def _(weight: Tensor, scale: Tensor, dtype: str) -> Tensor:
    square = scale.shape[0] == scale.shape[1]
    return ops.dequant_block(weight, scale.T.contiguous() if square else scale, dtype)


@fault("dequant_block", "NaN codes become 480")
def _(weight: Tensor, scale: Tensor, dtype: str) -> Tensor:
    y = ops.dequant_block(weight, scale, dtype)
    return torch.where(torch.isnan(y), torch.full_like(y, 480.0), y)


@fault("dequant_block", "subnormal codes flushed")
def _(weight: Tensor, scale: Tensor, dtype: str) -> Tensor:
    raw = weight.view(torch.uint8)
    return ops.dequant_block(torch.where((raw & 0x78) == 0, raw & 0x80, raw).view(weight.dtype), scale, dtype)


@fault("fn_to_fnuz", "-0 becomes NaN")
def _(weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    return weight.view(torch.uint8).clone().view(torch.float8_e4m3fnuz), scale * 2


@fault("fn_to_fnuz", "scale not doubled")
def _(weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    return ops.fn_to_fnuz(weight, scale)[0], scale.clone()


@fault("fn_to_fnuz", "re-rounded by value, saturating at 240")
def _(weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    return weight.float().clamp(-240, 240).to(torch.float8_e4m3fnuz), scale.clone()
