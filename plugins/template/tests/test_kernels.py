"""Each kernel against its operator's reference."""

import pytest
import torch
from dsv3 import ops

from __module__ import kernels


@pytest.mark.parametrize("tokens", [0, 1, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm(tokens: int, dtype: torch.dtype) -> None:
    x, weight = torch.randn(tokens, 48).to(dtype), torch.randn(48).to(dtype)
    torch.testing.assert_close(kernels.rms_norm(x=x, weight=weight, eps=1e-6), ops.rms_norm(x, weight, 1e-6))
