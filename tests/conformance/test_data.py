"""The data can be made again by anybody: here in plain Python integers, from the description in the module's docstring."""

from __future__ import annotations

import struct

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsv3.conformance.data import DISTRIBUTIONS, Data, fnv1a, words

MASK = (1 << 64) - 1


def mix(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def word(seed: int, stream: str, i: int) -> int:
    h = 0xCBF29CE484222325
    for byte in stream.encode():
        h = ((h ^ byte) * 0x100000001B3) & MASK
    return mix((mix((seed & MASK) ^ mix(h)) + (i + 1) * 0x9E3779B97F4A7C15) & MASK)


@given(st.integers(-(2**63), 2**64 - 1), st.text(max_size=12), st.integers(1, 40))
def test_words_are_those_of_the_description(seed: int, stream: str, count: int) -> None:
    assert words(seed, stream, count).tolist() == [word(seed, stream, i) for i in range(count)]


def test_the_first_words_never_change() -> None:
    assert fnv1a("") == 0xCBF29CE484222325 and fnv1a("a") == 0xAF63DC4C8601EC8C
    assert [hex(w) for w in words(0, "x", 2).tolist()] == [hex(word(0, "x", 0)), hex(word(0, "x", 1))]


def test_normal_numbers_are_exact_float32_arithmetic() -> None:
    data = Data("some/case/f32", 3)
    found = data.normal("x", 50)
    factor = struct.unpack("<f", struct.pack("<f", 2.6429e-5))[0]
    for i, x in enumerate(found.tolist()):
        w = word(data.seed, "x", i)
        total = sum((w >> s) & 0xFFFF for s in (0, 16, 32, 48)) - 131070
        assert x == float(np.float32(total) * np.float32(factor))


def test_normal_numbers_are_nearly_normal() -> None:
    x = Data("n").normal("x", 200_000).double()
    assert abs(float(x.mean())) < 0.01 and abs(float(x.var()) - 1) < 0.02
    assert float((x.abs() < 1).double().mean()) == pytest.approx(0.68, abs=0.02)


@given(st.integers(-100, 100), st.integers(1, 1000))
def test_integers_stay_in_their_range(low: int, span: int) -> None:
    x = Data("i").integers("x", low, low + span, 200)
    assert int(x.min()) >= low and int(x.max()) < low + span


@given(st.integers(0, 300))
def test_permutations_hold_every_number_once(n: int) -> None:
    assert sorted(Data("p").permutation("x", n).tolist()) == list(range(n))


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_distributions_keep_shapes_and_depend_on_case_name_and_seed(name: str) -> None:
    one = Data("case", 0).real("x", name, 3, 40)
    assert one.shape == (3, 40) and one.dtype == torch.float32
    assert torch.equal(one.nan_to_num(), Data("case", 0).real("x", name, 3, 40).nan_to_num())
    if name != "zeros":
        for other in (Data("case", 1).real("x", name, 3, 40), Data("other", 0).real("x", name, 3, 40)):
            assert not torch.equal(one.nan_to_num(), other.nan_to_num())


def test_ties_are_halfway_between_two_fp8_numbers() -> None:
    x = Data("t").real("x", "ties", 4, 64)
    scale = x.abs().amax(-1, keepdim=True) / 448
    assert torch.equal(torch.frexp(scale)[0], torch.full_like(scale, 0.5))
    y = (x / scale).double().flatten()
    codes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    middles = (codes[1:] + codes[:-1]) / 2
    inner = y.abs()[(y.abs() < 448) & (y.abs() > 2**-6)]
    assert torch.isin(inner, middles).double().mean() > 0.9
