"""Random weights of every scheme, and what they stand for."""

from __future__ import annotations

import pytest
import torch

from dsv3.plugin import Prepared
from dsv3.quant import dequantize, quantize

SCHEMES = ("none", "fp8-w8a16", "int8-w8a16", "int4-w4a16", "int8-w8a8")
WEIGHT_ONLY = SCHEMES[:4]
# Whole layers take seconds to compile for each format: two by default, the others among the slow tests.
_RARER = ("int8-w8a16", "int4-w4a16", "int8-w8a8")
LAYERS = ("fp8-w8a16", "none", *(pytest.param(scheme, marks=pytest.mark.slow) for scheme in _RARER))


def weight(quant: str, *shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Prepared:
    """[N, K], or [E, N, K]; dtype: of numbers that are not quantised."""
    generator = torch.Generator().manual_seed(seed)
    real = torch.randn(*shape, generator=generator).to(dtype)
    if len(shape) == 2:
        return Prepared("canonical", quant, shape, dict(quantize(real, quant)))
    parts = [quantize(r, quant) for r in real]
    return Prepared("canonical", quant, shape, {name: torch.stack([p[name] for p in parts]) for name in parts[0]})


def real(w: Prepared) -> torch.Tensor:
    """In float64."""
    return dequantize(w, torch.float64)
