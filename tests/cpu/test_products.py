"""Products with stored weights: against float64, alone and beside others, on one thread and on two."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3 import ops
from dsv3.budget.units import BF16_OPERAND
from dsv3.plugin import Prepared
from dsv3_cpu import experts, int8, linear, team, views
from tests.cpu.weights import LAYERS, SCHEMES, WEIGHT_ONLY, real, weight


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch):
    """Sets the number of threads, which all work gets; restores it."""
    before = torch.get_num_threads()
    monkeypatch.setattr(team, "WORTH_THREADS", 0)
    yield torch.set_num_threads
    torch.set_num_threads(before)


@settings(max_examples=40, deadline=None)
@given(
    quant=st.sampled_from(WEIGHT_ONLY), rows=st.integers(1, 300), width=st.integers(1, 400), tokens=st.integers(1, 16),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]), seed=st.integers(0, 1000),
)  # fmt: skip
def test_few_rows_are_float64_s(quant: str, rows: int, width: int, tokens: int, dtype: torch.dtype, seed: int) -> None:
    w = weight(quant, rows, width, dtype=torch.bfloat16, seed=seed)
    x = torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed)).to(dtype)
    size = x.double().abs() @ real(w).abs().T
    wanted = x.double() @ real(w).T
    error = (linear.quant_linear_few(x, w).double() - wanted).abs()
    half = dtype == torch.bfloat16
    whole = half and quant.startswith("int")  # activations as whole numbers, see below
    assert bool((error <= (BF16_OPERAND if whole else 2.0**-18) * size + (2.0**-8 * wanted.abs() if half else 0)).all())


def test_every_fp8_code_that_is_a_number_is_exact() -> None:
    """Subnormal ones too, at scales and tokens from 2^-60 to 2^60: a product of one code is that code."""
    codes = np.array([c for c in range(256) if c & 0x7F != 0x7F], np.uint8)
    wide = np.zeros((256, 128), np.uint8)
    wide[: codes.size, 5] = codes
    for scale in (2.0**-60, 1.0, 2.0**60):
        for factor in (2.0**-60, 1.0, 2.0**60):
            stored = torch.from_numpy(wide).view(torch.float8_e4m3fn)
            w = Prepared("canonical", "fp8-w8a16", (256, 128), {"weight": stored, "scale": torch.full((2, 1), scale)})
            x = torch.zeros(1, 128)
            x[0, 5] = factor
            wanted = (stored.float()[:, 5].double() * scale * factor).float()
            assert torch.equal(linear.quant_linear_few(x, w)[0], wanted)
            several = linear.quant_linear_few(x.repeat(3, 1), w)
            assert torch.equal(several[1], wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("quant", WEIGHT_ONLY)
def test_infinity_and_nan_show_in_the_result(quant: str, bad: float, dtype: torch.dtype) -> None:
    w = weight(quant, 40, 200, dtype=torch.bfloat16)
    x = torch.randn(3, 200).to(dtype)
    x[1, 7] = bad
    got = linear.quant_linear_few(x, w)
    assert torch.isfinite(got[[0, 2]]).all()
    wanted = x[1].double() @ real(w).T
    if dtype == torch.bfloat16 and quant.startswith("int"):  # which have a block's numbers under one scale
        assert torch.isnan(got[1]).all()
        return
    assert torch.equal(torch.isnan(got[1]), torch.isnan(wanted)) and torch.equal(torch.isinf(got[1]), torch.isinf(wanted))


@pytest.mark.parametrize("quant", ["int8-w8a16", "int4-w4a16"])
def test_activations_as_whole_numbers_lose_less_than_bfloat16_does(quant: str) -> None:
    """Blocks of tiny and of huge numbers, and one number a thousand times the others'."""
    w = weight(quant, 64, 512, dtype=torch.bfloat16)
    x = torch.randn(4, 512)
    x[0] *= 2.0**-110
    x[1] *= 2.0**110
    x[2, 200] = 1000.0
    x[3, :128] = 0.0
    x = x.to(torch.bfloat16)
    exact = x.double() @ real(w).T
    error = (linear.quant_linear_few(x, w).double() - exact).abs()
    lost = 2.0**-13 if quant.startswith("int4") else 2.0**-14  # of a block's largest number, halved by rounding
    blocks = x.double().abs().view(4, 4, 128).amax(2, keepdim=True).expand(4, 4, 128).reshape(4, 512)
    bound = 2.0**-8 * exact.abs() + lost / 2 * blocks @ real(w).abs().T
    assert bool((error <= bound).all())
    rounding = (2.0**-9 * exact.abs()).pow(2).mean(1).sqrt()  # what the result loses by being bfloat16
    assert bool((error.pow(2).mean(1).sqrt() < rounding * 1.25).all())


def test_int8_activations_are_those_of_quant_int8() -> None:
    """To the last bit of their scale: in a row of twenty a number lies so near the middle of two codes that it tells."""
    w, x = weight("int8-w8a8", 64, 300, dtype=torch.bfloat16), torch.randn(32 * 30, 300).to(torch.bfloat16)
    codes, scale = int8.quant_int8(x, 1e-10)
    wanted = (codes.double() @ w.tensors["weight"].double().T) * scale.double() * w.tensors["scale"].double().T
    got = torch.cat([linear.quant_linear_few(part, w) for part in x.split(32)]).double()
    assert bool(((got - wanted).abs() <= 2.0**-8 * wanted.abs() + 1e-6 * wanted.abs().max()).all())


@pytest.mark.parametrize("quant", WEIGHT_ONLY)
def test_a_row_has_the_same_bits_alone_and_beside_others(quant: str) -> None:
    w, x = weight(quant, 200, 300, dtype=torch.bfloat16), torch.randn(16, 300).to(torch.bfloat16)
    whole = linear.quant_linear_few(x, w)
    for count in (1, 2, 3, 5, 7):
        assert torch.equal(torch.cat([linear.quant_linear_few(x[i : i + count], w) for i in range(0, 16, count)]), whole)


@pytest.mark.parametrize("rows", [1, 5, 40])
@pytest.mark.parametrize("quant", SCHEMES)
def test_results_do_not_depend_on_the_number_of_threads(quant: str, rows: int, threads) -> None:
    w, x = weight(quant, 200, 300, dtype=torch.bfloat16), torch.randn(rows, 300).to(torch.bfloat16)
    product = linear.quant_linear_few if rows <= linear.FEW else linear.quant_linear_many
    found = []
    for count in (1, 2, 3):
        threads(count)
        found.append(product(x, w))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize("quant", WEIGHT_ONLY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_written_out_weights_are_the_dequantised(quant: str, dtype: torch.dtype) -> None:
    w = weight(quant, 70, 300, dtype=torch.bfloat16)
    got = linear.written_out(views.weight(w), 0, 20, 33, 300, dtype)
    assert torch.equal(got, real(w)[20:53].to(torch.float32).to(dtype))


@given(st.integers(1, 1 << 20))
def test_rows_are_padded_by_an_eighth_at_most_and_to_few_numbers(rows: int) -> None:
    padded = linear.padded_rows(rows)
    assert rows <= padded <= max(rows * 9 // 8 + 1, -(-rows // 16) * 16) and linear.padded_rows(padded) == padded
    assert len({linear.padded_rows(n) for n in range(1, 2049)}) < 50


def test_padded_rows_change_no_other_row_s_result() -> None:
    x, w = torch.randn(37, 64, dtype=torch.bfloat16), torch.randn(48, 64, dtype=torch.bfloat16)
    prepared = Prepared("canonical", "none", (48, 64), {"weight": w})
    y = linear.quant_linear_bf16(x, prepared)
    wanted = x.to(torch.float64) @ w.to(torch.float64).t()
    assert y.shape == (37, 48) and torch.allclose(y.to(torch.float64), wanted, rtol=2**-7, atol=2**-7)
    x[5] = float("nan")
    found = linear.quant_linear_bf16(x, prepared)
    assert found[5].isnan().all() and torch.equal(found[6:], y[6:])


@pytest.mark.parametrize("quant", WEIGHT_ONLY)
def test_products_in_bfloat16_are_within_their_class(quant: str) -> None:
    """What runs where the processor multiplies bfloat16 in hardware; torch computes the same elsewhere, slowly."""
    w = weight(quant, 160, 300, dtype=torch.bfloat16)
    x = torch.randn(33, 300).to(torch.bfloat16)
    wanted, size = x.double() @ real(w).T, x.double().abs() @ real(w).abs().T
    error = (linear.quant_linear_bf16(x, w).double() - wanted).abs()
    assert bool((error <= 2 * 2.0**-8 * wanted.abs() + BF16_OPERAND * size).all())


def _experts(x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, w13: Prepared, w2: Prepared) -> torch.Tensor:
    """In float64, pair by pair."""
    up, down = real(w13), real(w2)
    y = torch.zeros(x.shape[0], w2.shape[1], dtype=torch.float64)
    for t, j in np.ndindex(*ids.shape):
        e = int(ids[t, j])
        if 0 <= e < w13.shape[0]:
            gate, rest = (up[e] @ x[t].double()).chunk(2)
            y[t] += weights[t, j].double() * (down[e] @ (torch.nn.functional.silu(gate) * rest))
    return y


@pytest.mark.parametrize("tokens", [1, 3, 9, 16])
@pytest.mark.parametrize("width", [96, 128, 384])
@pytest.mark.parametrize("quant", LAYERS)
def test_experts_are_float64_s(quant: str, width: int, tokens: int) -> None:
    """Widths that are no multiple of 128 share FP8 blocks between gate and up."""
    w13, w2 = weight(quant, 6, 2 * width, 160), weight(quant, 6, 160, width)
    x, weights = torch.randn(tokens, 160), torch.rand(tokens, 3)
    ids = torch.stack([torch.randperm(6)[:3] for _ in range(tokens)]).to(torch.int32)
    ids[::2, 1] = -1
    few = experts.fused_experts_few(x, weights, ids, w13, w2)
    if quant == "int8-w8a8":  # activations are rounded too, where a tie may go the other way
        wanted = ops.fused_experts(x, weights, ids, w13, w2).double()
        assert (few - wanted).abs().max() < 2e-3 * wanted.abs().max()
        return
    wanted = _experts(x, weights, ids, w13, w2)
    many = experts.fused_experts_many(x, weights, ids, w13, w2)
    limit = 1e-4 * wanted.abs().max()
    assert (few - wanted).abs().max() < limit and (many - wanted).abs().max() < limit


def test_experts_do_not_depend_on_the_number_of_threads(threads) -> None:
    w13, w2 = weight("fp8-w8a16", 6, 256, 160), weight("fp8-w8a16", 6, 160, 128)
    x, weights = torch.randn(5, 160), torch.rand(5, 3)
    ids = torch.stack([torch.randperm(6)[:3] for _ in range(5)]).to(torch.int32)
    found = []
    for count in (1, 2, 3):
        threads(count)
        found.append(experts.fused_experts_few(x, weights, ids, w13, w2))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
