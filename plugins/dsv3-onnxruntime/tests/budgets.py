"""Inputs of several distributions, and forward-error bounds against float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dsv3.plugin import Prepared, Quant
from dsv3.quant import dequantize, quantize

# Half an ulp, relative.
UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float64: 2.0**-53}
TINY = 2.0**-126
DTYPES = (torch.float32, torch.bfloat16)
SCHEMES: tuple[Quant, ...] = ("none", "fp8-w8a16", "fp8-w8a8", "int8-w8a16", "int8-w8a8", "int4-w4a16")
KINDS = ("normal", "outliers", "zeros", "tiny", "large", "cancelling", "integers", "positive")


def draw(kind: str, *shape: int, seed: int = 0) -> Tensor:
    """float32 values: LLM-like outlier channels, subnormal scales, magnitudes near FP8's end, and so on."""
    g = torch.Generator().manual_seed(seed + 1000 * len(shape))
    x = torch.randn(shape, generator=g)
    if kind == "outliers":
        x[..., torch.randperm(shape[-1], generator=g)[:8]] *= 100
    elif kind == "zeros":
        x.zero_()
    elif kind == "tiny":
        x *= 1e-39
    elif kind == "large":
        x = torch.where(x > 0, 448.0, -448.0) * (1 + 0.25 * x.abs())
    elif kind == "cancelling":
        half = shape[-1] // 2
        x[..., half : 2 * half] = -x[..., :half]
    elif kind == "integers":
        x = x.mul(3).round()
    elif kind == "positive":
        x = x.abs()
    return x


def prepared(quant: Quant, shape: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float32) -> Prepared:
    """A random weight [N, K] or [E, N, K] in a scheme."""
    g = torch.Generator().manual_seed(seed)
    real = torch.randn(shape, generator=g) / math.sqrt(shape[-1])
    if quant == "none":
        return Prepared("canonical", quant, shape, {"weight": real.to(dtype)})
    if len(shape) == 2:
        return Prepared("canonical", quant, shape, dict(quantize(real, quant)))
    each = [quantize(w, quant) for w in real]
    return Prepared("canonical", quant, shape, {name: torch.stack([w[name] for w in each]) for name in each[0]})


def real_weight(w: Prepared) -> Tensor:
    """In float64."""
    return dequantize(w, torch.float64)


def within(found: Tensor, wanted: Tensor, magnitude: Tensor, k: int, factor: float = 1.0) -> float:
    """The largest error over its bound: rounding of the output, and float32 accumulation over k terms whose absolute
    values sum to `magnitude`. Fails on more than 1, on NaN, on another shape."""
    assert found.shape == wanted.shape
    if not found.numel():
        return 0.0
    unit = UNIT[found.dtype]
    bound = unit * wanted.abs() + factor * 2 * math.sqrt(k) * 2.0**-24 * magnitude + TINY
    worst = float(((found.double() - wanted).abs() / bound).max())
    assert worst <= 1, f"error is {worst:.3g} times its bound"
    return worst


def pointwise(found: Tensor, wanted: Tensor, magnitude: Tensor) -> float:
    """As `within`, for elementwise operators: 8 float32 roundings of the terms."""
    return within(found, wanted, magnitude, 1, factor=4)
