"""Matrix products: plain, batched over heads, on quantised operands, and through a prepared weight."""

from __future__ import annotations

import functools
import platform
from typing import Any

import torch
from torch import Tensor

from dsv3.errors import OperatorError
from dsv3.ops.norm import work_dtype
from dsv3.ops.quantize import torch_dtype
from dsv3.ops.spec import composite, primitive
from dsv3.plugin import Prepared
from dsv3.quant import SCHEMES, dequantize
from dsv3.quant.fp8 import BLOCK, decode

# 1024 products of two INT8 numbers sum to less than 2^24: float32 holds every partial sum exactly, on every device,
# where integer matmuls often do not exist.
_EXACT_SLAB = 1024


# Rows from which a product in float32 is faster where the CPU has no instructions for bfloat16: 7 times at 64 rows.
_FEW_ROWS = 4


def _slow_in_bf16(x: Tensor) -> bool:
    """Whether torch would multiply x number by number: bfloat16 on an x86 CPU without AVX-512. Sums are float32 either way."""
    return x.dtype == torch.bfloat16 and x.device.type == "cpu" and x.shape[0] >= _FEW_ROWS and _without_bf16()


@functools.cache
def _without_bf16() -> bool:
    return platform.machine() in ("x86_64", "AMD64") and not torch.backends.cpu.get_cpu_capability().startswith("AVX512")


@primitive("x[T,K] weight[N,K] bias[N]? -> y[T,N]")
def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x @ weight^T + bias. x [T, K], weight [N, K], bias [N] or None -> [T, N] in x.dtype.

    Invariants:
    - scaling x by a power of two scales y by it exactly (without bias)
    - small integers give the exact sum
    - a row depends on no other row
    """
    weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    if _slow_in_bf16(x):
        wide = None if bias is None else bias.float()
        return torch.nn.functional.linear(x.float(), weight.float(), wide).to(x.dtype)
    return torch.nn.functional.linear(x, weight, bias)


@primitive("x[T,Nh,A] weight[Nh,A,C] -> y[T,Nh,C]")
def bmm(x: Tensor, weight: Tensor) -> Tensor:
    """y[t, h] = x[t, h] @ weight[h]: the absorbed up-projections W_UK and W_UV.

    x [T, Nh, A], weight [Nh, A, C] (may be a strided view) -> [T, Nh, C] in x.dtype.

    Invariants:
    - heads do not mix
    - scaling x by a power of two scales y by it exactly
    """
    heads, weight = x.transpose(0, 1), weight.to(x.dtype)
    if _slow_in_bf16(x):
        return torch.bmm(heads.float(), weight.float()).transpose(0, 1).to(x.dtype).contiguous()
    return torch.bmm(heads, weight).transpose(0, 1).contiguous()


@composite("a[T,K]:f8 a_scale[T,ceil(K/128)]:f32 b[N,K]:f8 b_scale[ceil(N/128),ceil(K/128)]:f32 -> y[T,N]:dtype")
def block_scaled_mm(ops: Any, a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, out_dtype: str) -> Tensor:
    """FP8 product with 1x128 scales on the left and 128x128 scales on the right.

    a FP8 [T, K], a_scale f32 [T, ceil(K/128)], b FP8 [N, K], b_scale f32 [ceil(N/128), ceil(K/128)] -> [T, N] in out_dtype.
    Accumulation is promoted to float32 at least every 128 of K (this one: throughout; float64 for out_dtype "float64").
    Source: DeepSeek-V3 technical report, 3.3.2, figure 7.

    Invariants:
    - scaling an operand's scales by a power of two scales y by it exactly
    - K and N need not be multiples of 128
    """
    out = torch_dtype(out_dtype)
    work = "float64" if out == torch.float64 else "float32"
    scale = a_scale.to(torch_dtype(work)).repeat_interleave(BLOCK, dim=-1)[:, : a.shape[1]]
    x = decode(a, torch_dtype(work))
    x = x if x.is_meta else x.mul_(scale)  # arithmetic on meta tensors imports torch's compiler
    return ops.linear(x=x, weight=ops.dequant_block(weight=b, scale=b_scale, dtype=work), bias=None).to(out)


@composite("a[T,K]:i8 a_scale[T,1]:f32 b[N,K]:i8 b_scale[N,1]:f32 -> y[T,N]:dtype")
def int8_scaled_mm(ops: Any, a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, out_dtype: str) -> Tensor:
    """INT8 product, exact in int32, then both scales.

    a i8 [T, K], a_scale f32 [T, 1], b i8 [N, K], b_scale f32 [N, 1] -> [T, N] in out_dtype: (int32 sum * a_scale) * b_scale in
    float32 (float64 for "float64"), rounded once.

    Invariants:
    - the integer sum is exact, so that scales of 1 give whole numbers
    """
    out = torch_dtype(out_dtype)
    work = torch.float64 if out == torch.float64 else torch.float32
    total = torch.zeros(a.shape[0], b.shape[0], dtype=torch.int32, device=a.device)
    for k in range(0, a.shape[1], _EXACT_SLAB):
        x, w = a[:, k : k + _EXACT_SLAB], b[:, k : k + _EXACT_SLAB]
        part = ops.linear(x=x.to(torch.float32), weight=w.to(torch.float32), bias=None)
        total = total if part.is_meta else total.add_(part.to(torch.int32))
    if total.is_meta:
        return total.to(out)
    return (total.to(work) * a_scale.to(work) * b_scale.to(work).T).to(out)


@composite("x[T,K] w{N,K} -> y[T,N]")
def quant_linear(ops: Any, x: Tensor, w: Prepared) -> Tensor:
    """y = x @ W^T through a prepared weight of any scheme: the main hook for vendors.

    x [T, K], w Prepared [N, K] -> [T, N] in x.dtype. By scheme: none is `linear`; fp8-w8a8 `act_quant` and
    `block_scaled_mm`; int8-w8a8 `quant_int8` and `int8_scaled_mm`; the w8a16 and w4a16 schemes dequantise the weight to
    x.dtype and call `linear`.

    Invariants:
    - linear in x where activations are not quantised: scaling x by a power of two scales y by it exactly
    - a row depends on no other row
    """
    if w.layout != "canonical":
        raise OperatorError(f"quant_linear: no kernel here reads layout {w.layout!r}; only its own backend does")
    out = str(x.dtype).removeprefix("torch.")
    weight = w.tensors["weight"]
    if w.quant == "none":
        return ops.linear(x=x, weight=weight, bias=None)
    scale = w.tensors["scale"]
    activations = SCHEMES[w.quant].activations
    if activations == "fp8":
        encoding = str(weight.dtype).removeprefix("torch.")
        q, s = ops.act_quant(x=x, group=BLOCK, dtype=encoding, scale_fmt=w.scale_fmt, amax_floor=1e-4)
        return ops.block_scaled_mm(a=q, a_scale=s, b=weight, b_scale=scale, out_dtype=out)
    if activations == "int8":
        q, s = ops.quant_int8(x=x, amax_floor=1e-10)
        return ops.int8_scaled_mm(a=q, a_scale=s, b=weight, b_scale=scale, out_dtype=out)
    if SCHEMES[w.quant].weights == "fp8":
        return ops.linear(x=x, weight=ops.dequant_block(weight=weight, scale=scale, dtype=out), bias=None)
    return ops.linear(x=x, weight=dequantize(w, x.dtype), bias=None)


@primitive("x[T,H] weight[E,H] -> logits[T,E]:f32")
def router_gemm(x: Tensor, weight: Tensor) -> Tensor:
    """Router logits in float32 whatever the dtype of x: x [T, H], weight [E, H] -> f32 [T, E] (float64 for float64).

    bf16 logits reorder experts: DeepSeek-V3.2's demo and transformers compute them in float32 too.

    Invariants:
    - logits are float32 for bfloat16 x, not rounded to bfloat16 on the way
    """
    work = work_dtype(x)
    return torch.nn.functional.linear(x.to(work), weight.to(work))
