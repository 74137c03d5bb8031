"""Attention. In bfloat16 the probabilities are rounded before they meet the values; from an FP8 cache the latents as well."""

from __future__ import annotations

from dsv3.plugin import AtMost, DType, Kernel
from dsv3_triton.facts import Facts

_FP8 = ("float8_e4m3fn", "float8_e4m3fnuz")


def kernels(facts: Facts) -> list[Kernel]:
    decode, prefill = "dsv3_triton.decode:mla_decode", "dsv3_triton.prefill:mla_prefill"
    bf16, f32 = DType("q_c", "bfloat16"), DType("q_c", "float32")
    narrow = AtMost("R", 1024)
    return [
        Kernel("mla_decode", "paged", decode, needs=(bf16, DType("cache", "bfloat16", "float32"), narrow), numerics="bf16-p",
               configs="mla_decode"),
        Kernel("mla_decode", "paged_fp8", decode, needs=(bf16, DType("cache", *_FP8), narrow), numerics="bf16-operand",
               configs="mla_decode"),
        Kernel("mla_decode", "paged_f32", decode, needs=(f32, narrow), configs="mla_decode_f32"),
        Kernel("mla_prefill", "flash", prefill, needs=(DType("q", "bfloat16"),), numerics="bf16-p", batch_invariant=True,
               configs="mla_prefill"),
        Kernel("mla_prefill", "flash_f32", prefill, needs=(DType("q", "float32"),), batch_invariant=True,
               configs="mla_prefill_f32"),
    ]  # fmt: skip
