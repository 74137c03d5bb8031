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
from dsv3.quant import dequantize
from dsv3.quant.fp8 import decode, dequantize_block

_PRODUCT = "u |y| + g sum |x_k w_k|, elementwise, and a cap on the squared error"


@rule("linear", text=f"{_PRODUCT}; the bias is one more term.")
def linear(a: Arguments, n: str) -> list[Expectation]:
    x, bias = Approx.of(a["x"]), a.get("bias")
    weight = a["weight"].to(torch.float64)
    made, spread = x.product(weight, n), x.value.abs() @ weight.abs().T
    if bias is not None:
        b = bias.to(torch.float64)
        made = Approx(made.value + b, made.radius + 2 * x.w * (b.abs() + made.value.abs()), made.dtype)
        spread = spread + b.abs()
    return [real("y", 0, made, a["x"].dtype, n, spread=spread)]


@rule("router_gemm", text=f"{_PRODUCT}, in float32 whatever x is.")
def router_gemm(a: Arguments, n: str) -> list[Expectation]:
    x, weight = Approx.of(a["x"]), a["weight"].to(torch.float64)
    out = torch.float64 if a["x"].dtype == torch.float64 else torch.float32
    return [real("logits", 0, x.product(weight, n), out, n, spread=x.value.abs() @ weight.abs().T)]


@rule("bmm", text=f"{_PRODUCT}, per head.")
def bmm(a: Arguments, n: str) -> list[Expectation]:
    x, w = a["x"].to(torch.float64).transpose(0, 1), a["weight"].to(torch.float64)
    spread = torch.bmm(x.abs(), w.abs()).transpose(0, 1)
    g = growth(n, w.shape[1], a["x"].dtype)
    made = Approx(torch.bmm(x, w).transpose(0, 1), g * spread, a["x"].dtype)
    return [real("y", 0, made, a["x"].dtype, n, spread=spread)]


@rule("block_scaled_mm", text=f"{_PRODUCT}, of the dequantised operands; scales may cost four more roundings.")
def block_scaled_mm(a: Arguments, n: str) -> list[Expectation]:
    out = torch_dtype(a["out_dtype"])
    scale = a["a_scale"].to(torch.float64).repeat_interleave(128, dim=-1)[:, : a["a"].shape[1]]
    x = decode(a["a"], torch.float64) * scale
    w = dequantize_block(a["b"], a["b_scale"], torch.float64)
    work = torch.float64 if out == torch.float64 else torch.float32
    made = Approx(x, torch.zeros_like(x), work).product(w, n, extra=4.0)
    return against_decomposition(
        "block_scaled_mm", a, [real("y", 0, made, out, n, spread=x.abs() @ w.abs().T)], n, always=False
    )


@rule("int8_scaled_mm", text="u |y| + 4 x 2^-24 |y|: the sum is exact in int32, the two scales round.")
def int8_scaled_mm(a: Arguments, n: str) -> list[Expectation]:
    out = torch_dtype(a["out_dtype"])
    x = a["a"].to(torch.float64) * a["a_scale"].to(torch.float64)
    w = a["b"].to(torch.float64) * a["b_scale"].to(torch.float64)
    exact = (a["a"].to(torch.float64) @ a["b"].to(torch.float64).T) * a["a_scale"].to(torch.float64)
    exact = exact * a["b_scale"].to(torch.float64).T
    unit = 2.0**-53 if out == torch.float64 else 2.0**-24
    made = Approx(exact, 4 * unit * exact.abs(), out)
    return [real("y", 0, made, out, n, spread=x.abs() @ w.abs().T)]


def through(x: Tensor, w: Prepared, n: str) -> tuple[Approx, Tensor]:
    """quant_linear of an input, and the sum of magnitudes."""
    made = Approx.of(x).through(w, n)
    return made, x.to(torch.float64).abs() @ dequantize(w, torch.float64).abs().T


@rule(
    "quant_linear",
    text=f"{_PRODUCT}, of the operands as the scheme quantises them (a code of an activation may be the neighbour where x / "
    "scale is within 2^-22 of a tie; int8 sums are exact); where the decomposition itself rounds more (w8a16 in bf16), 4 "
    "times what it errs.",
)
def quant_linear(a: Arguments, n: str) -> list[Expectation]:
    made, spread = through(a["x"], a["w"], n)
    expected: list[Expectation] = [real("y", 0, made, a["x"].dtype, n, spread=spread)]
    return against_decomposition("quant_linear", a, expected, n, always=False)


@rule("grouped_linear", text="that of quant_linear, per expert; rows past offsets[E] are exactly zero.")
def grouped_linear(a: Arguments, n: str) -> list[Expectation]:
    x, w, bounds = a["x"], a["w"], a["offsets"].tolist()
    shape = (x.shape[0], w.shape[1])
    value, radius, spread = (torch.zeros(shape, dtype=torch.float64) for _ in range(3))
    for e in range(w.shape[0]):
        rows = slice(bounds[e], bounds[e + 1])
        if rows.stop > rows.start:
            made, spread[rows] = through(x[rows], expert_weight(w, e), n)
            value[rows], radius[rows] = made.value, made.radius
    expected = real("y", 0, Approx(value, radius, x.dtype), x.dtype, n, spread=spread)
    expected.tolerance[bounds[-1] :] = 0
    return against_decomposition("grouped_linear", a, [expected], n, always=False)
