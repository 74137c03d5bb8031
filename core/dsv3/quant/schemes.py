"""From a scheme's name to canonical tensors, and back to real numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dsv3.plugin import Prepared, Quant
from dsv3.quant.fp8 import blocks, dequantize_block, expand_scale, quantize_block
from dsv3.quant.int4 import GROUP, dequantize_group, quantize_group
from dsv3.quant.int8 import dequantize_channel, quantize_channel


@dataclass(frozen=True)
class Scheme:
    """`weights`: number format of the weights; `activations`: what a matmul's left operand is rounded to. How far a rounded
    number may be off is `rounding_bound`."""

    name: Quant
    weights: str
    activations: str


SCHEMES: dict[str, Scheme] = {
    s.name: s
    for s in (
        Scheme("none", "none", "none"),
        Scheme("fp8-w8a8", "fp8", "fp8"),
        Scheme("fp8-w8a16", "fp8", "none"),
        Scheme("int8-w8a8", "int8", "int8"),
        Scheme("int8-w8a16", "int8", "none"),
        Scheme("int4-w4a16", "int4", "none"),
    )
}


def canonical(quant: Quant, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str) -> dict[str, Tensor]:
    """Uninitialised canonical tensors for a weight of `shape` [N,K] or [E,N,K]; dtype is that of unquantised weights."""
    *lead, n, k = shape
    kind = SCHEMES[quant].weights

    def empty(*tail: int, dtype: torch.dtype) -> Tensor:
        return torch.empty((*lead, *tail), dtype=dtype, device=device)

    if kind == "fp8":
        return {
            "weight": empty(n, k, dtype=torch.float8_e4m3fn),
            "scale": empty(blocks(n), blocks(k), dtype=torch.float32),
        }
    if kind == "int8":
        return {"weight": empty(n, k, dtype=torch.int8), "scale": empty(n, 1, dtype=torch.float32)}
    if kind == "int4":
        return {
            "weight": empty(n, -(-k // 2), dtype=torch.uint8),
            "scale": empty(n, blocks(k), dtype=torch.float32),
        }
    return {"weight": empty(n, k, dtype=dtype)}


def rounding_bound(w: Prepared) -> Tensor:
    """How far each number of a canonical weight may be from the one it was rounded from, float64 of w.shape.

    FP8: half a unit in the last of 4 bits, 2^-4 of the number, and half the smallest subnormal, 2^-10 of the scale, where that
    is more. INT8, INT4: half a step of the scale. A code at the end of its range is off by no more: scales are made so.
    """
    scale = w.tensors["scale"].to(torch.float64)
    n, k = w.shape[-2:]
    kind = SCHEMES[w.quant].weights
    if kind == "fp8":
        # The number itself is not known; its image is at least 16/17 of it in magnitude.
        size = dequantize(w, torch.float64).abs() * (17 / 16)
        return torch.maximum(size * 2.0**-4, expand_scale(scale, n, k) * 2.0**-10)
    if kind == "int4":
        scale = scale.repeat_interleave(GROUP, dim=-1)[..., :k]
    return (scale / 2).expand(w.shape)


def quantize(weight: Tensor, quant: Quant, scale_fmt: str = "float32") -> Mapping[str, Tensor]:
    """A real weight [N, K] as the canonical tensors of a scheme ("none" keeps it)."""
    kind = SCHEMES[quant].weights
    if kind == "none":
        return {"weight": weight}
    if kind == "fp8":
        codes, scale = quantize_block(weight, scale_fmt)
    elif kind == "int8":
        codes, scale = quantize_channel(weight)
    else:
        codes, scale = quantize_group(weight)
    return {"weight": codes, "scale": scale}


def dequantize(w: Prepared, dtype: torch.dtype) -> Tensor:
    """The real weight of w.shape in dtype; w must be canonical."""
    if w.layout != "canonical":
        raise ValueError(f"only canonical weights can be dequantised here; this one is {w.layout!r}: unprepare it first")
    kind = SCHEMES[w.quant].weights
    weight = w.tensors["weight"]
    if weight.is_meta:  # arithmetic on meta tensors imports torch's compiler: two seconds and 150 MB for a shape
        return torch.empty(w.shape, dtype=dtype, device="meta")
    if kind == "fp8":
        return dequantize_block(weight, w.tensors["scale"], dtype)
    if kind == "int8":
        return dequantize_channel(weight, w.tensors["scale"], dtype)
    if kind == "int4":
        return dequantize_group(weight, w.tensors["scale"], w.shape[-1], dtype)
    return weight.to(dtype)
