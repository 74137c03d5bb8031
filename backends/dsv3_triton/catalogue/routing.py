"""The router. Its kernels serve every architecture and both activation dtypes: they use no matrix unit."""

from __future__ import annotations

from dsv3.plugin import AtMost, DType, Kernel
from dsv3_triton.facts import Facts

_X = DType("x", "bfloat16", "float32")
_MOST = AtMost("E", 512)


def kernels(facts: Facts) -> list[Kernel]:
    """router_gemm, grouped_topk, and route, which is both in one kernel."""
    return [
        Kernel("router_gemm", "fma", "dsv3_triton.routing:router_gemm", needs=(_X,), configs="router_gemm"),
        Kernel(
            "grouped_topk", "rows", "dsv3_triton.routing:grouped_topk", needs=(DType("logits", "float32"), _MOST),
            configs="grouped_topk",
        ),
        Kernel("route", "fused", "dsv3_triton.routing:route", needs=(_X, _MOST), configs="route"),
    ]  # fmt: skip
