"""Budgets of norms, activations, rotation, quantisation, embedding and sampling."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dsv3.budget.approx import Approx
from dsv3.budget.expectation import Exact, Expectation, Finding
from dsv3.budget.linear import sizes
from dsv3.budget.quantised import Quantised
from dsv3.budget.routing import Sampled
from dsv3.budget.rules import Arguments, against_decomposition, real, rule
from dsv3.budget.units import activation_ulp
from dsv3.ops import fn_to_fnuz
from dsv3.ops.quantize import torch_dtype
from dsv3.ops.sampling import philox
from dsv3.quant.fp8 import dequantize_block


@rule("rms_norm", text="u |y| + (8 + sqrt(D)) 2^-24 |y|.")
def rms_norm(a: Arguments, n: str) -> list[Expectation]:
    return [real("y", 0, Approx.of(a["x"]).norm(a["weight"], a["eps"]), a["x"].dtype, n)]


@dataclass
class _NormOfResidual(Expectation):
    """y of add_rms_norm, from the residual that was returned: that one is specified to be rounded first."""

    arguments: Arguments
    numerics: str
    name: str = "y"

    def __post_init__(self) -> None:
        total = (self.arguments["x"].to(torch.float64) + self.arguments["residual"].to(torch.float64)).to(
            self.arguments["x"].dtype
        )
        made = self._expected(total)
        self.reference, self.tolerance = made.reference, made.tolerance

    def _expected(self, residual: Tensor) -> Any:
        made = Approx.of(residual).norm(self.arguments["weight"], self.arguments["eps"])
        return real("y", 0, made, self.arguments["x"].dtype, self.numerics)

    def check(self, outputs: Sequence[Any]) -> Finding:
        found: Finding = self._expected(outputs[1]).check(outputs)
        return found


@rule("add_rms_norm", text="residual' is x + residual rounded once; y that of rms_norm, from the rounded residual'.")
def add_rms_norm(a: Arguments, n: str) -> list[Expectation]:
    x, residual = Approx.of(a["x"]), a["residual"].to(torch.float64)
    total = Approx(x.value + residual, 0.01 * x.w * (x.value + residual).abs(), x.dtype)
    return [real("residual'", 1, total, a["x"].dtype, n), _NormOfResidual(a, n)]


@rule(
    "silu_mul",
    text="u |y| + (8 + 2 |gate|) 2^-24 |y|: exp may be exp2 of a rounded product; in 16 bits + 2^-23 |gate up|: or tanh.",
)
def silu_mul(a: Arguments, n: str) -> list[Expectation]:
    return [real("y", 0, Approx.of(a["x"]).silu_mul(), a["x"].dtype, n)]


@rule("apply_rope", text="u |y| + 8 x 2^-24 (|a cos| + |b sin|).")
def apply_rope(a: Arguments, n: str) -> list[Expectation]:
    return [real("y", 0, rotated(a["x"], a["positions"], a["cos_sin"], a["interleaved"]), a["x"].dtype, n)]


def rotated(x: Tensor, positions: Tensor, cos_sin: Tensor, interleaved: bool) -> Approx:
    """apply_rope of an input [T, N, P]."""
    return rotate(Approx.of(x), positions, cos_sin, interleaved)


def rotate(x: Approx, positions: Tensor, cos_sin: Tensor, interleaved: bool) -> Approx:
    table = cos_sin.index_select(0, positions.to(torch.int64)).to(torch.float64).unsqueeze(1)
    cos, sin = table.chunk(2, dim=-1)
    return x.rope(cos, sin, interleaved)


_QUANT = (
    "the scale within 2^-22 of its formula (ue8m0: exactly that power of two), codes as x divided by the returned scale "
    "rounds; the neighbour is legal within 2^-22 of a tie unless the scale is a power of two"
)


@rule("act_quant", text=f"{_QUANT}; a NaN stays one.")
def act_quant(a: Arguments, n: str) -> list[Expectation]:
    x = Approx.of(a["x"].to(torch.float32))
    return [Quantised("q", 0, x, a["group"], a["dtype"], a["scale_fmt"], a["amax_floor"])]


@rule("quant_int8", text=f"{_QUANT}; never -128.")
def quant_int8(a: Arguments, n: str) -> list[Expectation]:
    return [Quantised("q", 0, Approx.of(a["x"].to(torch.float32)), 0, "int8", floor=a["amax_floor"])]


@rule("rms_norm_quant", text=f"{_QUANT}, where x is the norm within the budget of rms_norm and one rounding to 16 bits.")
def rms_norm_quant(a: Arguments, n: str) -> list[Expectation]:
    made = Approx.of(a["x"]).norm(a["weight"], a["eps"])
    return [Quantised("q", 0, made, a["group"], a["dtype"], a["scale_fmt"], rounding=activation_ulp(a["x"].dtype))]


@rule("silu_mul_quant", text=f"{_QUANT}, where x is silu_mul within its budget and one rounding to 16 bits.")
def silu_mul_quant(a: Arguments, n: str) -> list[Expectation]:
    made = Approx.of(a["x"]).silu_mul()
    return [Quantised("q", 0, made, a["group"], a["dtype"], a["scale_fmt"], rounding=activation_ulp(a["x"].dtype))]


@rule("dequant_block", text="u |y| + 2 x 2^-24 |y|.")
def dequant_block(a: Arguments, n: str) -> list[Expectation]:
    out = torch_dtype(a["dtype"])
    value = dequantize_block(a["weight"], a["scale"], torch.float64)
    unit = 2.0**-53 if out == torch.float64 else 2.0**-24
    return [real("y", 0, Approx(value, 2 * unit * value.abs(), out), out, n)]


@rule("fn_to_fnuz", text="exact, bit for bit.")
def fn_to_fnuz_(a: Arguments, n: str) -> list[Expectation]:
    weight, scale = fn_to_fnuz(a["weight"], a["scale"])
    return [Exact("weight'", 0, weight, bits=True), Exact("scale'", 1, scale)]


@rule("embedding", text="exact.")
def embedding(a: Arguments, n: str) -> list[Expectation]:
    return [Exact("y", 0, a["table"].index_select(0, a["ids"].to(torch.int64)))]


@rule("all_reduce", text="exact where the group is None or has one rank.")
def all_reduce(a: Arguments, n: str) -> list[Expectation]:
    return [Exact("y", 0, a["x"])]


@rule(
    "gumbel_argmax",
    text="temperature 0: exact, the lowest id on ties; else the largest perturbed logit, or one within 1e-6 of it.",
)
def gumbel_argmax(a: Arguments, n: str) -> list[Expectation]:
    from dsv3.ops import gumbel_argmax as reference

    logits, t = a["logits"].to(torch.float64), a["temperature"].to(torch.float64)[:, None]
    token = torch.arange(logits.shape[1])[None, :]
    word = philox(token, a["positions"][:, None], a["seeds"].to(torch.int64)[:, None])
    noise = -torch.log(-torch.log((word.to(torch.float64) + 0.5) * 2.0**-32))
    scores = torch.where(t > 0, logits / torch.where(t > 0, t, torch.ones_like(t)) + noise, logits)
    return [Sampled("ids", scores, t[:, 0] == 0, reference(**a).to(torch.int64))]


@rule("mtp_combine", text="u |y| + the errors of both norms through the product, or 4 times what the decomposition errs.")
def mtp_combine(a: Arguments, n: str) -> list[Expectation]:
    left = Approx.of(a["embedding"]).norm(a["enorm"], a["eps"]).stored()
    right = Approx.of(a["hidden"]).norm(a["hnorm"], a["eps"]).stored()
    sides = [torch.cat([getattr(left, part), getattr(right, part)], -1) for part in ("value", "radius", "loose")]
    both = Approx(sides[0], sides[1], left.dtype, sides[2])
    weight = a["eh_proj"].to(torch.float64)
    made, (spread, squares) = both.product(weight, n), sizes(both.value, weight)
    expected = real("y", 0, made.settled(), a["hidden"].dtype, n, spread=spread, squares=squares)
    return against_decomposition("mtp_combine", a, [expected], n, always=True)
