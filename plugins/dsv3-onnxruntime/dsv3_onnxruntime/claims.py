"""What this backend claims: one kernel per operator, the same for every provider that gets it right. Metadata only."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from dsv3.plugin import Device, DType, Kernel, Scheme
from dsv3_onnxruntime.providers import Provider, provider_of

_REAL = ("float32", "bfloat16")
_FP8 = ("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2")
_SCHEMES = ("none", "fp8-w8a8", "fp8-w8a16", "int8-w8a8", "int8-w8a16", "int4-w4a16")


def _real(*arguments: str) -> tuple[DType, ...]:
    return tuple(DType(a, *_REAL) for a in arguments)


def _f32(*arguments: str) -> tuple[DType, ...]:
    return tuple(DType(a, "float32") for a in arguments)


# operator -> (module of kernels, what it needs). An operator whose output type is an argument computes in float32 too.
_CLAIMS = {
    "embedding": ("elementwise", _real("table")),
    "rms_norm": ("elementwise", _real("x", "weight")),
    "add_rms_norm": ("elementwise", _real("x", "residual", "weight")),
    "apply_rope": ("elementwise", (*_real("x"), *_f32("cos_sin"))),
    "silu_mul": ("elementwise", _real("x")),
    "act_quant": ("quantise", (*_real("x"), DType("dtype", *_FP8))),
    "quant_int8": ("quantise", _real("x")),
    "dequant_block": ("quantise", (DType("weight", *_FP8), *_f32("scale"), *_real("dtype"))),
    "block_scaled_mm": ("quantise", (DType("a", *_FP8), DType("b", *_FP8), *_f32("a_scale", "b_scale"), *_real("out_dtype"))),
    "int8_scaled_mm": ("quantise", (*_f32("a_scale", "b_scale"), *_real("out_dtype"))),
    "linear": ("products", _real("x", "weight", "bias")),
    "quant_linear": ("products", _real("x")),
    "bmm": ("products", _real("x", "weight")),
    "router_gemm": ("products", _real("x", "weight")),
    "mtp_combine": ("products", _real("embedding", "hidden", "enorm", "hnorm", "eh_proj")),
    "grouped_topk": ("routing", _f32("logits", "bias")),
    "route": ("routing", (*_real("x", "gate"), *_f32("bias"))),
    "grouped_linear": ("experts", _real("x")),
    "fused_experts": ("experts", (*_real("x"), *_f32("weights"))),
    "mla_prefill": ("attention", _real("q", "k", "v")),
    "mla_decode": ("attention", (*_real("q_c", "q_pe"), DType("cache", *_REAL, *_FP8))),
}
_WEIGHTED = frozenset({"quant_linear", "grouped_linear", "fused_experts"})
_EXACT = frozenset({"embedding", "act_quant", "quant_int8"})


def kernels(device: Device) -> Iterable[Kernel]:
    """The kernels for a device."""
    return _kernels(provider_of(device))


def _kernels(where: Provider) -> Iterator[Kernel]:
    for op, (module, needs) in _CLAIMS.items():
        if where.ops is not None and op not in where.ops:
            continue
        here = f"dsv3_onnxruntime.kernels.{module}:{op}"
        yield Kernel(
            op=op,
            name="ort",
            target=here if where.key == "cpu" else f"dsv3_onnxruntime.elsewhere:{op}__{where.key}",
            needs=(*needs, Scheme(*(where.schemes or _SCHEMES))) if op in _WEIGHTED else needs,
            numerics="exact" if op in _EXACT else "f32",
            # A session runs on a queue of its own and is waited for: it cannot become part of a captured graph.
            graph_safe=False,
        )
