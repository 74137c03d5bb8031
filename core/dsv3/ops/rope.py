"""Rotary position embedding."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv3.ops.norm import work_dtype
from dsv3.ops.spec import primitive


@primitive("x[T,N,P] positions[T]:int cos_sin[L,P]:f32 -> y[T,N,P]")
def apply_rope(x: Tensor, positions: Tensor, cos_sin: Tensor, interleaved: bool = True) -> Tensor:
    """Rotate each pair of x by the angle of its position.

    x [T, N, P] (may be a strided view), positions [T], cos_sin [L, P] = [P/2 cosines | P/2 sines] per position.
    interleaved: pairs are (2j, 2j+1), as DeepSeek's checkpoints have them; otherwise (j, j + P/2). Every output stays where
    its input was. float32 inside. Source: Su et al. 2021, equation 34. YaRN is in the table only.

    Invariants:
    - position 0 (cosine 1, sine 0) changes nothing
    - the norm of every pair is kept where the table's cos^2 + sin^2 = 1
    - heads do not mix; positions need not be ascending, and may repeat
    """
    work = work_dtype(x)
    cos, sin = cos_sin.index_select(0, positions.to(torch.int64)).to(work).unsqueeze(1).chunk(2, dim=-1)
    v = x.to(work)
    if interleaved:
        a, b = v[..., 0::2], v[..., 1::2]
        return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2).to(x.dtype)
    a, b = v.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1).to(x.dtype)
