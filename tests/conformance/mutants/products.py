"""Faults of the matrix products."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from dsv3 import ops
from dsv3.plugin import Prepared
from dsv3.quant import dequantize
from dsv3.quant.fp8 import decode
from tests.conformance.mutants import fault

BLOCK = 128


def expand(scale: Tensor, n: int, k: int) -> Tensor:
    return scale.repeat_interleave(BLOCK, 0)[:n].repeat_interleave(BLOCK, 1)[:, :k]


def block_mm(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, out_dtype: str) -> Tensor:
    x = decode(a, torch.float32) * a_scale.repeat_interleave(BLOCK, 1)[:, : a.shape[1]]
    w = decode(b, torch.float32) * expand(b_scale, *b.shape)
    return (x @ w.T).to(getattr(torch, out_dtype))


@fault("block_scaled_mm", "activation scales shifted by one block")
def _(a: Tensor, a_scale: Tensor, **rest: Any) -> Tensor:
    return block_mm(a, a_scale.roll(1, 1), **rest)


@fault("block_scaled_mm", "weight scales transposed")
def _(b: Tensor, b_scale: Tensor, **rest: Any) -> Tensor:
    square = b_scale.T if b_scale.shape[0] == b_scale.shape[1] else b_scale
    return block_mm(b=b, b_scale=square.contiguous(), **rest)


@fault("block_scaled_mm", "weight scale row from n * rows / N")
def _(b: Tensor, b_scale: Tensor, **rest: Any) -> Tensor:
    rows = torch.arange(b.shape[0]) * b_scale.shape[0] // b.shape[0]
    w = decode(b, torch.float32) * b_scale[rows].repeat_interleave(BLOCK, 1)[:, : b.shape[1]]
    a, s = rest["a"], rest["a_scale"]
    x = decode(a, torch.float32) * s.repeat_interleave(BLOCK, 1)[:, : a.shape[1]]
    return (x @ w.T).to(getattr(torch, rest["out_dtype"]))


@fault("block_scaled_mm", "last K block dropped when ragged")
def _(a: Tensor, **rest: Any) -> Tensor:
    k = a.shape[1]
    a = a.clone()
    if k % BLOCK and k > BLOCK:
        a.view(torch.uint8)[:, k // BLOCK * BLOCK :] = 0
    return block_mm(a, **rest)


@fault("block_scaled_mm", "partial sums kept in bf16")
def _(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, out_dtype: str) -> Tensor:
    total = torch.zeros(a.shape[0], b.shape[0], dtype=torch.bfloat16)
    for i in range(a_scale.shape[1]):
        part = slice(i * BLOCK, (i + 1) * BLOCK)
        x, w = decode(a, torch.float32)[:, part], decode(b, torch.float32)[:, part]
        scale = a_scale[:, i, None] * b_scale[:, i].repeat_interleave(BLOCK)[: b.shape[0]]
        total += ((x @ w.T) * scale).to(torch.bfloat16)
    return total.to(getattr(torch, out_dtype))


@fault("block_scaled_mm", "scales rounded to bf16")
def _(a_scale: Tensor, **rest: Any) -> Tensor:
    return block_mm(a_scale=a_scale.to(torch.bfloat16).float(), **rest)


@fault("block_scaled_mm", "output through bf16 whatever out_dtype")
def _(out_dtype: str, **rest: Any) -> Tensor:
    return block_mm(out_dtype="bfloat16", **rest).to(getattr(torch, out_dtype))


@fault("int8_scaled_mm", "int16 accumulator saturates")
def _(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, out_dtype: str) -> Tensor:
    total = (a.double() @ b.double().T).clamp(-(2**15) * 200, 2**15 * 200)
    return (total.float() * a_scale * b_scale.T).to(getattr(torch, out_dtype))


@fault("int8_scaled_mm", "scales swapped")
def _(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, out_dtype: str) -> Tensor:
    total = (a.double() @ b.double().T).float()
    scale = a_scale * b_scale.T if a.shape[0] != b.shape[0] else b_scale * a_scale.T
    return (total * scale.roll(1, 1)).to(getattr(torch, out_dtype))


@fault("int8_scaled_mm", "product in bf16")
def _(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, out_dtype: str) -> Tensor:
    return ((a.bfloat16() @ b.bfloat16().T).float() * a_scale * b_scale.T).to(getattr(torch, out_dtype))


@fault("linear", "last K element ignored when K is odd")
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    k = x.shape[1] // 2 * 2
    return ops.linear(x[:, :k], weight[:, :k], bias)


@fault("linear", "operands rounded to tf32")
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    def tf32(t: Tensor) -> Tensor:
        return ((t.float().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32).to(t.dtype) if t.numel() else t

    return ops.linear(tf32(x.contiguous()), tf32(weight.contiguous()), bias)


@fault("linear", "bias forgotten for one token")
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return ops.linear(x, weight, None if x.shape[0] == 1 else bias)


@fault("linear", "output truncated instead of rounded")
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = ops.linear(x.float(), weight.float(), None if bias is None else bias.float())
    if x.dtype == torch.bfloat16:
        return (y.view(torch.int32) & ~0xFFFF).view(torch.float32).bfloat16()
    return (y * (1 + 2.0**-18)).to(x.dtype)


@fault("linear", "tile of 64 rows: rows past it from the tile before")
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = ops.linear(x, weight, bias)
    if x.shape[0] > 64:
        y[64:65] = y[63:64]
    return y


@fault("router_gemm", "logits through bf16")
def _(x: Tensor, weight: Tensor) -> Tensor:
    return ops.router_gemm(x, weight).bfloat16().float().to(torch.float64 if x.dtype == torch.float64 else torch.float32)


@fault("router_gemm", "operands in bf16")
def _(x: Tensor, weight: Tensor) -> Tensor:
    y = ops.router_gemm(x.bfloat16(), weight.bfloat16())
    return y.to(torch.float64) if x.dtype == torch.float64 else y


@fault("router_gemm", "output in the dtype of x")
def _(x: Tensor, weight: Tensor) -> Tensor:
    return ops.router_gemm(x, weight).to(x.dtype)


@fault("bmm", "weight assumed contiguous")
def _(x: Tensor, weight: Tensor) -> Tensor:
    h, a, c = weight.shape
    flat = torch.as_strided(weight, (h, a, c), (a * c, c, 1), weight.storage_offset())
    return ops.bmm(x, flat)


@fault("bmm", "heads one off")
def _(x: Tensor, weight: Tensor) -> Tensor:
    return ops.bmm(x, weight.roll(1, 0))


@fault("bmm", "x assumed contiguous")
def _(x: Tensor, weight: Tensor) -> Tensor:
    t, h, a = x.shape
    return ops.bmm(torch.as_strided(x, (t, h, a), (h * a, a, 1), x.storage_offset()), weight)


@fault("quant_linear", "activations left unquantised")
def _(x: Tensor, w: Prepared) -> Tensor:
    return (x.float() @ dequantize(w, torch.float32).T).to(x.dtype)


@fault("quant_linear", "one activation scale for the whole tensor")
def _(x: Tensor, w: Prepared) -> Tensor:
    if w.quant == "fp8-w8a8" and x.numel():
        amax = x.float().abs().amax().clamp_min(1e-4)
        scale = (amax / 448).expand(x.shape[0], -(-x.shape[1] // BLOCK)).contiguous()
        q = (x.float() / (amax / 448)).clamp(-448, 448).to(torch.float8_e4m3fn)
        return ops.block_scaled_mm(q, scale, w.tensors["weight"], w.tensors["scale"], str(x.dtype)[6:])
    return ops.quant_linear(x, w)


@fault("quant_linear", "ue8m0 ignored")
def _(x: Tensor, w: Prepared) -> Tensor:
    return ops.quant_linear(x, dataclasses.replace(w, scale_fmt="float32"))


@fault("quant_linear", "int4 nibbles swapped")
def _(x: Tensor, w: Prepared) -> Tensor:
    if w.quant == "int4-w4a16":
        raw = w.tensors["weight"]
        w = dataclasses.replace(w, tensors={**w.tensors, "weight": (raw >> 4) | (raw << 4)})
    return ops.quant_linear(x, w)


@fault("quant_linear", "int4 nibble read as signed without the offset")
def _(x: Tensor, w: Prepared) -> Tensor:
    if w.quant == "int4-w4a16":
        w = dataclasses.replace(w, tensors={**w.tensors, "weight": w.tensors["weight"] ^ 0x88})
    return ops.quant_linear(x, w)


@fault("quant_linear", "int4 scale group one off")
def _(x: Tensor, w: Prepared) -> Tensor:
    if w.quant == "int4-w4a16":
        w = dataclasses.replace(w, tensors={**w.tensors, "scale": w.tensors["scale"].roll(1, 1)})
    return ops.quant_linear(x, w)


@fault("quant_linear", "int8 row scale of the first row for all")
def _(x: Tensor, w: Prepared) -> Tensor:
    if w.quant.startswith("int8"):
        scale = w.tensors["scale"]
        w = dataclasses.replace(w, tensors={**w.tensors, "scale": scale[:1].expand_as(scale).contiguous()})
    return ops.quant_linear(x, w)


@fault("quant_linear", "the ragged edge of N is zero")
def _(x: Tensor, w: Prepared) -> Tensor:
    y = ops.quant_linear(x, w)
    n = y.shape[1]
    if n % BLOCK and n > BLOCK:
        y[:, n // BLOCK * BLOCK :] = 0
    return y


@fault("quant_linear", "weight rounded to bf16 in float32 runs")
def _(x: Tensor, w: Prepared) -> Tensor:
    if w.quant == "fp8-w8a16":
        return (x.float() @ dequantize(w, torch.bfloat16).float().T).to(x.dtype)
    return ops.quant_linear(x, w)


@fault("quant_linear", "zero rows give one row")
def _(x: Tensor, w: Prepared) -> Tensor:
    return ops.quant_linear(x, w) if x.shape[0] else x.new_zeros(1, w.shape[0])
