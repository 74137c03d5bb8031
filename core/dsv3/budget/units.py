"""Rounding units and the growth of error in a sum, per numerics class.

u is the half-ulp of a format relative to the value; g bounds the error of a sum of K products relative to the sum of
their magnitudes. In float32, K roundings of at most half an ulp of the whole sum each, uniform and independent, have a
standard deviation of sqrt(K / 3) u: 3 sqrt(K) u is five of them. (Measured on all-positive data added one by one: 4.8e-6 for
K = 7168; where a large block comes first, so that every partial sum is as large as the whole, 2.1 sqrt(K) u for K = 520.)
A kernel that says "exact" may err by the rounding of its outputs and nothing else (`rules.real`), but in float64, which is
what expected values are computed in.
"""

from __future__ import annotations

import math

import torch

_HALF_ULP = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
TC14 = 2.0**-11  # tensor cores that truncate to 14 bits, promoted to float32 every 128 products: four truncations
BF16_OPERAND = 2.0**-8  # an operand rounded to bf16 before the product
_NMSE = {torch.float64: 1e-26, torch.float32: 1e-11, torch.float16: 3e-7, torch.bfloat16: 2e-5}


def half_ulp(dtype: torch.dtype) -> float:
    """Relative half-ulp of an output format."""
    return _HALF_ULP[dtype]


def work_ulp(dtype: torch.dtype) -> float:
    """Half-ulp of what operators compute in: float64 for float64, else float32."""
    return _HALF_ULP[torch.float64 if dtype == torch.float64 else torch.float32]


def tiny(dtype: torch.dtype) -> float:
    """What may be lost to flushing subnormals."""
    return {torch.float64: 2.0**-1022, torch.float16: 2.0**-24}.get(dtype, 2.0**-125)


def growth(numerics: str, terms: int, dtype: torch.dtype) -> float:
    """g of a sum of `terms` products of the class, for activations of dtype."""
    exact = 3.0 * math.sqrt(max(terms, 1)) * work_ulp(dtype)
    if numerics == "tc14":
        return max(exact, TC14)
    return exact + BF16_OPERAND if numerics == "bf16-operand" else exact


def nmse_cap(numerics: str, dtype: torch.dtype) -> float:
    """Largest squared error over squared value that a class may reach, where the data do not cancel."""
    if numerics == "tc14" and dtype == torch.float32:
        return 1e-7
    return 2e-5 if numerics == "bf16-operand" else _NMSE[dtype]


def activation_ulp(dtype: torch.dtype) -> float:
    """Relative rounding of an intermediate kept in 16 bits; 0 where it is kept in what is computed in."""
    return half_ulp(dtype) if dtype in (torch.bfloat16, torch.float16) else 0.0
