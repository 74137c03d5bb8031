"""The operators: the contract between the model graph and the hardware.

`names()` lists them, `spec(name)` gives signature, dimensions, reference and decomposition. Every operator is also a function
here: its reference, in torch, on any device; float64 in gives float64 arithmetic.
"""

from dsv3.ops.activation import silu_mul, silu_mul_quant
from dsv3.ops.attention import merge_attn_states, mla_decode, mla_prefill, mla_prolog
from dsv3.ops.cache import kv_cache_gather, kv_cache_write, rope_cache_write
from dsv3.ops.collective import all_reduce
from dsv3.ops.embedding import embedding, mtp_combine
from dsv3.ops.experts import fused_experts, grouped_linear, moe, moe_combine, moe_permute
from dsv3.ops.linear import block_scaled_mm, bmm, int8_scaled_mm, linear, quant_linear, router_gemm
from dsv3.ops.norm import add_rms_norm, rms_norm, rms_norm_quant
from dsv3.ops.quantize import act_quant, dequant_block, fn_to_fnuz, quant_int8
from dsv3.ops.rope import apply_rope
from dsv3.ops.routing import grouped_topk, route
from dsv3.ops.sampling import gumbel_argmax
from dsv3.ops.spec import REFERENCES, OpSpec, names, spec

__all__ = [
    "REFERENCES",
    "OpSpec",
    "act_quant",
    "add_rms_norm",
    "all_reduce",
    "apply_rope",
    "block_scaled_mm",
    "bmm",
    "dequant_block",
    "embedding",
    "fn_to_fnuz",
    "fused_experts",
    "grouped_linear",
    "grouped_topk",
    "gumbel_argmax",
    "int8_scaled_mm",
    "kv_cache_gather",
    "kv_cache_write",
    "linear",
    "merge_attn_states",
    "mla_decode",
    "mla_prefill",
    "mla_prolog",
    "moe",
    "moe_combine",
    "moe_permute",
    "mtp_combine",
    "names",
    "quant_int8",
    "quant_linear",
    "rms_norm",
    "rms_norm_quant",
    "rope_cache_write",
    "route",
    "router_gemm",
    "silu_mul",
    "silu_mul_quant",
    "spec",
]
