"""Every call of a vendor operator, each in a function that takes tensors on an NPU. `cpu` has the same functions, for
`--emulate`.

The operators are in `torch.ops.npu` once torch_npu is imported. Arguments, dtypes and shapes are those of torch_npu 2.14;
tests/ascend holds every call here to the schemas and shape rules in the vendor's published wheel. Nothing here has run on an
NPU.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

# aclFormat of a tensor in memory.
_ND, _FRACTAL_NZ = 2, 29


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x, weight of one dtype -> x / sqrt(mean(x^2) + eps) * weight."""
    return torch.ops.npu.npu_rms_norm(x, weight, epsilon=eps)[0]


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """-> the norm of x + residual, and x + residual."""
    y, _, total = torch.ops.npu.npu_add_rms_norm(x, residual, weight, epsilon=eps)
    return y, total


def swiglu(x: Tensor) -> Tensor:
    """[.., 2I] -> silu(first half) * second half."""
    return torch.ops.npu.npu_swiglu(x, dim=-1)


def dynamic_quant(x: Tensor) -> tuple[Tensor, Tensor]:
    """x bf16 [T, K] -> i8 [T, K], f32 [T] = max|row| / 127. What a row of zeros gives is not said."""
    return torch.ops.npu.npu_dynamic_quant(x, dst_type=torch.int8)


def quant_matmul(q: Tensor, weight: Tensor, scale: Tensor, token_scale: Tensor) -> Tensor:
    """q i8 [T, K], weight i8 [K, N], scale f32 [N], token_scale f32 [T] -> bf16 [T, N]; sums in int32."""
    return torch.ops.npu.npu_quant_matmul(q, weight, scale, pertoken_scale=token_scale, output_dtype=torch.bfloat16)


def weight_quant_matmul(x: Tensor, weight: Tensor, scale: Tensor, group: int) -> Tensor:
    """x bf16 [T, K] times weight i8 [K, N], or i32 [K, N/8] of packed int4, that is multiplied with scale bf16 first: [1, N]
    for group 0, else [K/group, N] -> bf16 [T, N]."""
    return torch.ops.npu.npu_weight_quant_batchmatmul(x, weight, scale, antiquant_group_size=group)


def int4_pack(codes: Tensor) -> Tensor:
    """i32 [K, N] in [-8, 7] -> i32 [K, N/8], eight nibbles each, in an order of the vendor's."""
    return torch.ops.npu.npu_convert_weight_to_int4pack(codes)


def grouped_matmul(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """x bf16 [M, K], weight bf16 [E, K, N], ends i64 [E], ascending to M: expert e has the rows before ends[e] -> bf16
    [M, N]."""
    return torch.ops.npu.npu_grouped_matmul(
        [x], [weight], group_list=ends, split_item=3, group_type=0, group_list_type=0, output_dtype=torch.bfloat16
    )[0]


def grouped_int8_matmul(q: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """q i8 [M, K], weight i8 [E, K, N] -> the sums, i32 [M, N]."""
    return torch.ops.npu.npu_grouped_matmul(
        [q], [weight], group_list=ends, split_item=3, group_type=0, group_list_type=0, output_dtype=torch.int32
    )[0]


def grouped_weight_quant_matmul(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """x bf16 [M, K], weight i8 [E, K, N], taken as the whole numbers that they are -> bf16 [M, N]."""
    one = torch.ones(weight.shape[0], weight.shape[2], dtype=x.dtype, device=x.device)
    return torch.ops.npu.npu_grouped_matmul(
        [x],
        [weight],
        antiquant_scale=[one],
        antiquant_offset=[torch.zeros_like(one)],
        group_list=ends,
        split_item=3,
        group_type=0,
        group_list_type=0,
        output_dtype=x.dtype,
    )[0]


def dequant_swiglu_quant(sums: Tensor, scale: Tensor, token_scale: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """sums i32 [M, 2I], scale f32 [E, 2I], token_scale f32 [M], counts i64 [E] of rows -> i8 [M, I], f32 [M]: the gated
    activation of sums * scale * token_scale, quantised like `dynamic_quant`. Rows past the sum of counts are not written."""
    return torch.ops.npu.npu_dequant_swiglu_quant(
        sums, weight_scale=scale, activation_scale=token_scale, group_index=counts, activate_left=True, quant_mode=1
    )


def gating_top_k(
    logits: Tensor, bias: Tensor | None, n_group: int, topk_group: int, topk: int, sigmoid: bool, top2: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """logits f32 [T, E], bias f32 [E] -> weights f32 [T, k], ids i32 [T, k]. sigmoid: weights are divided by their sum; else
    they are those of a softmax, and are not. top2: a group's score is the sum of its two best, else its best."""
    weights, ids, _ = torch.ops.npu.npu_moe_gating_top_k(
        logits,
        topk,
        bias=bias,
        k_group=topk_group,
        group_count=n_group,
        group_select_mode=1 if top2 else 0,
        renorm=0,
        norm_type=1 if sigmoid else 0,
        out_flag=False,
        routed_scaling_factor=scale,
        eps=1e-20,
    )
    return weights, ids


def init_routing(x: Tensor, ids: Tensor, n_experts: int, scale: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x [T, H], ids i32 [T, k] in [0, n_experts], n_experts itself for a pair that goes nowhere; scale f32 [T] or None.

    -> rows [T*k, H] of x sorted by expert, stably; place i32 [T*k], the row of each pair, -1 for those that go nowhere; counts
    i64 [n_experts]; the rows' scales f32 [T*k]. What comes after the sum of counts in rows and scales is not written."""
    return torch.ops.npu.npu_moe_init_routing_v2(
        x,
        ids,
        scale=scale,
        active_num=ids.numel(),
        expert_num=n_experts + 1,
        drop_pad_mode=0,
        expert_tokens_num_type=1,
        expert_tokens_num_flag=True,
        quant_mode=-1,
        active_expert_range=[0, n_experts],
        row_idx_type=0,
    )


def rotary_mul(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """x [1, T, N, P], cos and sin [1, T, 1, P] of x's dtype, one number for each of a pair -> x * cos + turned(x) * sin."""
    return torch.ops.npu.npu_rotary_mul(x, cos, sin, rotary_mode="interleave" if interleaved else "half")


def transpose_batchmatmul(x: Tensor, weight: Tensor) -> Tensor:
    """x [T, Nh, A], weight [Nh, A, C] -> [T, Nh, C]."""
    return torch.ops.npu.npu_transpose_batchmatmul(x, weight, perm_x1=[1, 0, 2], perm_x2=[0, 1, 2], perm_y=[1, 0, 2])


@functools.cache
def _hidden(device: torch.device) -> Tensor:
    """The mask of the vendor's compressed causal mode, which is aligned bottom right: 2048 x 2048, true where hidden."""
    return torch.ones(2048, 2048, dtype=torch.bool, device=device).triu_(1)


def latent_attention(
    q: Tensor,
    q_rope: Tensor,
    ckv: Tensor,
    kpe: Tensor,
    block_table: Tensor,
    ends: list[int],
    lengths: list[int],
    scale: float,
) -> tuple[Tensor, Tensor]:
    """q bf16 [T, Nh, 512], q_rope bf16 [T, Nh, 64], ckv bf16 [pages, 128, 512], kpe bf16 [pages, 128, 64], block_table i32
    [S, maxp]; sequence s has the queries before ends[s] and lengths[s] keys -> o bf16 [T, Nh, 512], lse f32 [T, Nh, 1]."""
    first = [0, *ends[:-1]]
    causal = any(end - start > 1 for start, end in zip(first, ends, strict=True))
    return torch.ops.npu.npu_fused_infer_attention_score_v2(
        q,
        ckv,
        ckv,
        query_rope=q_rope,
        key_rope=kpe,
        atten_mask=_hidden(q.device) if causal else None,
        actual_seq_qlen=ends,
        actual_seq_kvlen=lengths,
        block_table=block_table,
        num_query_heads=q.shape[1],
        num_key_value_heads=1,
        softmax_scale=scale,
        input_layout="TND",
        sparse_mode=3 if causal else 0,
        block_size=ckv.shape[1],
        return_softmax_lse=True,
    )


def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, ends_q: list[int], ends_k: list[int], scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    """q, k bf16 [T, Nh, 192], v bf16 [T, Nh, 128], packed -> o bf16 [Tq, Nh, 128], lse f32 [Tq, Nh, 1]."""
    return torch.ops.npu.npu_fused_infer_attention_score_v2(
        q,
        k,
        v,
        atten_mask=_hidden(q.device) if causal else None,
        actual_seq_qlen=ends_q,
        actual_seq_kvlen=ends_k,
        num_query_heads=q.shape[1],
        num_key_value_heads=k.shape[1],
        softmax_scale=scale,
        input_layout="TND",
        sparse_mode=3 if causal else 0,
        return_softmax_lse=True,
    )


def to_nz(weight: Tensor) -> Tensor:
    """The same numbers in FRACTAL_NZ, the tiles that the matrix unit reads."""
    return torch.ops.npu.npu_format_cast(weight, _FRACTAL_NZ)


def to_nd(weight: Tensor) -> Tensor:
    """The inverse of `to_nz`."""
    return torch.ops.npu.npu_format_cast(weight, _ND)
