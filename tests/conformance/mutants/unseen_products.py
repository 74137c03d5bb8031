"""Further faults of the products."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from dsv3 import ops
from dsv3.plugin import Prepared
from dsv3.quant import dequantize
from dsv3.quant.fp8 import decode
from tests.conformance.mutants import fault

F = torch.float32


def _w(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else F


def _mm(x: Tensor, w: Tensor) -> Tensor:
    return x.to(_w(x)) @ w.to(_w(x)).T


@fault("linear", "K past 4096 dropped")
def _(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return ops.linear(x[:, :4096], weight[:, :4096], bias)


@fault("linear", "N past 1024 wraps")
def _(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    y = ops.linear(x, weight, bias)
    y[:, 1024:] = y[:, : max(y.shape[1] - 1024, 0)]
    return y


@fault("linear", "T past 256 is not computed")
def _(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    y = ops.linear(x, weight, bias)
    y[256:] = 0
    return y


@fault("linear", "no bias where T is over 64")
def _(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return ops.linear(x, weight, bias if x.shape[0] <= 64 else None)


@fault("linear", "bias added after rounding to bf16")
def _(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    y = ops.linear(x, weight)
    return y if bias is None else (y.bfloat16().to(x.dtype) + bias).to(x.dtype)


@fault("linear", "sum in tf32")
def _(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    def cut(t: Tensor) -> Tensor:
        return (t.float().view(torch.int32) & -8192).view(F).to(_w(x))

    y = cut(x.contiguous()) @ cut(weight.contiguous()).T if x.dtype == F else _mm(x, weight)
    return (y if bias is None else y + bias.to(y.dtype)).to(x.dtype)


@fault("linear", "split K partial sums in bf16 where K is over 2048")
def _(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if x.shape[1] <= 2048:
        return ops.linear(x, weight, bias)
    y = sum(_mm(x[:, k : k + 1024], weight[:, k : k + 1024]).bfloat16().to(_w(x)) for k in range(0, x.shape[1], 1024))
    return (y if bias is None else y + bias.to(_w(x))).to(x.dtype)  # type: ignore[union-attr]


@fault("linear", "batch invariant is claimed, one row goes another way", batch_invariant=True)
def _(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if x.shape[0] > 1 or x.shape[1] < 8:
        return _rows(x, weight, bias)
    half = x.shape[1] // 2
    y = _mm(x[:, :half], weight[:, :half]) + _mm(x[:, half:], weight[:, half:])
    return (y if bias is None else y + bias.to(y.dtype)).to(x.dtype)


@fault("linear", "batch invariant is claimed, up to 16 rows split K", batch_invariant=True)
def _(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if x.shape[0] > 16 or x.shape[1] < 8:
        return _rows(x, weight, bias)
    half = x.shape[1] // 2
    y = _rows(x[:, :half].to(_w(x)), weight[:, :half].to(_w(x)), None) + _rows(
        x[:, half:].to(_w(x)), weight[:, half:].to(_w(x)), None
    )
    return (y if bias is None else y + bias.to(y.dtype)).to(x.dtype)


def _rows(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """One row at a time: the same bits in any batch."""
    if x.shape[0] == 0:
        return ops.linear(x, weight, bias)
    return torch.cat([ops.linear(x[i : i + 1].clone(), weight, bias) for i in range(x.shape[0])])


@fault("bmm", "heads past 64 take weight of head 64")
def _(x: Tensor, weight: Tensor) -> Tensor:
    w = weight.clone()
    w[65:] = w[64:65]
    return ops.bmm(x, w)


@fault("bmm", "C past 256 zero")
def _(x: Tensor, weight: Tensor) -> Tensor:
    y = ops.bmm(x, weight)
    y[..., 256:] = 0
    return y


@fault("bmm", "weight strides read as if A was the last")
def _(x: Tensor, weight: Tensor) -> Tensor:
    h, a, c = weight.shape
    if weight.stride(1) == 1 and a > 1 and c > 1:  # W_UK as a view: A runs fastest
        weight = weight.transpose(1, 2).reshape(h, a, c)
    return ops.bmm(x, weight)


@fault("bmm", "A rounded down to a multiple of 8")
def _(x: Tensor, weight: Tensor) -> Tensor:
    a = x.shape[2] // 8 * 8
    return ops.bmm(x[..., :a], weight[:, :a])


@fault("bmm", "T past 100 uses token 100")
def _(x: Tensor, weight: Tensor) -> Tensor:
    y = ops.bmm(x, weight)
    y[101:] = y[100:101]
    return y


@fault("bmm", "partial sums in bf16 for bf16")
def _(x: Tensor, weight: Tensor) -> Tensor:
    half = x.shape[2] // 2
    return ops.bmm(x[..., :half], weight[:, :half]) + ops.bmm(x[..., half:], weight[:, half:])


@fault("router_gemm", "experts past 256 zero")
def _(x: Tensor, weight: Tensor) -> Tensor:
    y = ops.router_gemm(x, weight)
    y[:, 256:] = 0
    return y


@fault("router_gemm", "K past 4096 dropped")
def _(x: Tensor, weight: Tensor) -> Tensor:
    return ops.router_gemm(x[:, :4096], weight[:, :4096])


@fault("router_gemm", "T over 256 in bf16")
def _(x: Tensor, weight: Tensor) -> Tensor:
    y = ops.router_gemm(x, weight)
    return y.bfloat16().to(y.dtype) if x.shape[0] > 256 else y


@fault("router_gemm", "weight in float16")
def _(x: Tensor, weight: Tensor) -> Tensor:
    return ops.router_gemm(x, weight.half().to(x.dtype))


def _tc14(a: Tensor, b: Tensor, every: int) -> Tensor:
    """The sum over K in steps of 32 with 14 bits, promoted to float32 every `every`."""
    total = torch.zeros(a.shape[0], b.shape[0])
    for start in range(0, a.shape[1], every):
        part = torch.zeros_like(total)
        for k in range(start, min(start + every, a.shape[1]), 32):
            part = part + a[:, k : k + 32] @ b[:, k : k + 32].T
            m, e = torch.frexp(part)
            part = torch.ldexp(torch.trunc(m * 16384) / 16384, e)
        total = total + part
    return total


def _operands(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor) -> tuple[Tensor, Tensor]:
    x = decode(a, F) * a_scale.repeat_interleave(128, -1)[:, : a.shape[1]]
    return x, ops.dequant_block(b, b_scale, "float32")


@fault("block_scaled_mm", "14 bits never promoted, and says tc14", numerics="tc14")
def _(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, out_dtype: str) -> Tensor:
    x, w = _operands(a, a_scale, b, b_scale)
    return _tc14(x, w, 1 << 20).to(getattr(torch, out_dtype))


@fault("block_scaled_mm", "14 bits promoted every 128, and says f32")
def _(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, out_dtype: str) -> Tensor:
    x, w = _operands(a, a_scale, b, b_scale)
    return _tc14(x, w, 128).to(getattr(torch, out_dtype))


@fault("block_scaled_mm", "float16 partial sums per block overflow")
def _(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, out_dtype: str) -> Tensor:
    x, w = decode(a, F), decode(b, F)
    total = torch.zeros(a.shape[0], b.shape[0])
    for i, k in enumerate(range(0, a.shape[1], 128)):
        part = (x[:, k : k + 128] @ w[:, k : k + 128].T).clamp(-65504, 65504)
        total += part * a_scale[:, i, None] * b_scale[:, i].repeat_interleave(128)[None, : b.shape[0]]
    return total.to(getattr(torch, out_dtype))


@fault("block_scaled_mm", "block columns past 8 reuse scale 8")
def _(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, out_dtype: str) -> Tensor:
    s = a_scale.clone()
    s[:, 9:] = s[:, 8:9]
    return ops.block_scaled_mm(a=a, a_scale=s, b=b, b_scale=b_scale, out_dtype=out_dtype)  # type: ignore[no-any-return]


@fault("block_scaled_mm", "block rows past 5 reuse scale row 5")
def _(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, out_dtype: str) -> Tensor:
    s = b_scale.clone()
    s[6:] = s[5:6]
    return ops.block_scaled_mm(a=a, a_scale=a_scale, b=b, b_scale=s, out_dtype=out_dtype)  # type: ignore[no-any-return]


@fault("block_scaled_mm", "product of scales in float16")
def _(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, out_dtype: str) -> Tensor:
    return ops.block_scaled_mm(a=a, a_scale=a_scale.half().float(), b=b, b_scale=b_scale, out_dtype=out_dtype)  # type: ignore[no-any-return]


@fault("block_scaled_mm", "fnuz -0 code read as zero, NaN lost")
def _(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, out_dtype: str) -> Tensor:
    codes = a.view(torch.uint8)
    top = 0x7F if a.dtype == torch.float8_e4m3fn else 0x80
    seen = torch.where((codes == 0xFF) | (codes == top), torch.zeros_like(codes), codes).view(a.dtype)
    return ops.block_scaled_mm(a=seen, a_scale=a_scale, b=b, b_scale=b_scale, out_dtype=out_dtype)  # type: ignore[no-any-return]


@fault("block_scaled_mm", "always out in bf16 and widened")
def _(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, out_dtype: str) -> Tensor:
    y = ops.block_scaled_mm(a=a, a_scale=a_scale, b=b, b_scale=b_scale, out_dtype="bfloat16")
    return y.to(getattr(torch, out_dtype))  # type: ignore[no-any-return]


@fault("int8_scaled_mm", "sum in float32, past 2^24 inexact")
def _(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, out_dtype: str) -> Tensor:
    total = torch.zeros(a.shape[0], b.shape[0])
    for k in range(a.shape[1]):  # one by one, as a sequential kernel
        total = total + a[:, k].float()[:, None] * b[:, k].float()[None]
    return (total * a_scale * b_scale.T).to(getattr(torch, out_dtype))


@fault("int8_scaled_mm", "rounded to bf16 between the scales")
def _(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, out_dtype: str) -> Tensor:
    total = (a.double() @ b.double().T).float()
    return ((total * a_scale).bfloat16().float() * b_scale.T).to(getattr(torch, out_dtype))


@fault("int8_scaled_mm", "K past 2048 dropped")
def _(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, out_dtype: str) -> Tensor:
    return ops.int8_scaled_mm(a=a[:, :2048], a_scale=a_scale, b=b[:, :2048], b_scale=b_scale, out_dtype=out_dtype)  # type: ignore[no-any-return]


@fault("int8_scaled_mm", "-128 in the weight is clamped to -127")
def _(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, out_dtype: str) -> Tensor:
    return ops.int8_scaled_mm(a=a, a_scale=a_scale, b=b.clamp(-127, 127), b_scale=b_scale, out_dtype=out_dtype)  # type: ignore[no-any-return]


def _with(w: Prepared, **tensors: Tensor) -> Prepared:
    return replace(w, tensors={**w.tensors, **tensors})


@fault("quant_linear", "int4 nibble 0 read as zero")
def _(x: Tensor, w: Prepared) -> Tensor:
    if w.quant != "int4-w4a16":
        return ops.quant_linear(x=x, w=w)  # type: ignore[no-any-return]
    raw = w.tensors["weight"]
    low, high = raw & 15, raw >> 4
    low, high = torch.where(low == 0, 8, low), torch.where(high == 0, 8, high)
    return ops.quant_linear(x=x, w=_with(w, weight=low | (high << 4)))  # type: ignore[no-any-return]


@fault("quant_linear", "int4 groups past 8 reuse scale 8")
def _(x: Tensor, w: Prepared) -> Tensor:
    if w.quant == "int4-w4a16":
        s = w.tensors["scale"].clone()
        s[:, 9:] = s[:, 8:9]
        w = _with(w, scale=s)
    return ops.quant_linear(x=x, w=w)  # type: ignore[no-any-return]


@fault("quant_linear", "int8-w8a16 rows past 512 reuse scale 512")
def _(x: Tensor, w: Prepared) -> Tensor:
    if w.quant == "int8-w8a16":
        s = w.tensors["scale"].clone()
        s[513:] = s[512:513]
        w = _with(w, scale=s)
    return ops.quant_linear(x=x, w=w)  # type: ignore[no-any-return]


@fault("quant_linear", "ue8m0 over 64 rows with plain scales")
def _(x: Tensor, w: Prepared) -> Tensor:
    return ops.quant_linear(x=x, w=replace(w, scale_fmt="float32") if x.shape[0] > 66 else w)  # type: ignore[no-any-return]


@fault("quant_linear", "fp8-w8a16 over 64 rows quantises the activations")
def _(x: Tensor, w: Prepared) -> Tensor:
    return ops.quant_linear(x=x, w=replace(w, quant="fp8-w8a8") if w.quant == "fp8-w8a16" and x.shape[0] > 130 else w)  # type: ignore[no-any-return]


@fault("quant_linear", "fp8-w8a8 one row is left in bf16")
def _(x: Tensor, w: Prepared) -> Tensor:
    return ops.quant_linear(x=x, w=replace(w, quant="fp8-w8a16") if w.quant == "fp8-w8a8" and x.shape[0] == 1 else w)  # type: ignore[no-any-return]


@fault("quant_linear", "int8 activations quantised per tensor for T <= 2")
def _(x: Tensor, w: Prepared) -> Tensor:
    if w.quant != "int8-w8a8" or not 1 < x.shape[0] <= 2:
        return ops.quant_linear(x=x, w=w)  # type: ignore[no-any-return]
    s = (x.float().abs().amax() / 127).clamp_min(1e-12)
    q = torch.round(x.float() / s)
    return ((q @ w.tensors["weight"].float().T) * s * w.tensors["scale"].T).to(x.dtype)


_DEQUANTISED: dict[int, Tensor] = {}


@fault("quant_linear", "dequantised weights kept by the address of the codes")
def _(x: Tensor, w: Prepared) -> Tensor:
    if w.quant not in ("fp8-w8a16", "int8-w8a16", "int4-w4a16"):
        return ops.quant_linear(x=x, w=w)  # type: ignore[no-any-return]
    key = w.tensors["weight"].data_ptr()
    kept = _DEQUANTISED.get(key)
    if kept is None or kept.shape != w.shape or kept.dtype != x.dtype:
        kept = _DEQUANTISED[key] = dequantize(w, x.dtype)
    return ops.linear(x, kept)


_ONCE: dict[tuple[object, ...], Tensor] = {}


@fault("quant_linear", "transposed weight kept by shape")
def _(x: Tensor, w: Prepared) -> Tensor:
    if w.quant != "none":
        return ops.quant_linear(x=x, w=w)  # type: ignore[no-any-return]
    key = (w.shape, x.dtype)
    if key not in _ONCE:
        _ONCE[key] = w.tensors["weight"].clone()
    return ops.linear(x, _ONCE[key])
