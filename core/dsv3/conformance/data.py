"""Test data that any language can make again: a counter, a mixing function, and exact arithmetic.

word(seed, stream, i) = mix(mix(seed ^ mix(stream)) + (i + 1) * 0x9E3779B97F4A7C15), all modulo 2^64, with mix the finaliser of
SplitMix64 (Steele, Lea and Flood 2014). `stream` is the FNV-1a hash of an argument's name, `seed` that of the case's id
exclusive-or the run's seed. A normal number is the sum of the word's four 16-bit fields minus 131070, times the float32
2.6429e-5: near normal with variance 1, and the same bits everywhere.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_NORMAL = np.float32(2.6429e-5)
Words = npt.NDArray[np.uint64]


def _mix(z: Words) -> Words:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def fnv1a(text: str) -> int:
    """The 64-bit FNV-1a hash of a text in UTF-8."""
    value = 0xCBF29CE484222325
    for byte in text.encode():
        value = ((value ^ byte) * 0x100000001B3) & 0xFFFFFFFFFFFFFFFF
    return value


def words(seed: int, stream: str, count: int) -> Words:
    """`count` words of a stream."""
    with np.errstate(over="ignore"):
        key = _mix(np.array([seed & 0xFFFFFFFFFFFFFFFF], np.uint64) ^ _mix(np.array([fnv1a(stream)], np.uint64)))
        return _mix(key + np.arange(1, count + 1, dtype=np.uint64) * _GOLDEN)


class Data:
    """The data of one case. Every method draws from the stream of its name; the same name gives the same data."""

    def __init__(self, case: str, seed: int = 0) -> None:
        self.seed = fnv1a(case) ^ (seed & 0xFFFFFFFFFFFFFFFF)

    def words(self, name: str, count: int) -> Words:
        return words(self.seed, name, count)

    def normal(self, name: str, *shape: int) -> Tensor:
        """Nearly normal float32, mean 0, variance 1."""
        w = self.words(name, int(np.prod(shape, dtype=np.int64)))
        total = np.zeros(w.shape, np.int64)
        for shift in (0, 16, 32, 48):
            total += ((w >> np.uint64(shift)) & np.uint64(0xFFFF)).astype(np.int64)
        return torch.from_numpy(((total - 131070).astype(np.float32) * _NORMAL).reshape(shape))

    def uniform(self, name: str, *shape: int) -> Tensor:
        """float32 in [0, 1), multiples of 2^-24."""
        w = self.words(name, int(np.prod(shape, dtype=np.int64)))
        return torch.from_numpy(((w >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)).reshape(shape))

    def integers(self, name: str, low: int, high: int, *shape: int) -> Tensor:
        """int64 in [low, high)."""
        w = self.words(name, int(np.prod(shape, dtype=np.int64))) >> np.uint64(32)
        scaled = (w * np.uint64(high - low)) >> np.uint64(32)
        return torch.from_numpy(scaled.astype(np.int64).reshape(shape) + low)

    def permutation(self, name: str, n: int) -> Tensor:
        """A permutation of n, int64: the order of n words."""
        return torch.from_numpy(np.argsort(self.words(name, n), kind="stable").astype(np.int64))

    # -- distributions that find faults

    def real(self, name: str, distribution: str, *shape: int) -> Tensor:
        """float32 of one of DISTRIBUTIONS; the last axis is the channel."""
        return DISTRIBUTIONS[distribution](self, name, *shape)


def _outliers(d: Data, name: str, *shape: int) -> Tensor:
    """Eight channels a hundred times larger, as activations of language models have them; the last channel is one of them."""
    x = d.normal(name, *shape)
    width = shape[-1]
    for j in range(min(8, width)):
        x[..., width - 1 - j * (width // min(8, width))] *= 100
    return x


def _one_hot(d: Data, name: str, *shape: int) -> Tensor:
    """One channel per row, of value 1, -2 or 0.5: a product is then one product, and exact."""
    x = torch.zeros(shape).view(-1, shape[-1])
    rows = x.shape[0]
    x[torch.arange(rows), d.integers(f"{name}.at", 0, max(shape[-1], 1), rows)] = torch.tensor([1.0, -2.0, 0.5])[
        d.integers(f"{name}.of", 0, 3, rows)
    ]
    return x.view(shape)


def _cancelling(d: Data, name: str, *shape: int) -> Tensor:
    """Neighbours of opposite sign and nearly equal size; on the weights' side ("w..") neighbours are equal."""
    x = d.normal(name, *shape)
    pairs = shape[-1] // 2 * 2
    if name.startswith("w"):
        x[..., 1:pairs:2] = x[..., 0:pairs:2]
    else:
        x[..., 1:pairs:2] = -x[..., 0:pairs:2] * (1 + 2.0**-7)
    return x


def _nan_row(d: Data, name: str, *shape: int) -> Tensor:
    """The first row is NaN; the others must not notice."""
    x = d.normal(name, *shape)
    x[:1] = float("nan")
    return x


def _ties(d: Data, name: str, *shape: int) -> Tensor:
    """Every 16th number 448 * 2^n, so that scales are powers of two; the rest halfway between two FP8 numbers."""
    codes = d.integers(name, 0, 8 * 15, *shape)
    exponent, mantissa = codes // 8, codes % 8
    x = (1 + (mantissa.float() + 0.5) / 8) * torch.exp2(exponent.float() - 7)
    x = torch.where(x > 440, torch.full_like(x, 416.0), x)
    x = torch.where(d.integers(f"{name}.sign", 0, 2, *shape) > 0, x, -x)
    x[..., ::16] = 448.0
    return x * torch.exp2(d.integers(f"{name}.row", -2, 3, *shape[:-1], 1).float()) if shape[-1] else x


DISTRIBUTIONS = {
    "normal": lambda d, name, *shape: d.normal(name, *shape),
    "positive": lambda d, name, *shape: d.uniform(name, *shape) + 0.5,
    "outliers": _outliers,
    "zeros": lambda d, name, *shape: torch.zeros(shape),
    "onehot": _one_hot,
    "cancelling": _cancelling,
    "integers": lambda d, name, *shape: d.integers(name, -4, 5, *shape).float(),
    "small": lambda d, name, *shape: d.normal(name, *shape) * 2.0**-60,
    "large": lambda d, name, *shape: d.normal(name, *shape) * 3e4,
    "nanrow": _nan_row,
    "ties": _ties,
}
