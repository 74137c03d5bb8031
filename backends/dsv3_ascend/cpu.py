"""What `--emulate` puts in the place of the vendor's operators: the functions of `npu`, computed on the CPU as the vendor's
pages say. Sums of INT8 products are exact; everything else is float32 with one rounding.

Where those pages leave a result open, it is something useless here, so that nothing comes to rest on it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from dsv3 import ops
from dsv3_ascend.int8 import product

# Codes of a row of zeros, and rows that an operator does not write.
_OPEN = 99


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return ops.rms_norm(x=x, weight=weight, eps=eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = x + residual
    return rms_norm(total, weight, eps), total


def swiglu(x: Tensor) -> Tensor:
    return ops.silu_mul(x=x)


def dynamic_quant(x: Tensor) -> tuple[Tensor, Tensor]:
    work = x.to(torch.float32)
    scale = work.abs().amax(dim=-1, keepdim=True) / 127
    q = torch.round(work / torch.where(scale == 0, 1, scale)).clamp_(-127, 127)
    return torch.where(scale == 0, _OPEN, q).to(torch.int8), scale.squeeze(-1)


def quant_matmul(q: Tensor, weight: Tensor, scale: Tensor, token_scale: Tensor) -> Tensor:
    sums = product(q, weight).to(torch.float32)
    return sums.mul_(token_scale[:, None]).mul_(scale).to(torch.bfloat16)


def weight_quant_matmul(x: Tensor, weight: Tensor, scale: Tensor, group: int) -> Tensor:
    codes = int4_unpack(weight) if weight.dtype == torch.int32 else weight
    spread = scale.repeat_interleave(group, dim=0)[: codes.shape[0]] if group else scale
    return torch.matmul(x, codes.to(x.dtype) * spread)


def int4_pack(codes: Tensor) -> Tensor:
    nibbles = (codes & 15).view(*codes.shape[:-1], -1, 8)
    return (nibbles << torch.arange(0, 32, 4, dtype=torch.int32)).sum(dim=-1, dtype=torch.int32)


def int4_unpack(packed: Tensor) -> Tensor:
    """i32 [K, N/8] -> i32 [K, N]: what weight_quant_matmul does inside."""
    shifted = packed[..., None] << torch.arange(28, -4, -4, dtype=torch.int32)
    return (shifted >> 28).flatten(-2)


def _groups(ends: Tensor) -> list[tuple[int, int, int]]:
    """(expert, first row, end) of those that have any."""
    last = ends.tolist()
    return [(e, start, end) for e, (start, end) in enumerate(zip([0, *last], last, strict=False)) if end > start]


def grouped_matmul(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    y = torch.full((x.shape[0], weight.shape[2]), float("nan"), dtype=x.dtype)
    for e, start, end in _groups(ends):
        y[start:end] = x[start:end] @ weight[e]
    return y


def grouped_int8_matmul(q: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    y = torch.full((q.shape[0], weight.shape[2]), _OPEN, dtype=torch.int32)
    for e, start, end in _groups(ends):
        y[start:end] = product(q[start:end], weight[e])
    return y


def grouped_weight_quant_matmul(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    y = torch.full((x.shape[0], weight.shape[2]), float("nan"), dtype=x.dtype)
    for e, start, end in _groups(ends):
        y[start:end] = x[start:end] @ weight[e].to(x.dtype)
    return y


def dequant_swiglu_quant(sums: Tensor, scale: Tensor, token_scale: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    rows = int(counts.sum())
    expert = torch.repeat_interleave(torch.arange(counts.shape[0]), counts)
    h = sums[:rows].to(torch.float32) * token_scale[:rows, None] * scale[expert]
    gate, up = h.chunk(2, dim=-1)
    q = torch.full((sums.shape[0], sums.shape[1] // 2), _OPEN, dtype=torch.int8)
    s = torch.full((sums.shape[0],), float("nan"))
    q[:rows], s[:rows] = dynamic_quant(F.silu(gate) * up)
    return q, s


def gating_top_k(
    logits: Tensor, bias: Tensor | None, n_group: int, topk_group: int, topk: int, sigmoid: bool, top2: bool, scale: float
) -> tuple[Tensor, Tensor]:
    return ops.grouped_topk(
        logits=logits,
        bias=bias,
        n_group=n_group,
        topk_group=topk_group,
        topk=topk,
        score="sigmoid" if sigmoid else "softmax",
        group_score="top2_sum" if top2 else "max",
        renormalize=sigmoid,
        scale=scale,
    )


def init_routing(x: Tensor, ids: Tensor, n_experts: int, scale: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    flat, k = ids.flatten().to(torch.int64), ids.shape[1]
    order = torch.sort(flat, stable=True).indices
    counts = torch.bincount(flat, minlength=n_experts + 1)[:n_experts]
    valid = int(counts.sum())
    place = torch.full_like(flat, -1)
    place[order[:valid]] = torch.arange(valid)
    token = torch.div(order[:valid], k, rounding_mode="floor")
    rows = torch.full((flat.shape[0], x.shape[1]), _OPEN, dtype=x.dtype)
    rows[:valid] = x[token]
    scales = torch.full((flat.shape[0],), float("nan"))
    if scale is not None:
        scales[:valid] = scale[token]
    return rows, place.to(torch.int32), counts, scales


def rotary_mul(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    if interleaved:
        turned = torch.stack((-x[..., 1::2], x[..., 0::2]), dim=-1).flatten(-2)
    else:
        first, second = x.chunk(2, dim=-1)
        turned = torch.cat((-second, first), dim=-1)
    return x * cos + turned * sin


def transpose_batchmatmul(x: Tensor, weight: Tensor) -> Tensor:
    return torch.bmm(x.transpose(0, 1), weight).transpose(0, 1).contiguous()


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
    size, found = ckv.shape[1], []
    for s, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        pages = block_table[s, : -(-lengths[s] // size)].to(torch.int64)
        value, rope = (plane[pages].flatten(0, 1)[: lengths[s]].to(torch.float32) for plane in (ckv, kpe))
        keys = torch.cat((value, rope), dim=-1)[None]
        queries = torch.cat((q[start:end], q_rope[start:end]), dim=-1).to(torch.float32).transpose(0, 1)
        found.append(_attend(queries, keys, value[None], scale, causal=True))
    return _joined(found, q.dtype)


def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, ends_q: list[int], ends_k: list[int], scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    found = []
    for (a, b), (c, d) in zip(zip([0, *ends_q], ends_q, strict=False), zip([0, *ends_k], ends_k, strict=False), strict=True):
        queries, keys, values = (t.to(torch.float32).transpose(0, 1) for t in (q[a:b], k[c:d], v[c:d]))
        found.append(_attend(queries, keys, values, scale, causal))
    return _joined(found, q.dtype)


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """float32 q [Nh, n, D], k [Nh or 1, m, D], v [Nh or 1, m, Dv] -> [Nh, n, Dv], lse [Nh, n]; causal bottom right."""
    scores = torch.matmul(q, k.transpose(1, 2)) * scale
    n, m = scores.shape[1:]
    if causal and n > 1:
        scores = scores.masked_fill(torch.ones(n, m, dtype=torch.bool).triu_(m - n + 1), float("-inf"))
    lse = torch.logsumexp(scores, dim=-1)
    return torch.matmul(torch.exp(scores - lse[..., None]), v), lse


def _joined(found: list[tuple[Tensor, Tensor]], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    o = torch.cat([o for o, _ in found], dim=1).transpose(0, 1).to(dtype)
    return o.contiguous(), torch.cat([lse for _, lse in found], dim=1).T[..., None]


def to_nz(weight: Tensor) -> Tensor:
    return weight.clone()


def to_nd(weight: Tensor) -> Tensor:
    return weight.clone()
