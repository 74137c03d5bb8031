"""Quantisation schemes: how weights are stored in each, and the exact arithmetic to and from real numbers.

One module per number format: `fp8` (e4m3, 128x128 blocks), `int8` (per output channel), `int4` (groups of 128 along K).
`schemes` maps a scheme's name to the canonical tensors of `Prepared`, and says how far they are off. What can be fitted to a
text (outlier channels, compensated rounding) is in `checkpoint.calibrate`: it has to run the model.
"""

from dsv3.quant.schemes import SCHEMES, canonical, dequantize, quantize, rounding_bound

__all__ = ["SCHEMES", "canonical", "dequantize", "quantize", "rounding_bound"]
