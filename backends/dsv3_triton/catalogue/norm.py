"""Norms and the gated activation, plain and with FP8 output."""

from __future__ import annotations

from dsv3.plugin import DType, Kernel
from dsv3_triton.facts import Facts

X = DType("x", "bfloat16", "float32")


def kernels(facts: Facts) -> list[Kernel]:
    return [
        Kernel(op, "rows", f"dsv3_triton.{module}:{op}", needs=(X,), batch_invariant=True, configs=op)
        for op, module in (
            ("rms_norm", "norm"), ("add_rms_norm", "norm"), ("rms_norm_quant", "norm"),
            ("silu_mul", "activation"), ("silu_mul_quant", "activation"),
        )
    ]  # fmt: skip
