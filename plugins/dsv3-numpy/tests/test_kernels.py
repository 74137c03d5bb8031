"""Each kernel against the operator's reference."""

import dataclasses

import pytest
import torch
from dsv3_numpy import TRANSPOSED, backend, kernels

from dsv3 import ops
from dsv3.plugin import Prepared

DEVICE = backend.devices()[0]


@pytest.mark.parametrize("tokens", [0, 1, 7])
def test_kernels_agree_with_the_references(tokens: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(tokens, 24)
    weight = torch.randn(24)
    torch.testing.assert_close(kernels.rms_norm(x=x, weight=weight, eps=1e-6), ops.rms_norm(x, weight, 1e-6))
    torch.testing.assert_close(kernels.silu_mul(x=100 * x), ops.silu_mul(100 * x))
    gate = torch.randn(5, 24)
    torch.testing.assert_close(kernels.router_gemm(x=x, weight=gate), ops.router_gemm(x, gate))
    ids = torch.randint(-1, 5, (tokens, 3), dtype=torch.int32)
    for found, wanted in zip(kernels.moe_permute(ids=ids, n_experts=5), ops.moe_permute(ids, 5), strict=True):
        assert torch.equal(found, wanted)


def test_the_transposed_layout_is_exact_and_multiplies_the_same() -> None:
    torch.manual_seed(0)
    weight = Prepared("canonical", "none", (6, 24), {"weight": torch.randn(6, 24)})
    turned = backend.prepare(weight, TRANSPOSED, DEVICE)
    assert torch.equal(backend.unprepare(turned).tensors["weight"], weight.tensors["weight"])
    x = torch.randn(3, 24)
    torch.testing.assert_close(kernels.quant_linear(x=x, w=turned), ops.quant_linear(x, weight))
    with pytest.raises(ValueError, match="cannot prepare layout 'other'"):
        backend.prepare(dataclasses.replace(weight), "other", DEVICE)
