"""Budgets of the products."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv3.budget.approx import Approx
from dsv3.budget.expectation import Expectation
from dsv3.budget.rules import Arguments, against_decomposition, real, rule
from dsv3.budget.units import growth
from dsv3.ops.experts import expert_weight
from dsv3.ops.quantize import torch_dtype
from dsv3.plugin import Prepared
from dsv3.quant import SCHEMES, dequantize
from dsv3.quant.fp8 import decode, dequantize_block

_PRODUCT = "u |y| + g sum |x_k w_k|, elementwise, and a cap on the squared error"


def sizes(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Of x [.., T, K] @ weight [.., N, K]^T: the sums over k of the magnitudes and of the squares of the terms."""
    w = weight.transpose(-1, -2)
    return x.abs() @ w.abs(), x.square() @ w.square()


@rule("linear", text=f"{_PRODUCT}; the bias is one more term.")
def linear(a: Arguments, n: str) -> list[Expectation]:
    x, bias = Approx.of(a["x"]), a.get("bias")
    weight = a["weight"].to(torch.float64)
    made, (spread, squares) = x.product(weight, n), sizes(x.value, weight)
    if bias is not None:
        b = bias.to(torch.float64)
        made = Approx(made.value + b, made.radius + 2 * x.w * (b.abs() + made.value.abs()), made.dtype)
        spread, squares = spread + b.abs(), squares + b.square()
    return [real("y", 0, made, a["x"].dtype, n, spread=spread, squares=squares)]


@rule("router_gemm", text=f"{_PRODUCT}, in float32 whatever x is.")
def router_gemm(a: Arguments, n: str) -> list[Expectation]:
    x, weight = Approx.of(a["x"]), a["weight"].to(torch.float64)
    out = torch.float64 if a["x"].dtype == torch.float64 else torch.float32
    spread, squares = sizes(x.value, weight)
    return [real("logits", 0, x.product(weight, n), out, n, spread=spread, squares=squares)]


@rule("bmm", text=f"{_PRODUCT}, per head.")
def bmm(a: Arguments, n: str) -> list[Expectation]:
    x, w = a["x"].to(torch.float64).transpose(0, 1), a["weight"].to(torch.float64)
    spread, squares = (t.transpose(0, 1) for t in sizes(x, w.transpose(1, 2)))
    g = growth(n, w.shape[1], a["x"].dtype)
    made = Approx(torch.bmm(x, w).transpose(0, 1), g * spread, a["x"].dtype)
    return [real("y", 0, made, a["x"].dtype, n, spread=spread, squares=squares)]


@rule("block_scaled_mm", text=f"{_PRODUCT}, of the dequantised operands; scales may cost four more roundings.")
def block_scaled_mm(a: Arguments, n: str) -> list[Expectation]:
    out = torch_dtype(a["out_dtype"])
    scale = a["a_scale"].to(torch.float64).repeat_interleave(128, dim=-1)[:, : a["a"].shape[1]]
    x = decode(a["a"], torch.float64) * scale
    w = dequantize_block(a["b"], a["b_scale"], torch.float64)
    work = torch.float64 if out == torch.float64 else torch.float32
    made = Approx(x, torch.zeros_like(x), work).product(w, n, extra=4.0)
    spread, squares = sizes(x, w)
    expected: list[Expectation] = [real("y", 0, made, out, n, spread=spread, squares=squares)]
    return against_decomposition("block_scaled_mm", a, expected, n, always=False)


@rule("int8_scaled_mm", text="u |y| + 4 x 2^-24 |y|: the sum is exact in int32, the two scales round.")
def int8_scaled_mm(a: Arguments, n: str) -> list[Expectation]:
    out = torch_dtype(a["out_dtype"])
    x = a["a"].to(torch.float64) * a["a_scale"].to(torch.float64)
    w = a["b"].to(torch.float64) * a["b_scale"].to(torch.float64)
    exact = (a["a"].to(torch.float64) @ a["b"].to(torch.float64).T) * a["a_scale"].to(torch.float64)
    exact = exact * a["b_scale"].to(torch.float64).T
    unit = 2.0**-53 if out == torch.float64 else 2.0**-24
    made = Approx(exact, 4 * unit * exact.abs(), out)
    spread, squares = sizes(x, w)
    return [real("y", 0, made, out, n, spread=spread, squares=squares)]


def through(x: Tensor, w: Prepared, n: str) -> tuple[Approx, Tensor, Tensor]:
    """quant_linear of an input, and the sums of magnitudes and of squares of its terms."""
    made = Approx.of(x).through(w, n)
    if SCHEMES[w.quant].activations == "none":  # its noise is that of weights rounded to x's dtype
        made = Approx(made.value, made.settled().radius, made.dtype, made.noise)
    return made, *sizes(x.to(torch.float64), dequantize(w, torch.float64))


@rule(
    "quant_linear",
    text=f"{_PRODUCT}, of the operands as the scheme quantises them (a code of an activation may be the neighbour where x / "
    "scale is within 2^-22 of a tie; int8 sums are exact); weights may be rounded to x's dtype in w8a16 and w4a16 (4 "
    "times the root of the squares of that), or 4 times what the decomposition errs.",
)
def quant_linear(a: Arguments, n: str) -> list[Expectation]:
    made, spread, squares = through(a["x"], a["w"], n)
    expected: list[Expectation] = [real("y", 0, made, a["x"].dtype, n, spread=spread, squares=squares)]
    return against_decomposition("quant_linear", a, expected, n, always=False)


@rule("grouped_linear", text="that of quant_linear, per expert; rows past offsets[E] are exactly zero.")
def grouped_linear(a: Arguments, n: str) -> list[Expectation]:
    x, w, bounds = a["x"], a["w"], a["offsets"].tolist()
    shape = (x.shape[0], w.shape[1])
    value, radius, noise, spread, squares = (torch.zeros(shape, dtype=torch.float64) for _ in range(5))
    for e in range(w.shape[0]):
        rows = slice(bounds[e], bounds[e + 1])
        if rows.stop > rows.start:
            made, spread[rows], squares[rows] = through(x[rows], expert_weight(w, e), n)
            value[rows], radius[rows], noise[rows] = made.value, made.radius, made.loose
    made = Approx(value, radius, x.dtype, noise)
    expected = real("y", 0, made, x.dtype, n, spread=spread, squares=squares)
    expected.tolerance[bounds[-1] :] = 0
    return against_decomposition("grouped_linear", a, [expected], n, always=False)
