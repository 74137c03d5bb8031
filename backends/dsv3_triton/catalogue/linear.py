"""Matrix products. float32 activations have tables of their own: their tiles are multiplied without tensor cores."""

from __future__ import annotations

from typing import Any, Literal

from dsv3.plugin import DType, Kernel, Scheme
from dsv3_triton.facts import Facts

_OCP = "float8_e4m3fn"
_X = DType("x", "bfloat16", "float32")
_OUT = DType("out_dtype", "bfloat16", "float32")


def kernels(facts: Facts) -> list[Kernel]:
    """linear, bmm, the products of quantised operands, and quant_linear of every scheme."""
    return [
        *_plain("linear", "linear:linear", "linear"),
        *_plain("bmm", "linear:bmm", "bmm"),
        *_plain("quant_linear", "linear:quant_linear", "quant_linear_none", Scheme("none")),
        *_fp8(facts),
        *_int8(),
        *_weights_only("int8-w8a16", "linear_w8a16:int8"),
        *_weights_only("int4-w4a16", "linear_w8a16:int4"),
        *_weights_only("fp8-w8a16", "linear_w8a16:fp8_native" if facts.fp8 else "linear_w8a16:fp8_decoded", _layouts(facts)),
    ]


def _plain(op: str, target: str, table: str, *needs: Any, name: str = "tiled", layouts: Any = None) -> list[Kernel]:
    """A kernel for bfloat16 and one for float32, which differ in their tables."""
    target, layouts = f"dsv3_triton.{target}", layouts or {}
    return [
        Kernel(op, name, target, needs=(DType("x", "bfloat16"), *needs), layouts=layouts, configs=table),
        Kernel(op, f"{name}-f32", target, needs=(DType("x", "float32"), *needs), layouts=layouts, configs=f"{table}_f32"),
    ]


def _weights_only(scheme: str, target: str, layouts: Any = None) -> list[Kernel]:
    """A scheme whose activations are not quantised."""
    table = f"quant_linear_{scheme.replace('-', '_')}"
    return _plain("quant_linear", target, table, Scheme(scheme), name=scheme, layouts=layouts)


def _layouts(facts: Facts) -> dict[str, str]:
    """FP8 weights in the encoding of the hardware: gfx942 reads e4m3fnuz, everything else takes them as they are stored."""
    return {} if facts.fp8 in ("", _OCP) else {"w": "fnuz"}


def _fp8(facts: Facts) -> list[Kernel]:
    """Products of FP8 operands: on matrix units that take their encoding, else decoded to bfloat16, which holds every code.
    NVIDIA's FP8 products are summed with fewer bits, within 128 of K."""
    encoding, way = (facts.fp8, "mma") if facts.fp8 else (_OCP, "decoded")
    numerics: Literal["tc14", "f32"] = "tc14" if facts.fp8 and facts.vendor == "nvidia" else "f32"
    operands = (DType("a", encoding), DType("b", encoding), _OUT)
    product = Kernel(
        "block_scaled_mm", f"fp8-{way}", f"dsv3_triton.block_scaled:{way}", needs=operands, numerics=numerics,
        configs=f"block_scaled_mm_{way}",
    )  # fmt: skip
    through = Kernel(
        "quant_linear", f"fp8-w8a8-{way}", f"dsv3_triton.block_scaled:quant_linear_{way}",
        needs=(_X, Scheme("fp8-w8a8")), layouts=_layouts(facts), numerics=numerics,
        configs=f"quant_linear_fp8_w8a8_{way}",
    )  # fmt: skip
    return [product, through]


def _int8() -> list[Kernel]:
    """Sums are whole numbers: how the work is cut changes no bit."""
    return [
        Kernel(
            "int8_scaled_mm", "tiled", "dsv3_triton.int8_scaled:int8_scaled_mm", needs=(_OUT,), batch_invariant=True,
            configs="int8_scaled_mm",
        ),
        Kernel(
            "quant_linear", "int8-w8a8", "dsv3_triton.int8_scaled:quant_linear", needs=(_X, Scheme("int8-w8a8")),
            batch_invariant=True, configs="quant_linear_int8_w8a8",
        ),
    ]  # fmt: skip
