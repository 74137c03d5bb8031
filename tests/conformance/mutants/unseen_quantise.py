"""Further faults of quantisation."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from dsv3 import ops
from dsv3.quant.fp8 import power_of_two_at_least
from tests.conformance.mutants import fault

Pair = tuple[Tensor, Tensor]
LARGEST = {"float8_e4m3fn": 448.0, "float8_e4m3fnuz": 224.0}


def _quant(x: Tensor, group: int, dtype: str, fmt: str, floor: float, amax=None, q=None, scale=None) -> Pair:  # type: ignore[no-untyped-def]
    """act_quant with steps replaced: amax of groups [T, G, group], scale of that, codes of (groups, scale)."""
    t, k = x.shape
    groups, largest = -(-k // group), LARGEST[dtype]
    work = pad(x.float(), (0, groups * group - k)).view(t, groups, group)
    top = (amax or (lambda w: w.abs().amax(-1)))(work)
    s = (scale or (lambda a: a.clamp_min(floor) / largest))(top)
    s = power_of_two_at_least(s) if fmt == "ue8m0" else s
    codes = (q or (lambda w, s: w / s[..., None]))(work, s).clamp(-largest, largest)
    return codes.reshape(t, groups * group)[:, :k].to(getattr(torch, dtype)), s


Args = tuple[Tensor, int, str, str, float]


@fault("act_quant", "multiplied by an 12-bit reciprocal of the scale")
def _(x: Tensor, group: int = 128, dtype: str = "float8_e4m3fn", scale_fmt: str = "float32", amax_floor: float = 1e-4) -> Pair:
    def q(w: Tensor, s: Tensor) -> Tensor:
        m, e = torch.frexp(1 / s)
        return w * torch.ldexp((m * 4096).round() / 4096, e)[..., None]

    return _quant(x, group, dtype, scale_fmt, amax_floor, q=q)


@fault("act_quant", "codes rounded through bf16 first")
def _(x: Tensor, group: int = 128, dtype: str = "float8_e4m3fn", scale_fmt: str = "float32", amax_floor: float = 1e-4) -> Pair:
    return _quant(x, group, dtype, scale_fmt, amax_floor, q=lambda w, s: (w / s[..., None]).bfloat16().float())


@fault("act_quant", "codes rounded through float16 first")
def _(x: Tensor, group: int = 128, dtype: str = "float8_e4m3fn", scale_fmt: str = "float32", amax_floor: float = 1e-4) -> Pair:
    return _quant(x, group, dtype, scale_fmt, amax_floor, q=lambda w, s: (w / s[..., None]).half().float())


@fault("act_quant", "subnormal codes flushed")
def _(x: Tensor, group: int = 128, dtype: str = "float8_e4m3fn", scale_fmt: str = "float32", amax_floor: float = 1e-4) -> Pair:
    low = 2.0**-6 if dtype == "float8_e4m3fn" else 2.0**-7

    def q(w: Tensor, s: Tensor) -> Tensor:
        y = w / s[..., None]
        return torch.where(y.abs() < low * 0.97, torch.zeros_like(y), y)

    return _quant(x, group, dtype, scale_fmt, amax_floor, q=q)


@fault("act_quant", "ue8m0: the floor is applied after rounding")
def _(x: Tensor, group: int = 128, dtype: str = "float8_e4m3fn", scale_fmt: str = "float32", amax_floor: float = 1e-4) -> Pair:
    s = ops.act_quant(x, group, dtype, scale_fmt, 1e-30)[1]
    if scale_fmt != "ue8m0":
        return ops.act_quant(x, group, dtype, scale_fmt, amax_floor)  # type: ignore[no-any-return]
    s = s.clamp_min(amax_floor / LARGEST[dtype])
    return _quant(x, group, dtype, "float32", amax_floor, scale=lambda a: s)


@fault("act_quant", "ue8m0 rounded to the nearest power of two, codes saturate")
def _(x: Tensor, group: int = 128, dtype: str = "float8_e4m3fn", scale_fmt: str = "float32", amax_floor: float = 1e-4) -> Pair:
    if scale_fmt != "ue8m0":
        return ops.act_quant(x, group, dtype, scale_fmt, amax_floor)  # type: ignore[no-any-return]
    return _quant(x, group, dtype, "float32", amax_floor,
                  scale=lambda a: torch.exp2(torch.log2(a.clamp_min(amax_floor) / LARGEST[dtype]).round()))  # fmt: skip


@fault("act_quant", "a NaN makes the whole row NaN")
def _(x: Tensor, group: int = 128, dtype: str = "float8_e4m3fn", scale_fmt: str = "float32", amax_floor: float = 1e-4) -> Pair:
    rows = torch.isnan(x).any(-1, keepdim=True)
    return ops.act_quant(torch.where(rows, torch.full_like(x, math.nan), x), group, dtype, scale_fmt, amax_floor)


@fault("act_quant", "a NaN alone in a group is saturated")
def _(x: Tensor, group: int = 128, dtype: str = "float8_e4m3fn", scale_fmt: str = "float32", amax_floor: float = 1e-4) -> Pair:
    whole = torch.isnan(x).all(-1, keepdim=True)
    return ops.act_quant(torch.where(whole, x, x.nan_to_num(0.0)), group, dtype, scale_fmt, amax_floor)


@fault("act_quant", "the ragged group of fnuz with 240")
def _(x: Tensor, group: int = 128, dtype: str = "float8_e4m3fn", scale_fmt: str = "float32", amax_floor: float = 1e-4) -> Pair:
    if dtype != "float8_e4m3fnuz":
        return ops.act_quant(x, group, dtype, scale_fmt, amax_floor)  # type: ignore[no-any-return]

    def scale(a: Tensor) -> Tensor:
        s = a.clamp_min(amax_floor) / 224
        if x.shape[1] % group:
            s[:, -1] = s[:, -1] * 224 / 240
        return s

    return _quant(x, group, dtype, scale_fmt, amax_floor, scale=scale)


@fault("act_quant", "groups of 64 with ue8m0 take a scale for two groups")
def _(x: Tensor, group: int = 128, dtype: str = "float8_e4m3fn", scale_fmt: str = "float32", amax_floor: float = 1e-4) -> Pair:
    if group == 64 and scale_fmt == "ue8m0" and x.shape[1] > 64:
        _, wide = ops.act_quant(x, 128, dtype, scale_fmt, amax_floor)
        s = wide.repeat_interleave(2, -1)[:, : -(-x.shape[1] // 64)]
        return _quant(x, group, dtype, "float32", amax_floor, scale=lambda a: s)
    return ops.act_quant(x, group, dtype, scale_fmt, amax_floor)  # type: ignore[no-any-return]


@fault("act_quant", "rows past 512 use the scale of row 511")
def _(x: Tensor, group: int = 128, dtype: str = "float8_e4m3fn", scale_fmt: str = "float32", amax_floor: float = 1e-4) -> Pair:
    q, s = ops.act_quant(x, group, dtype, scale_fmt, amax_floor)
    s[512:] = s[511:512]
    return q, s


@fault("act_quant", "columns past 4096 in one group")
def _(x: Tensor, group: int = 128, dtype: str = "float8_e4m3fn", scale_fmt: str = "float32", amax_floor: float = 1e-4) -> Pair:
    q, s = ops.act_quant(x, group, dtype, scale_fmt, amax_floor)
    s[:, 4096 // group :] = s[:, 4096 // group : 4096 // group + 1]
    return q, s


@fault("act_quant", "the floor of 1e-4 whatever is asked")
def _(x: Tensor, group: int = 128, dtype: str = "float8_e4m3fn", scale_fmt: str = "float32", amax_floor: float = 1e-4) -> Pair:
    return ops.act_quant(x, group, dtype, scale_fmt, 1e-4)


@fault("act_quant", "halves away from zero")
def _(x: Tensor, group: int = 128, dtype: str = "float8_e4m3fn", scale_fmt: str = "float32", amax_floor: float = 1e-4) -> Pair:
    return _quant(x, group, dtype, scale_fmt, amax_floor, q=lambda w, s: w / s[..., None] * (1 + 2.0**-20))


@fault("act_quant", "amax in float16 overflows")
def _(x: Tensor, group: int = 128, dtype: str = "float8_e4m3fn", scale_fmt: str = "float32", amax_floor: float = 1e-4) -> Pair:
    def amax(w: Tensor) -> Tensor:
        a = w.abs().amax(-1)
        return torch.where(a > 65504, torch.full_like(a, 65504.0), a)

    return _quant(x, group, dtype, scale_fmt, amax_floor, amax=amax)


@fault("quant_int8", "half up")
def _(x: Tensor, amax_floor: float = 1e-10) -> Pair:
    s = ops.quant_int8(x, amax_floor)[1]
    return torch.floor(x.float() / s + 0.5).clamp(-127, 127).to(torch.int8), s


@fault("quant_int8", "rounded through bf16")
def _(x: Tensor, amax_floor: float = 1e-10) -> Pair:
    s = ops.quant_int8(x, amax_floor)[1]
    return torch.round((x.float() / s).bfloat16().float()).clamp(-127, 127).to(torch.int8), s


@fault("quant_int8", "amax over the first 4096 columns")
def _(x: Tensor, amax_floor: float = 1e-10) -> Pair:
    s = ops.quant_int8(x[:, :4096], amax_floor)[1]
    return torch.round(x.float() / s).clamp(-127, 127).to(torch.int8), s


@fault("quant_int8", "scale by 128 where the largest is negative")
def _(x: Tensor, amax_floor: float = 1e-10) -> Pair:
    s = ops.quant_int8(x, amax_floor)[1]
    negative = (-x.float()).amax(-1, keepdim=True) > x.float().amax(-1, keepdim=True)
    s = torch.where(negative, s * 127 / 128, s)
    return torch.round(x.float() / s).clamp(-127, 127).to(torch.int8), s


@fault("quant_int8", "rows past 256 swapped in pairs")
def _(x: Tensor, amax_floor: float = 1e-10) -> Pair:
    q, s = ops.quant_int8(x, amax_floor)
    s[256:] = s[256:].flip(0)
    return q, s


@fault("quant_int8", "scale from bf16 amax rounded down for float32")
def _(x: Tensor, amax_floor: float = 1e-10) -> Pair:
    s = x.float().abs().amax(-1, keepdim=True).bfloat16().float().clamp_min(amax_floor) / 127
    return torch.round(x.float() / s).clamp(-127, 127).to(torch.int8), s


@fault("rms_norm_quant", "group 64 read as 128 in ue8m0")
def _(x: Tensor, weight: Tensor, eps: float, group: int, dtype: str, scale_fmt: str) -> Pair:
    y = ops.rms_norm(x, weight, eps)
    if group == 64 and scale_fmt == "ue8m0":
        _, s = ops.act_quant(y, 128, dtype, scale_fmt)
        wide = s.repeat_interleave(2, -1)[:, : -(-x.shape[1] // 64)]
        return _quant(y, group, dtype, "float32", 1e-4, scale=lambda a: wide)
    return ops.act_quant(y, group, dtype, scale_fmt)  # type: ignore[no-any-return]


@fault("rms_norm_quant", "the floor of 1e-10")
def _(x: Tensor, weight: Tensor, eps: float, group: int, dtype: str, scale_fmt: str) -> Pair:
    return ops.act_quant(ops.rms_norm(x, weight, eps), group, dtype, scale_fmt, 1e-10)  # type: ignore[no-any-return]


@fault("rms_norm_quant", "scale of the norm before the weight")
def _(x: Tensor, weight: Tensor, eps: float, group: int, dtype: str, scale_fmt: str) -> Pair:
    plain = ops.rms_norm(x, torch.ones_like(weight), eps)
    s = ops.act_quant(plain, group, dtype, scale_fmt)[1]
    return _quant(ops.rms_norm(x, weight, eps), group, dtype, "float32", 1e-4, scale=lambda a: s)


@fault("rms_norm_quant", "a NaN row becomes zeros")
def _(x: Tensor, weight: Tensor, eps: float, group: int, dtype: str, scale_fmt: str) -> Pair:
    return ops.act_quant(ops.rms_norm(x, weight, eps).nan_to_num(0.0), group, dtype, scale_fmt)  # type: ignore[no-any-return]


@fault("rms_norm_quant", "one tile of 1024 columns for the mean")
def _(x: Tensor, weight: Tensor, eps: float, group: int, dtype: str, scale_fmt: str) -> Pair:
    v = x.float()
    inverse = torch.rsqrt(v[:, :1024].square().sum(-1, keepdim=True) / x.shape[1] + eps)
    return ops.act_quant((v * inverse * weight.float()).to(x.dtype), group, dtype, scale_fmt)  # type: ignore[no-any-return]


@fault("silu_mul_quant", "the floor of 1e-10")
def _(x: Tensor, group: int, dtype: str, scale_fmt: str) -> Pair:
    return ops.act_quant(ops.silu_mul(x), group, dtype, scale_fmt, 1e-10)  # type: ignore[no-any-return]


@fault("silu_mul_quant", "activation saturated at 448 before the scale")
def _(x: Tensor, group: int, dtype: str, scale_fmt: str) -> Pair:
    return ops.act_quant(ops.silu_mul(x).clamp(-448, 448), group, dtype, scale_fmt)  # type: ignore[no-any-return]


@fault("silu_mul_quant", "rows past 200 not activated")
def _(x: Tensor, group: int, dtype: str, scale_fmt: str) -> Pair:
    y = ops.silu_mul(x)
    y[200:] = x[200:, : y.shape[1]]
    return ops.act_quant(y, group, dtype, scale_fmt)  # type: ignore[no-any-return]


@fault("silu_mul_quant", "a NaN becomes the largest code")
def _(x: Tensor, group: int, dtype: str, scale_fmt: str) -> Pair:
    return ops.act_quant(ops.silu_mul(x).nan_to_num(448.0), group, dtype, scale_fmt)  # type: ignore[no-any-return]


@fault("dequant_block", "block rows past 4 read scale row 4")
def _(weight: Tensor, scale: Tensor, dtype: str = "bfloat16") -> Tensor:
    s = scale.clone()
    s[5:] = s[4:5]
    return ops.dequant_block(weight, s, dtype)


@fault("dequant_block", "block columns past 4 read scale column 4")
def _(weight: Tensor, scale: Tensor, dtype: str = "bfloat16") -> Tensor:
    s = scale.clone()
    s[:, 5:] = s[:, 4:5]
    return ops.dequant_block(weight, s, dtype)


@fault("dequant_block", "scale rounded to bf16 for bf16")
def _(weight: Tensor, scale: Tensor, dtype: str = "bfloat16") -> Tensor:
    return ops.dequant_block(weight, scale.bfloat16().float() if dtype == "bfloat16" else scale, dtype)


@fault("dequant_block", "truncated to bf16")
def _(weight: Tensor, scale: Tensor, dtype: str = "bfloat16") -> Tensor:
    y = ops.dequant_block(weight, scale, "float32")
    return (y.view(torch.int32) & -65536).view(torch.float32).bfloat16() if dtype == "bfloat16" else y.to(getattr(torch, dtype))


@fault("dequant_block", "NaN code 0xFF read as -480")
def _(weight: Tensor, scale: Tensor, dtype: str = "bfloat16") -> Tensor:
    codes = weight.view(torch.uint8)
    y = ops.dequant_block(weight, scale, "float32")
    odd = ops.dequant_block(torch.full_like(codes, 0xFE).view(weight.dtype), scale, "float32") / 448 * 480
    return torch.where(codes == 0xFF, odd, y).to(getattr(torch, dtype))


@fault("fn_to_fnuz", "scale doubled in bf16")
def _(weight: Tensor, scale: Tensor) -> Pair:
    return ops.fn_to_fnuz(weight, scale)[0], (scale.bfloat16() * 2).float()


@fault("fn_to_fnuz", "-0 of the last column stays NaN")
def _(weight: Tensor, scale: Tensor) -> Pair:
    w, s = ops.fn_to_fnuz(weight, scale)
    codes = w.view(torch.uint8)
    codes[..., -1] = torch.where(weight.view(torch.uint8)[..., -1] == 0x80, 0x80, codes[..., -1])
    return w, s


@fault("fn_to_fnuz", "converted by value and saturated at 240")
def _(weight: Tensor, scale: Tensor) -> Pair:
    values = weight.float().clamp(-240, 240)
    return values.to(torch.float8_e4m3fnuz), scale.clone()


@fault("fn_to_fnuz", "scale of a fourth dimension lost: only the first 65536 codes")
def _(weight: Tensor, scale: Tensor) -> Pair:
    w, s = ops.fn_to_fnuz(weight, scale)
    w.view(torch.uint8).view(-1)[65536:] = 0
    return w, s
