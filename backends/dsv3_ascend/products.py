"""Products with weights: INT8 with INT8, bfloat16 with INT8 and INT4; and the plain ones, which are torch's own."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from dsv3.plugin import Prepared
from dsv3_ascend import vendor
from dsv3_ascend.pointwise import quantised

_GROUP = 128


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def router_gemm(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x.to(torch.float32), weight.to(torch.float32))


def bmm(x: Tensor, weight: Tensor) -> Tensor:
    return torch.bmm(x.transpose(0, 1), weight.to(x.dtype)).transpose(0, 1).contiguous()


def transposing_bmm(x: Tensor, weight: Tensor) -> Tensor:
    """The vendor's, which takes and gives [T, Nh, .] without copies; a strided weight goes torch's way."""
    if x.shape[0] == 0 or not weight.is_contiguous():
        return bmm(x, weight)
    return vendor.of(x).transpose_batchmatmul(x.contiguous(), weight.to(x.dtype))


def int8_scaled_mm(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, out_dtype: str) -> Tensor:
    """To bfloat16 only: there are no float32 results."""
    if a.shape[0] == 0:
        return torch.empty(0, b.shape[0], dtype=torch.bfloat16, device=a.device)
    scale, token_scale = (s.to(torch.float32).flatten() for s in (b_scale, a_scale))
    return vendor.of(a).quant_matmul(a.contiguous(), b.t(), scale, token_scale)


def quant_linear(x: Tensor, w: Prepared) -> Tensor:
    """Scheme none."""
    return linear(x, w.tensors["weight"])


def quant_linear_w8a8(x: Tensor, w: Prepared) -> Tensor:
    """int8-w8a8 in layout "nz"."""
    if x.shape[0] == 0:
        return x.new_empty(0, w.shape[0])
    q, token_scale = quantised(x)
    return vendor.of(x).quant_matmul(q, w.tensors["weight"], w.tensors["scale"], token_scale)


def quant_linear_w8a16(x: Tensor, w: Prepared) -> Tensor:
    """int8-w8a16, canonical. The vendor takes scales in bfloat16 only: it gets ones, and the channels are scaled after it."""
    if x.shape[0] == 0:
        return x.new_empty(0, w.shape[0])
    weight = w.tensors["weight"].t()
    one = torch.ones(1, weight.shape[1], dtype=x.dtype, device=x.device)
    y = vendor.of(x).weight_quant_matmul(x.contiguous(), weight, one, 0)
    return (y.to(torch.float32) * w.tensors["scale"].view(-1)).to(x.dtype)


def quant_linear_w4a16(x: Tensor, w: Prepared) -> Tensor:
    """int4-w4a16 in layout "int4". Scales of groups are rounded to bfloat16."""
    if x.shape[0] == 0:
        return x.new_empty(0, w.shape[0])
    scale = w.tensors["antiquant"]
    group = 0 if scale.shape[0] == 1 else _GROUP
    return vendor.of(x).weight_quant_matmul(x.contiguous(), w.tensors["weight"], scale, group)
