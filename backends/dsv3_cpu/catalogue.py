"""What the backend claims, as metadata; imports neither torch nor numba.

Kernels named "torch" are torch's own operators in float32. Few rows and many take different ways, so nothing that has both
claims that a row's bits do not depend on its neighbours.
"""

from __future__ import annotations

from typing import Any

from dsv3.plugin import AtLeast, AtMost, DType, Feature, Kernel, Scheme

_REAL = ("float32", "bfloat16")
_CACHE = DType("cache", *_REAL, "float8_e4m3fn")
_HALF = Feature("half")
_SCHEMES = ("none", "fp8-w8a16", "int8-w8a16", "int4-w4a16", "int8-w8a8")
_MANY = 33  # rows from which a weight is decoded once, and multiplied by torch


def kernels() -> list[Kernel]:
    """All kernels: each says what it needs."""
    return [*_pointwise(), *_products(), *_attention(), *_routing()]


def _kernel(op: str, name: str, target: str, *needs: Any, **claims: Any) -> Kernel:
    where = target if target.startswith("dsv3.") else f"dsv3_cpu.{target}"
    return Kernel(op, name, where, needs=needs, **claims)


def _pointwise() -> list[Kernel]:
    alike: dict[str, Any] = {"batch_invariant": True}
    return [
        _kernel("embedding", "torch", "dsv3.ops.embedding:embedding", DType("table", *_REAL), numerics="exact", **alike),
        *(_kernel(op, "rows", f"pointwise:{op}", DType("x", *_REAL), **alike)
          for op in ("rms_norm", "add_rms_norm", "silu_mul", "apply_rope")),
        _kernel("quant_int8", "rows", "int8:quant_int8", DType("x", *_REAL), **alike),
        _kernel("gumbel_argmax", "chunks", "sampling:gumbel_argmax", DType("logits", *_REAL), **alike),
    ]  # fmt: skip


def _products() -> list[Kernel]:
    x = DType("x", *_REAL)
    found = [
        _kernel("linear", "rows", "linear:linear", x),
        _kernel("bmm", "heads", "linear:bmm", x),
        _kernel("router_gemm", "rows", "linear:router_gemm", x),
        _kernel("int8_scaled_mm", "rows", "int8:int8_scaled_mm", DType("out_dtype", *_REAL), batch_invariant=True),
    ]
    for scheme in _SCHEMES:
        needs = [x, Scheme(scheme), *([_HALF] if scheme.startswith("fp8") else [])]
        found += _by_rows("quant_linear", "linear:quant_linear", scheme, needs)
        found += _by_rows("fused_experts", "experts:fused_experts", scheme, needs)
        found += _dense("grouped_linear", scheme, "experts:grouped_linear", "M", needs)
        found += _few("mla_prolog", "prolog:mla_prolog", scheme, [needs[0], _CACHE, *needs[1:]], batch_invariant=True)
        found += _few("moe", "experts:moe_few", scheme, needs, batch_invariant=True)
    return found


def _few(op: str, target: str, scheme: str, needs: list[Any], **claims: Any) -> list[Kernel]:
    """By weights decoded in registers. Integers by bfloat16 are multiplied as whole numbers, see kernels/whole.py, which shows
    in what they claim."""
    some = [AtMost("T", _MANY - 1)]
    if scheme not in ("int8-w8a16", "int4-w4a16"):
        return [_kernel(op, f"{scheme}-few", target, *needs, *some, **claims, configs=f"cpu_{op}")]
    _, *others = needs
    return [
        _kernel(op, f"{scheme}-few", target, DType("x", "float32"), *others, *some, **claims, configs=f"cpu_{op}"),
        _kernel(op, f"{scheme}-whole", target, DType("x", "bfloat16"), *others, *some, **claims, configs=f"cpu_{op}",
                numerics="bf16-operand"),
    ]  # fmt: skip


# Offsets are read on the host, which is where they are; a graph could not hold that.
_ON_HOST: dict[str, Any] = {"graph_safe": False}


def _by_rows(op: str, target: str, scheme: str, needs: list[Any]) -> list[Kernel]:
    """Few rows by weights decoded in registers, where a row's bits do not depend on others; many by torch's products."""
    few = _few(op, f"{target}_few", scheme, needs, batch_invariant=True)
    if scheme == "int8-w8a8" and op == "fused_experts":  # of many rows the parts do the same
        return few
    return [*few, *_dense(op, f"{scheme}", f"{target}_many", "T", needs)]


def _dense(op: str, scheme: str, target: str, rows: str, needs: list[Any]) -> list[Kernel]:
    """Products in float32, and, for many rows, in bfloat16 where the processor multiplies it."""
    claims = {} if op == "quant_linear" else _ON_HOST
    exact = scheme == "int8-w8a8"  # sums of whole numbers
    many = [AtLeast("T", _MANY)] if target.endswith("_many") else []
    plain = _kernel(op, f"{scheme}-many" if many else scheme, target, *needs, *many, **claims, batch_invariant=exact)
    if exact:
        return [plain]
    numerics: Any = "f32" if scheme == "none" else "bf16-operand"
    fast = _kernel(op, f"{scheme}-bf16", f"{target.removesuffix('_many')}_bf16", DType("x", "bfloat16"), *needs[1:],
                   AtLeast(rows, _MANY), Feature("bf16_mm"), **claims, numerics=numerics, priority=1)  # fmt: skip
    return [plain, fast]


def _attention() -> list[Kernel]:
    real = [DType(name, *_REAL) for name in ("q", "k", "v")]
    return [
        _kernel(
            "mla_decode",
            "flash",
            "attention:mla_decode",
            DType("q_c", *_REAL),
            _CACHE,
            _HALF,
            configs="cpu_mla_decode",
            batch_invariant=True,
        ),
        _kernel("mla_prefill", "tiles", "attention:mla_prefill", *real, graph_safe=False),
        _kernel(
            "mla_prefill",
            "flash-bf16",
            "attention:mla_prefill_bf16",
            *(DType(name, "bfloat16") for name in ("q", "k", "v")),
            Feature("bf16_mm"),
            graph_safe=False,
            numerics="bf16-operand",  # for lse too: see there
            priority=1,
        ),
        _kernel("kv_cache_write", "rows", "cache:kv_cache_write", DType("ckv", *_REAL), _CACHE, _HALF, batch_invariant=True),
        _kernel(
            "rope_cache_write", "rows", "cache:rope_cache_write", DType("q_pe", *_REAL), _CACHE, _HALF, batch_invariant=True
        ),
        _kernel("kv_cache_gather", "rows", "cache:kv_cache_gather", _CACHE, _HALF, batch_invariant=True),
    ]


def _routing() -> list[Kernel]:
    return [
        _kernel("grouped_topk", "rows", "routing:grouped_topk", DType("logits", "float32"), batch_invariant=True),
        _kernel("route", "rows", "routing:route", DType("x", *_REAL)),
        _kernel("moe_permute", "torch", "dsv3.ops.experts:moe_permute"),
        _kernel("moe_combine", "torch", "dsv3.ops.experts:moe_combine", DType("y", *_REAL), batch_invariant=True),
    ]
