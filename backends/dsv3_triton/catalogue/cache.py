"""Rotation and the latent cache."""

from __future__ import annotations

from dsv3.plugin import DType, Kernel
from dsv3_triton.facts import Facts

_REAL = ("bfloat16", "float32")


def kernels(facts: Facts) -> list[Kernel]:
    """FP8 caches are coded by integer arithmetic, so that every architecture takes both encodings."""
    return [
        Kernel("apply_rope", "rows", "dsv3_triton.rope:apply_rope", needs=(DType("x", *_REAL),), batch_invariant=True,
               configs="apply_rope"),
        Kernel("rope_cache_write", "token", "dsv3_triton.rope:rope_cache_write", needs=(DType("q_pe", *_REAL),),
               batch_invariant=True, configs="rope_cache_write"),
        Kernel("kv_cache_write", "token", "dsv3_triton.cache_write:kv_cache_write", needs=(DType("ckv", *_REAL),),
               batch_invariant=True, configs="kv_cache_write"),
        Kernel("kv_cache_gather", "rows", "dsv3_triton.cache_gather:kv_cache_gather", needs=(DType("cache", *_REAL),),
               batch_invariant=True, configs="kv_cache_gather"),
    ]  # fmt: skip
