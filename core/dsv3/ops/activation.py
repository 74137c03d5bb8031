"""The gated activation of the MLPs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dsv3.ops.norm import work_dtype
from dsv3.ops.spec import composite, primitive


@primitive("x[T,2*I] -> y[T,I]")
def silu_mul(x: Tensor) -> Tensor:
    """y = silu(gate) * up, x = [gate | up] of shape [T, 2I] -> [T, I] in x.dtype; float32 inside, one rounding.

    Source: SwiGLU, Shazeer 2020, equation 5. Large negative gates give -0, never NaN.

    Invariants:
    - gate = 0 gives 0 for every finite up
    - scaling up by a power of two scales y by it exactly
    """
    gate, up = x.to(work_dtype(x)).chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate) * up).to(x.dtype)


@composite("x[T,2*I] -> q[T,I]:dtype scale[T,ceil(I/group)]:F32")
def silu_mul_quant(ops: Any, x: Tensor, group: int, dtype: str, scale_fmt: str) -> tuple[Tensor, Tensor]:
    """act_quant(silu_mul(x)). A building block for backends: no decomposition of version 1 calls it.

    Invariants:
    - equal to its two parts called one after the other
    """
    return ops.act_quant(x=ops.silu_mul(x=x), group=group, dtype=dtype, scale_fmt=scale_fmt, amax_floor=1e-4)
