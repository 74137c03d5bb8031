"""Rounding a weight errs as little as each scheme says."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3.plugin import Prepared
from dsv3.quant import SCHEMES, dequantize, quantize, rounding_bound

SIZES = st.integers(1, 300)


@pytest.mark.parametrize("quant", [name for name in SCHEMES if name != "none"])
@settings(max_examples=25, deadline=None)
@given(SIZES, SIZES, st.integers(0, 2**31), st.sampled_from([0.0, 1e-20, 1.0, 1e20]), st.sampled_from(["float32", "ue8m0"]))
def test_the_error_is_within_what_is_stated(quant: str, n: int, k: int, seed: int, size: float, scale_fmt: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, k, generator=generator) * size
    weight *= 100.0 ** torch.randn(1, k, generator=generator).round()  # outliers
    w = Prepared("canonical", quant, (n, k), quantize(weight, quant, scale_fmt))  # type: ignore[arg-type]
    error = (dequantize(w, torch.float64) - weight.double()).abs()
    bound = rounding_bound(w)
    assert bound.shape == (n, k)
    assert bool((error <= bound * (1 + 1e-6) + 1e-300).all())


@pytest.mark.parametrize("quant", [name for name in SCHEMES if name != "none"])
def test_what_is_stated_is_no_more_than_needed(quant: str) -> None:
    weight = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    w = Prepared("canonical", quant, (256, 256), quantize(weight, quant))  # type: ignore[arg-type]
    error = (dequantize(w, torch.float64) - weight.double()).abs()
    assert float((error / rounding_bound(w)).max()) > 0.9
