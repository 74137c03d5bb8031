"""Each kernel against its operator's reference in float64: quick to run while a kernel is being written."""

import pytest
import torch
from dsv3 import ops

from __module__ import kernels

ROUNDING = {torch.float32: 2**-20, torch.bfloat16: 2**-8}


@pytest.mark.parametrize("tokens", [0, 1, 5])
@pytest.mark.parametrize("dtype", list(ROUNDING))
def test_rms_norm(tokens: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(tokens, 48).to(dtype), torch.randn(48).to(dtype)
    found = kernels.rms_norm(x=x, weight=weight, eps=1e-6)
    wanted = ops.rms_norm(x.double(), weight.double(), 1e-6)
    assert found.dtype == dtype and found.shape == x.shape
    torch.testing.assert_close(found.double(), wanted, rtol=ROUNDING[dtype], atol=1e-7)
