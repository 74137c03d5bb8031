"""What a calibration does with the weights and inputs that the sweep shows it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Feed:
    """Linears that share an input, and what makes its channels.

    inputs: [T, K]. consumers: names of the linears [N, K]. producers: name -> channel of the input that each of its rows makes,
    [rows] (-1: none), or None for a norm's weight, which has a number per channel. exact: names of consumers that are not
    quantised.
    """

    inputs: Tensor
    consumers: Sequence[str]
    producers: Mapping[str, Tensor | None]
    exact: Sequence[str] = ()


class Visitor:
    """Does nothing: the sweep then is the model."""

    def feed(self, feed: Feed) -> None:
        """Inputs and the linears they go into, before any of them is rounded."""

    def round(self, weights: Mapping[str, Tensor], inputs: Tensor, counts: Tensor | None = None) -> Mapping[str, Tensor]:
        """The linears [N, K], which share inputs [T, K], as they are to be used from here on. counts [T]: how much each row of
        the inputs weighs; None: all the same."""
        return weights


def identity(n: int) -> Tensor:
    """Row i makes channel i."""
    return torch.arange(n)
