"""Quantisation of activations."""

from __future__ import annotations

from dsv3.plugin import DType, Kernel
from dsv3_triton.facts import Facts

X = DType("x", "bfloat16", "float32")


def kernels(facts: Facts) -> list[Kernel]:
    """act_quant: FP8 by integer arithmetic, for every architecture."""
    return [
        Kernel(
            "act_quant",
            "groups",
            "dsv3_triton.quantize:act_quant",
            needs=(X,),
            batch_invariant=True,
            configs="act_quant",
        )
    ]
