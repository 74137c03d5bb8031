"""Quantisation of activations."""

from __future__ import annotations

from dsv3.plugin import DType, Kernel
from dsv3_triton.facts import Facts

X = DType("x", "bfloat16", "float32")


def kernels(facts: Facts) -> list[Kernel]:
    """FP8 by integer arithmetic, and INT8, for every architecture."""
    return [
        Kernel(
            "act_quant",
            "groups",
            "dsv3_triton.quantize:act_quant",
            needs=(X,),
            batch_invariant=True,
            configs="act_quant",
        ),
        Kernel("quant_int8", "rows", "dsv3_triton.quantize_int8:quant_int8", needs=(X,), batch_invariant=True,
               configs="quant_int8"),
    ]  # fmt: skip
