"""What the backend claims, as metadata; imports no torch.

Kernels named "aten" are torch's own operators, which torch_npu runs on an NPU; the others call the vendor's. Float products
and attention do not claim to repeat bit for bit: whether the vendor's do was not seen.
"""

from __future__ import annotations

from typing import Any

from dsv3.plugin import Arch, AtLeast, AtMost, Divides, DType, Kernel, Scheme

# The pages in the vendor's wheel name the A2 (910B) and A3 (910C) generations.
_ARCH = Arch("910b", "910c")
_BF16, _REAL = ("bfloat16",), ("bfloat16", "float32")
_HERE = "dsv3_ascend"
# Inner sizes of the vendor's products.
_K, _N = AtMost("K", 65535), AtMost("N", 65535)


def kernels() -> list[Kernel]:
    """All kernels, for every architecture: each says what it needs."""
    return [*_pointwise(), *_products(), *_experts(), *_attention(), *_cache(), *_ends()]


def _kernel(op: str, name: str, target: str, *needs: Any, **claims: Any) -> Kernel:
    where = target if target.startswith("dsv3.") else f"{_HERE}.{target}"
    return Kernel(op, name, where, needs=(_ARCH, *needs), **claims)


def _exactly(dim: str, size: int) -> tuple[Any, Any]:
    return AtLeast(dim, size), AtMost(dim, size)


def _pointwise() -> list[Kernel]:
    return [
        _kernel("rms_norm", "npu", "pointwise:rms_norm", DType("x", *_REAL)),
        _kernel("add_rms_norm", "npu", "pointwise:add_rms_norm", DType("x", "float32")),
        _kernel("silu_mul", "npu", "pointwise:silu_mul", DType("x", *_REAL)),
        _kernel("apply_rope", "npu", "pointwise:apply_rope", DType("x", *_REAL), AtMost("N", 999), AtMost("P", 894)),
        _kernel("quant_int8", "npu", "pointwise:quant_int8", DType("x", *_BF16)),
        _kernel("grouped_topk", "npu", "routing:grouped_topk", DType("logits", "float32")),
        _kernel("router_gemm", "aten", "products:router_gemm", DType("x", *_REAL), deterministic=False),
    ]  # fmt: skip


def _products() -> list[Kernel]:
    x = DType("x", *_BF16)
    bmm_fits = (x, Divides("A", 128), Divides("C", 128))
    return [
        _kernel("linear", "aten", "products:linear", DType("x", *_REAL), deterministic=False),
        _kernel("bmm", "npu", "products:transposing_bmm", *bmm_fits, accepts=f"{_HERE}.limits:transposing_bmm", priority=1,
                deterministic=False),
        _kernel("bmm", "aten", "products:bmm", DType("x", *_REAL), deterministic=False),
        _kernel("int8_scaled_mm", "npu", "products:int8_scaled_mm", DType("out_dtype", *_BF16), _K, _N),
        _kernel("quant_linear", "aten", "products:quant_linear", DType("x", *_REAL), Scheme("none"), deterministic=False),
        _kernel("quant_linear", "int8-w8a8", "products:quant_linear_w8a8", x, Scheme("int8-w8a8"), _K, _N, layouts={"w": "nz"}),
        _kernel("quant_linear", "int8-w8a16", "products:quant_linear_w8a16", x, Scheme("int8-w8a16"), _K, _N,
                numerics="bf16-operand", deterministic=False),
        _kernel("quant_linear", "int4-w4a16", "products:quant_linear_w4a16", x, Scheme("int4-w4a16"), _K, _N, Divides("K", 128),
                Divides("N", 8), layouts={"w": "int4"}, numerics="bf16-operand", deterministic=False),
    ]  # fmt: skip


def _experts() -> list[Kernel]:
    x, found = DType("x", *_BF16), []
    sizes = {"grouped_linear": (_K, _N), "fused_experts": (AtMost("H", 65535), AtMost("I", 32767))}
    weights = {"grouped_linear": ("w",), "fused_experts": ("w13", "w2")}
    for op, fits in sizes.items():
        nz = dict.fromkeys(weights[op], "nz")
        # The fused activation's own limits.
        fused = (AtMost("I", 10496), Divides("I", 64)) if op == "fused_experts" else ()
        w8a8 = "experts:fused_experts_w8a8" if fused else "experts:grouped_linear"
        found += [
            _kernel(op, "bf16", f"experts:{op}", x, Scheme("none"), *fits, deterministic=False),
            _kernel(op, "int8-w8a8", w8a8, x, Scheme("int8-w8a8"), *fits, *fused, layouts=nz),
            _kernel(op, "int8-w8a16", f"experts:{op}", x, Scheme("int8-w8a16"), *fits, numerics="bf16-operand",
                    deterministic=False),
        ]  # fmt: skip
    return [
        *found,
        _kernel("moe_permute", "aten", "dsv3.ops.experts:moe_permute"),
        _kernel("moe_combine", "aten", "dsv3.ops.experts:moe_combine", DType("y", *_REAL)),
    ]


def _attention() -> list[Kernel]:
    """ "fia" is the vendor's fused operator, "aten" the reference's own way, for what it does not take."""
    bf16 = [DType(name, *_BF16) for name in ("q", "k", "v")]
    cached = (DType("q_c", *_BF16), DType("q_pe", *_BF16), DType("cache", *_BF16))
    host: dict[str, Any] = {"graph_safe": False, "deterministic": False}
    return [
        _kernel("mla_prefill", "fia", "attention:mla_prefill", *bf16, *_exactly("Dqk", 192), *_exactly("Dv", 128),
                AtMost("Nh", 256), numerics="bf16-p", priority=1, **host),
        _kernel("mla_prefill", "aten", "dsv3.ops.attention:mla_prefill", DType("q", *_REAL), **host),
        _kernel("mla_decode", "fia", "attention:mla_decode", *cached, *_exactly("R", 512), *_exactly("P", 64),
                accepts=f"{_HERE}.limits:latent_attention", numerics="bf16-p", priority=1, **host),
        _kernel("mla_decode", "aten", "dsv3.ops.attention:mla_decode", DType("q_c", *_REAL), DType("cache", *_REAL), **host),
        _kernel("merge_attn_states", "aten", "dsv3.ops.attention:merge_attn_states", DType("o1", *_REAL)),
    ]  # fmt: skip


def _cache() -> list[Kernel]:
    cache = DType("cache", *_REAL)
    return [
        _kernel("kv_cache_write", "aten", "dsv3.ops.cache:kv_cache_write", DType("ckv", *_REAL), cache),
        _kernel("kv_cache_gather", "aten", "dsv3.ops.cache:kv_cache_gather", cache),
    ]


def _ends() -> list[Kernel]:
    return [
        _kernel("embedding", "aten", "dsv3.ops.embedding:embedding", DType("table", *_REAL), numerics="exact"),
        _kernel("gumbel_argmax", "host", "ends:gumbel_argmax", DType("logits", *_REAL), graph_safe=False),
        _kernel("dequant_block", "table", "ends:dequant_block", DType("weight", "float8_e4m3fn"), DType("dtype", *_REAL)),
    ]
