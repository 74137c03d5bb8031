"""Norms, activation, rotation, embedding against float64."""

import pytest
import torch
from budgets import DTYPES, KINDS, draw, pointwise
from dsv3_onnxruntime import kernels
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3 import ops


def check_norm(x: torch.Tensor, weight: torch.Tensor) -> None:
    wanted = ops.rms_norm(x.double(), weight.double(), 1e-6)
    pointwise(kernels.rms_norm(x=x, weight=weight, eps=1e-6), wanted, wanted.abs())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_rms_norm(kind: str, dtype: torch.dtype) -> None:
    for t, d in ((0, 8), (1, 1), (3, 100), (5, 576), (2, 7168)):
        check_norm(draw(kind, t, d).to(dtype), draw("normal", d).to(dtype))
    check_norm(draw(kind, 4, 200).to(dtype)[:, :129], draw("normal", 129).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_add_rms_norm_normalises_the_rounded_sum(kind: str, dtype: torch.dtype) -> None:
    x, residual, weight = draw(kind, 3, 100).to(dtype), draw("normal", 3, 100, seed=1).to(dtype), draw("normal", 100)
    kept = x.clone(), residual.clone()
    y, total = kernels.add_rms_norm(x=x, residual=residual, weight=weight, eps=1e-6)
    assert torch.equal(total, (x.float() + residual.float()).to(dtype))
    wanted = ops.rms_norm(total.double(), weight.double(), 1e-6)
    pointwise(y, wanted, wanted.abs())
    assert torch.equal(kept[0], x) and torch.equal(kept[1], residual)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1.0, 30.0, 1e4])
def test_silu_mul_from_small_to_huge_gates(size: float, dtype: torch.dtype) -> None:
    x = torch.cat([size * torch.linspace(-1, 1, 401), draw("normal", 401)])[None].to(dtype)
    wanted = ops.silu_mul(x.double())
    # exp and the sum inside the sigmoid are relative to the result; 2^-126 covers exp(-x) beyond the range of float32
    pointwise(kernels.silu_mul(x=x), wanted, wanted.abs() + 2.0**-100)
    assert kernels.silu_mul(x=x[:0]).shape == (0, 401)


@given(st.integers(1, 5), st.integers(1, 3), st.integers(1, 20), st.booleans(), st.booleans())
@settings(max_examples=30, deadline=None, derandomize=True)
def test_rope_on_strided_views(t: int, heads: int, pairs: int, interleaved: bool, wide: bool) -> None:
    x = draw("normal", t, heads, 2 * pairs + 5).to(DTYPES[wide])[..., 5:]
    table = torch.cat([torch.cos(draw("normal", 9, pairs)), torch.sin(draw("normal", 9, pairs))], dim=1)
    positions = torch.arange(t) * 5 % 9
    arguments = {"positions": positions.int(), "cos_sin": table, "interleaved": interleaved}
    wanted = ops.apply_rope(x.double(), positions, table.double(), interleaved)
    size = ops.apply_rope(x.double().abs(), positions, table.double().abs(), interleaved).abs() + x.double().abs() * 2
    pointwise(kernels.apply_rope(x=x, **arguments), wanted, size)


def test_embedding_copies_rows_and_refuses_strangers() -> None:
    for dtype in DTYPES:
        table = draw("outliers", 11, 7).to(dtype)
        ids = torch.tensor([10, 0, 0, 3])
        for index in (ids, ids.int()):
            assert torch.equal(kernels.embedding(ids=index, table=table), table[ids])
        assert kernels.embedding(ids=ids[:0], table=table).shape == (0, 7)
        for wrong in (-1, 11):
            with pytest.raises(IndexError, match="rows 0 to 10"):
                kernels.embedding(ids=torch.tensor([0, wrong]), table=table)
