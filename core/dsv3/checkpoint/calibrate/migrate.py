"""Outlier channels of activations, moved into the weights.

A channel is divided by a power of two where it is made, in a norm or in the rows of the weight before; the columns that meet it
are multiplied by it. The model stays the same, exactly, also in bf16; the INT8 codes of its activations get finer.

Source: Xiao et al. 2022, "SmoothQuant", equation 4, with powers of two, and the exponent chosen per input by trying.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dsv3.checkpoint.calibrate.visitor import Feed, Visitor
from dsv3.quant.int8 import dequantize_channel, quantize_channel

# How much of a channel's range goes to the weights; 0 leaves all as it is.
_STRENGTHS = (0.0, 0.25, 0.35, 0.5, 0.65, 0.8)
_ROWS = 512  # of the inputs that a choice is tried on
_TRIED = 6  # linears that it is tried on: the first of many experts stand for all
_LARGEST = 20  # exponent


@dataclass
class Shift:
    """Exponents of two for a tensor: rows i8 [N] are subtracted (a norm's weight has rows only), columns i8 [K] are added."""

    rows: Tensor | None = None
    columns: Tensor | None = None

    def applied(self, weight: Tensor, start: int = 0) -> Tensor:
        """Rows of a weight [n, K] from `start` on, or a norm's weight [K], in place."""
        if self.rows is not None:
            exponents = -self.rows[start : start + weight.shape[0]].to(torch.int32)
            weight = _scaled(weight, exponents if weight.dim() == 1 else exponents[:, None])
        if self.columns is not None:
            weight = _scaled(weight, self.columns.to(torch.int32))
        return weight


def _scaled(weight: Tensor, exponents: Tensor) -> Tensor:
    return weight.mul_(_powers(exponents))


def _powers(exponents: Tensor) -> Tensor:
    """2^exponents in float32, exactly, which exp2 does not promise."""
    return torch.ldexp(torch.ones(exponents.shape), exponents.to(torch.int32))


class Migrate(Visitor):
    """Chooses; `shifts` is what it chose, by tensor."""

    def __init__(self, real: Callable[[str], Tensor]) -> None:
        self._real = real
        self.shifts: dict[str, Shift] = {}

    def feed(self, feed: Feed) -> None:
        channels = range_of(feed.inputs)
        columns = torch.zeros_like(channels)
        for name in feed.consumers:
            columns = torch.maximum(columns, self._real(name).abs().amax(dim=0))
        some = feed.inputs[:: max(1, feed.inputs.shape[0] // _ROWS)][:_ROWS]
        tried = [self._real(name) for name in feed.consumers[:_TRIED]]
        costs = {s: _cost(some, tried, exponents(channels, columns, s)) for s in _STRENGTHS}
        best = min(costs, key=lambda strength: costs[strength])
        chosen = exponents(channels, columns, best)
        if not bool(chosen.any()):
            return
        for name, rows in feed.producers.items():
            self._shift(name).rows = chosen if rows is None else torch.where(rows < 0, 0, chosen[rows]).to(torch.int8)
        for name in (*feed.consumers, *feed.exact):
            self._shift(name).columns = chosen

    def _shift(self, name: str) -> Shift:
        return self.shifts.setdefault(name, Shift())


def range_of(inputs: Tensor) -> Tensor:
    """The largest magnitude of each channel [K]."""
    return inputs.abs().amax(dim=0) if len(inputs) else torch.zeros(inputs.shape[1])


def exponents(channels: Tensor, columns: Tensor, strength: float) -> Tensor:
    """log2 of channels^strength / columns^(1 - strength), about its median, as i8 [K]; 0 where a channel or column is empty."""
    none = torch.zeros(channels.shape, dtype=torch.int8)
    used = (channels > 0) & (columns > 0)
    if strength == 0 or not bool(used.any()):
        return none
    wanted = strength * channels[used].log2() - (1 - strength) * columns[used].log2()
    wanted = torch.round(wanted - wanted.median()).clamp_(-_LARGEST, _LARGEST)
    return none.masked_scatter_(used, wanted.to(torch.int8))


def _cost(inputs: Tensor, weights: list[Tensor], exponent: Tensor) -> float:
    """Squared error of INT8 products with shifted operands, relative to that of the products themselves."""
    factor = _powers(exponent)
    x = _rounded(inputs / factor)
    total = 0.0
    for weight in weights:
        exact = inputs @ weight.T
        total += float((x @ _rounded(weight * factor).T - exact).square().sum() / exact.square().sum().clamp_min(1e-30))
    return total


def _rounded(x: Tensor) -> Tensor:
    """To INT8 per row, and back."""
    return dequantize_channel(*quantize_channel(x), torch.float32)
