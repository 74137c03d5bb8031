"""Attention: expanded over packed sequences, and absorbed over the latent cache.

bfloat16 rounds probabilities to bfloat16; float32 does not, and has tables of its own: its tiles are multiplied without tensor
cores. A cache in float32 is read as float32 whatever the queries are.
"""

from __future__ import annotations

from dsv3.plugin import AtMost, DType, Kernel
from dsv3_triton.facts import Facts

_BF16, _ANY = ("bfloat16",), ("bfloat16", "float32")
_FP8 = ("float8_e4m3fn", "float8_e4m3fnuz")


def kernels(facts: Facts) -> list[Kernel]:
    """mla_prefill and mla_decode, for every architecture, and caches in bfloat16, float32 and both encodings of FP8."""
    decode = "dsv3_triton.decode:mla_decode"
    # float32 queries and latents lie in shared memory whole on NVIDIA: 16 rows of each.
    narrow = facts.vendor == "nvidia" and facts.shared_memory < 160 * 1024
    most, most_f32 = AtMost("R", 1024), AtMost("R", 640 if narrow else 1024)
    prefill = "dsv3_triton.prefill:mla_prefill"
    return [
        Kernel(
            "mla_prefill", "flash", prefill, needs=tuple(DType(n, *_BF16) for n in "qkv"), numerics="bf16-p",
            configs="mla_prefill",
        ),
        Kernel(
            "mla_prefill", "flash-f32", prefill, needs=tuple(DType(n, "float32") for n in "qkv"), configs="mla_prefill_f32",
        ),
        Kernel(
            "mla_decode", "flash", decode, needs=(DType("q_c", *_BF16), DType("cache", *_BF16), most), numerics="bf16-p",
            configs="mla_decode",
        ),
        Kernel(
            "mla_decode", "flash-fp8", decode, needs=(DType("q_c", *_BF16), DType("cache", *_FP8), most), numerics="bf16-p",
            configs="mla_decode_fp8",
        ),
        Kernel(
            "mla_decode", "flash-f32", decode, needs=(DType("q_c", "float32"), DType("cache", *_ANY, *_FP8), most_f32),
            configs="mla_decode_f32",
        ),
        Kernel(
            "mla_decode", "flash-mixed", decode, needs=(DType("q_c", *_BF16), DType("cache", "float32"), most_f32),
            configs="mla_decode_f32",
        ),
    ]  # fmt: skip
