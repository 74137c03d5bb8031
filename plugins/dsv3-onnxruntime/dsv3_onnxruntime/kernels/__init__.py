"""The kernels: torch tensors in and out, the arithmetic in ONNX Runtime. Each takes the operator's arguments by keyword."""

from dsv3_onnxruntime.kernels.attention import mla_decode, mla_prefill
from dsv3_onnxruntime.kernels.elementwise import add_rms_norm, apply_rope, embedding, rms_norm, silu_mul
from dsv3_onnxruntime.kernels.experts import fused_experts, grouped_linear
from dsv3_onnxruntime.kernels.products import bmm, linear, mtp_combine, quant_linear, router_gemm
from dsv3_onnxruntime.kernels.quantise import act_quant, block_scaled_mm, dequant_block, int8_scaled_mm, quant_int8
from dsv3_onnxruntime.kernels.routing import grouped_topk, route

__all__ = [
    "act_quant",
    "add_rms_norm",
    "apply_rope",
    "block_scaled_mm",
    "bmm",
    "dequant_block",
    "embedding",
    "fused_experts",
    "grouped_linear",
    "grouped_topk",
    "int8_scaled_mm",
    "linear",
    "mla_decode",
    "mla_prefill",
    "mtp_combine",
    "quant_int8",
    "quant_linear",
    "rms_norm",
    "route",
    "router_gemm",
    "silu_mul",
]
