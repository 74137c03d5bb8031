"""What each operator is in standard ONNX operators: `EMITTERS[op](g, **arguments)`.

Arguments are those of the contract: values for tensors, `Weight` for prepared weights, `Cache` for the latent cache, plain
numbers for the rest. The arithmetic is the reference's: float32 (float64 for float64), one rounding at the end.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dsv3.export.emit.activation import silu_mul, silu_mul_quant
from dsv3.export.emit.attention import merge_attn_states, mla_decode, mla_prefill, mla_prolog
from dsv3.export.emit.cache import kv_cache_gather, kv_cache_write, rope_cache_write
from dsv3.export.emit.collective import all_reduce
from dsv3.export.emit.embedding import embedding, mtp_combine
from dsv3.export.emit.experts import fused_experts, grouped_linear, moe, moe_combine, moe_permute
from dsv3.export.emit.linear import block_scaled_mm, bmm, int8_scaled_mm, linear, quant_linear, router_gemm
from dsv3.export.emit.norm import add_rms_norm, rms_norm, rms_norm_quant
from dsv3.export.emit.quantize import act_quant, dequant_block, fn_to_fnuz, quant_int8
from dsv3.export.emit.rope import apply_rope
from dsv3.export.emit.routing import grouped_topk, route
from dsv3.export.emit.sampling import gumbel_argmax

EMITTERS: dict[str, Callable[..., Any]] = {
    f.__name__: f
    for f in (
        embedding, rms_norm, apply_rope, silu_mul, act_quant, quant_int8, dequant_block, fn_to_fnuz, linear, bmm, router_gemm,
        grouped_topk, moe_permute, moe_combine, kv_cache_write, kv_cache_gather, mla_prefill, mla_decode, merge_attn_states,
        gumbel_argmax, add_rms_norm, rms_norm_quant, silu_mul_quant, block_scaled_mm, int8_scaled_mm, quant_linear,
        grouped_linear, route, fused_experts, moe, rope_cache_write, mla_prolog, mtp_combine, all_reduce,
    )
}  # fmt: skip
