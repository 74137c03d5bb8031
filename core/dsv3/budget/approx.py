"""A float64 value with a bound on the error that float32 arithmetic of a class may make on the way to it.

Intermediate rounding to 16 bits is not in the bound: worst cases add up far above what happens. It is in `noise`, which
adds up as independent errors do, in squares; a composite in 16 bits is held to `SIGMAS` times that, or to a multiple of what
its decomposition errs (`rules.against_decomposition`), whichever is larger: it may round what is between two steps, or not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dsv3.budget.units import activation_ulp, growth, work_ulp
from dsv3.ops.quantize import FP8_MAX
from dsv3.plugin import Prepared
from dsv3.quant import SCHEMES, dequantize
from dsv3.quant.fp8 import BLOCK

_TIE = 2.0**-22  # x / scale and x * (1 / scale) differ by less
SIGMAS = 4.0  # how many times its noise a value may be off


@dataclass
class Approx:
    """value and radius, float64, of one shape. dtype: of the activations it stands for. noise: size of the independent errors
    that 16-bit intermediates, and codes that fall to their neighbour, may add; None: none."""

    value: Tensor
    radius: Tensor
    dtype: torch.dtype
    noise: Tensor | None = None

    @staticmethod
    def of(x: Tensor) -> Approx:
        """An input, exact."""
        value = x.to(torch.float64)
        return Approx(value, torch.zeros_like(value), x.dtype)

    @property
    def w(self) -> float:
        return work_ulp(self.dtype)

    @property
    def loose(self) -> Tensor:
        """The noise, or zeros."""
        return torch.zeros_like(self.value) if self.noise is None else self.noise

    def take(self, choose: Callable[[Tensor], Tensor]) -> Approx:
        """Part of it, or another shape: what `choose` makes of a tensor of its shape."""
        return Approx(choose(self.value), choose(self.radius), self.dtype, None if self.noise is None else choose(self.noise))

    def rows(self, index: slice | Tensor) -> Approx:
        return self.take(lambda t: t[index])

    def stored(self) -> Approx:
        """Kept between two steps: rounded to its dtype or not, either is right."""
        u = activation_ulp(self.dtype)
        noise = self.noise if u == 0 else torch.hypot(self.loose, u * self.value.abs())
        return Approx(self.value, self.radius, self.dtype, noise)

    def settled(self) -> Approx:
        """The noise as part of the radius."""
        return Approx(self.value, self.radius + SIGMAS * self.loose, self.dtype)

    def product(self, weight: Tensor, numerics: str, extra: float = 0.0) -> Approx:
        """x [.., T, K] @ weight [.., N, K]^T. extra: further relative roundings, such as of scales."""
        w = weight.to(torch.float64).transpose(-1, -2)
        size = w.abs()
        g = growth(numerics, w.shape[-2], self.dtype) + extra * self.w
        radius = (self.radius + g * (self.value.abs() + self.radius)) @ size
        noise = None if self.noise is None else (self.noise.square() @ size.square()).sqrt()
        return Approx(self.value @ w, radius, self.dtype, noise)

    def norm(self, weight: Tensor, eps: float) -> Approx:
        """rms_norm."""
        x, width = self.value, max(self.value.shape[-1], 1)
        mean = x.square().mean(dim=-1, keepdim=True) + eps
        scale = weight.to(torch.float64) * mean.rsqrt()
        y = x * scale
        own = (8 + width**0.5) * self.w * y.abs()
        drift = (x.abs() * self.radius).mean(dim=-1, keepdim=True) / mean
        noise = None if self.noise is None else scale.abs() * self.noise
        return Approx(y, own + scale.abs() * self.radius + y.abs() * drift, self.dtype, noise)

    def silu_mul(self) -> Approx:
        """silu(gate) * up of [gate | up]. exp may be exp2 of a rounded product: relative error |gate| w. In 16 bits it may also
        be gate / 2 * (1 + tanh(gate / 2)), whose sum cancels for negative gates: 2 w of |gate up|."""
        gate, up = self.value.chunk(2, dim=-1)
        rg, ru = self.radius.chunk(2, dim=-1)
        act = torch.nn.functional.silu(gate)
        y = act * up
        cancelled = 2 * self.w if activation_ulp(self.dtype) else 0.0
        own = (8 + 2 * gate.abs()) * self.w * y.abs() + (2.0**-125 + cancelled) * (gate * up).abs()
        noise = None
        if self.noise is not None:
            ng, nu = self.noise.chunk(2, dim=-1)
            noise = torch.hypot(1.1 * up.abs() * ng, act.abs() * nu)
        return Approx(y, own + 1.1 * up.abs() * rg + act.abs() * ru + rg * ru, self.dtype, noise)

    def rope(self, cos: Tensor, sin: Tensor, interleaved: bool) -> Approx:
        """x [T, N, P], cos and sin f64 [T, 1, P/2]."""

        def turn(v: Tensor, plus: bool) -> Tensor:
            a, b = (v[..., 0::2], v[..., 1::2]) if interleaved else v.chunk(2, dim=-1)
            c, s = (cos.abs(), sin.abs()) if plus else (cos, sin)
            out = (a * c + b * s, a * s + b * c) if plus else (a * c - b * s, a * s + b * c)
            return torch.stack(out, dim=-1).flatten(-2) if interleaved else torch.cat(out, dim=-1)

        terms = turn(self.value.abs(), True)
        noise = None if self.noise is None else turn(self.noise, True)
        return Approx(turn(self.value, False), 8 * self.w * terms + turn(self.radius, True), self.dtype, noise)

    def through(self, w: Prepared, numerics: str) -> Approx:
        """quant_linear: the product with a canonical weight, activations rounded as its scheme says."""
        scheme = SCHEMES[w.quant]
        x = self
        if scheme.activations == "fp8":
            encoding = str(w.tensors["weight"].dtype).removeprefix("torch.")
            x = self.fp8(BLOCK, encoding, w.scale_fmt, 1e-4)
        elif scheme.activations == "int8":
            x = self.int8(1e-10)
        real = dequantize(w, torch.float64)
        if scheme.activations == "int8":  # the sum is exact; what rounds is the product with two scales
            exact = x.value @ real.T
            noise = (x.loose.square() @ real.T.square()).sqrt()
            return Approx(exact, 4 * x.w * exact.abs() + x.radius @ real.abs().T, self.dtype, noise)
        made = x.product(real, numerics, 0.0 if w.quant == "none" else 6.0)
        if w.quant != "none" and scheme.activations == "none":  # the weight may be rounded to the dtype of x
            rounding = activation_ulp(self.dtype) * (x.value.square() @ real.T.square()).sqrt()
            made.noise = torch.hypot(made.loose, rounding)
        return made

    def fp8(self, group: int, encoding: str, scale_fmt: str, floor: float) -> Approx:
        """act_quant and back. The radius covers codes that fall to the neighbour where x / scale is nearly a tie."""
        from dsv3.ops import act_quant
        from dsv3.quant.fp8 import decode

        q, s = act_quant(self.value.to(torch.float32), group, encoding, scale_fmt, floor)
        scale = s.to(torch.float64).repeat_interleave(group, dim=-1)[:, : q.shape[1]]
        y = self.value / scale
        step = fp8_step(y, encoding)
        return self._coded(decode(q, torch.float64), scale, step, y.abs() > FP8_MAX[encoding], scale_fmt == "ue8m0")

    def int8(self, floor: float) -> Approx:
        """quant_int8 and back."""
        from dsv3.ops import quant_int8

        q, s = quant_int8(self.value.to(torch.float32), floor)
        codes = q.to(torch.float64)
        scale = s.to(torch.float64).expand(codes.shape)
        return self._coded(codes, scale, torch.ones_like(codes), torch.zeros_like(codes, dtype=torch.bool), False)

    def _coded(self, codes: Tensor, scale: Tensor, step: Tensor, saturated: Tensor, fixed: bool) -> Approx:
        """codes * scale. fixed: the scale takes no part in the noise of its group."""
        y, radius, noise = self.value / scale, self.radius / scale, self.loose / scale
        mantissa, _ = torch.frexp(scale)
        unsure = torch.where(mantissa == 0.5, torch.zeros_like(y), _TIE * y.abs())  # exact by a power of two
        slack = _neighbour(y, step, radius, unsure)
        slack = torch.where(saturated, radius, slack)
        flips = slack
        if self.noise is not None:
            drift = 0.0 if fixed else activation_ulp(self.dtype)  # amax was rounded too
            flips = _neighbour(y, step, radius + noise + drift * y.abs(), unsure) + drift * codes.abs()
        # A scale may be off by an ulp; a power of two may not, but may be the other one where amax is at its edge.
        return Approx(codes * scale, (slack + 2.0**-22 * codes.abs()) * scale, self.dtype, flips * scale)


def fp8_step(y: Tensor, encoding: str) -> Tensor:
    """Distance of neighbouring FP8 numbers at |y|, float64."""
    bits, lowest = {"float8_e4m3fn": (3, -6), "float8_e4m3fnuz": (3, -7), "float8_e5m2": (2, -14)}[encoding]
    _, exponent = torch.frexp(y.abs())
    power = (exponent - 1).clamp_min(lowest).to(torch.float64)
    return torch.where(y == 0, torch.full_like(power, 2.0 ** (lowest - bits)), torch.exp2(power - bits))


def _neighbour(y: Tensor, step: Tensor, radius: Tensor, unsure: Tensor) -> Tensor:
    """`step` where y is so close to a tie that a rounding of the division, or y's own error, decides; else 0."""
    part = y.abs() / step
    distance = (part - part.floor() - 0.5).abs() * step
    window = unsure + radius
    return torch.where((distance <= window) & (window > 0), step + radius, torch.zeros_like(y))
