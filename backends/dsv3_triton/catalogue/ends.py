"""Both ends of the model, and what stands alone: embedding, sampling, merging attention states, dequantised weights."""

from __future__ import annotations

from dsv3.plugin import DType, Kernel
from dsv3_triton.facts import Facts

_REAL = ("bfloat16", "float32")


def kernels(facts: Facts) -> list[Kernel]:
    """All of them for every architecture."""
    return [
        Kernel("embedding", "rows", "dsv3_triton.embedding:embedding", needs=(DType("table", *_REAL),), numerics="exact",
               batch_invariant=True, configs="embedding"),
        Kernel("gumbel_argmax", "two-stage", "dsv3_triton.sampling:gumbel_argmax", needs=(DType("logits", *_REAL),),
               batch_invariant=True, configs="gumbel_argmax"),
        Kernel("merge_attn_states", "rows", "dsv3_triton.merge:merge_attn_states", needs=(DType("o1", *_REAL),),
               batch_invariant=True, configs="merge_attn_states"),
        Kernel("dequant_block", "tiles", "dsv3_triton.dequantize:dequant_block", needs=(DType("dtype", *_REAL),),
               batch_invariant=True, configs="dequant_block"),
    ]  # fmt: skip
