"""Quantisation schemes: how weights are stored in each, and the exact arithmetic to and from real numbers.

One module per number format: `fp8` (e4m3, 128x128 blocks), `int8` (per output channel), `int4` (groups of 128 along K).
`schemes` maps a scheme's name to the canonical tensors of `Prepared`.
"""

from dsv3.quant.schemes import SCHEMES, canonical, dequantize, quantize

__all__ = ["SCHEMES", "canonical", "dequantize", "quantize"]
