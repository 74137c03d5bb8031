"""The mixture of experts."""

from __future__ import annotations

from typing import Literal

from dsv3.plugin import DType, Kernel, Scheme
from dsv3_triton.facts import Facts

# of the products in bfloat16: how much of a tile's registers decoding takes differs
_TABLES = {"none": "bf16", "fp8-w8a16": "w8a16", "int8-w8a16": "w8a16", "int4-w4a16": "int4"}
_WEIGHTS = {"grouped_linear": ("w",), "fused_experts": ("w13", "w2")}


def kernels(facts: Facts) -> list[Kernel]:
    """Sorting and summing for every architecture; products by what their dot takes."""
    return [
        Kernel("moe_permute", "per-expert", "dsv3_triton.permute:moe_permute", configs="moe_permute"),
        Kernel(
            "moe_combine",
            "gather",
            "dsv3_triton.permute:moe_combine",
            needs=(DType("y", "bfloat16", "float32"),),
            batch_invariant=True,
            configs="moe_combine",
        ),
        *(kernel for op in _WEIGHTS for kernel in _products(op, facts)),
    ]


def _products(op: str, facts: Facts) -> list[Kernel]:
    """FP8 by FP8, int8 by int8, bfloat16, float32. Where the hardware's FP8 is e4m3fnuz, FP8 weights are prepared as such."""
    target = f"dsv3_triton.experts:{op}"
    fnuz = dict.fromkeys(_WEIGHTS[op], "fnuz") if facts.fp8 == "float8_e4m3fnuz" else {}
    numerics: Literal["tc14", "f32"] = "tc14" if facts.fp8 and facts.vendor == "nvidia" else "f32"
    either = DType("x", "bfloat16", "float32")
    found = [
        Kernel(op, "fp8", target, needs=(Scheme("fp8-w8a8"), either), layouts=fnuz, numerics=numerics, configs=f"{op}_fp8"),
        Kernel(op, "int8", target, needs=(Scheme("int8-w8a8"), either), configs=f"{op}_int8"),
    ]
    bf16, f32 = DType("x", "bfloat16"), DType("x", "float32")
    for name, scheme, layouts in (
        ("", "none", {}),
        ("fp8-", "fp8-w8a16", fnuz),
        ("int8-", "int8-w8a16", {}),
        ("int4-", "int4-w4a16", {}),
    ):
        table = f"{op}_{_TABLES[scheme]}"
        found.append(Kernel(op, f"{name}bf16", target, needs=(Scheme(scheme), bf16), layouts=layouts, configs=table))
        found.append(Kernel(op, f"{name}f32", target, needs=(Scheme(scheme), f32), layouts=layouts, configs=f"{op}_f32"))
    return found
