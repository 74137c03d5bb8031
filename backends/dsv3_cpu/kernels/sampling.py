"""Sampling: the largest logit, or the largest with noise of a counter-based generator."""

from __future__ import annotations

import numpy as np

from dsv3_cpu.compile import inner, strict, without_nan
from dsv3_cpu.constants import CHUNK
from dsv3_cpu.kernels.atoms import wait_for_all
from dsv3_cpu.kernels.numbers import bits_of, widen

_LOW = np.uint64(0xFFFFFFFF)
_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_W0, _W1 = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)
_32 = np.uint64(32)


@strict
def philox(token, position, seed):
    """Word 0 of Philox4x32-10: counter (token, position, 0, 0), key (seed low, seed high). Source: Salmon et al. 2011."""
    c0, c1, c2, c3 = token & _LOW, position & _LOW, np.uint64(0), np.uint64(0)
    k0, k1 = seed & _LOW, (seed >> _32) & _LOW
    for _ in range(10):
        p0, p1 = _M0 * c0, _M1 * c2
        c0, c1, c2, c3 = (p1 >> _32) ^ c1 ^ k0, p1 & _LOW, (p0 >> _32) ^ c3 ^ k1, p0 & _LOW
        k0, k1 = (k0 + _W0) & _LOW, (k1 + _W1) & _LOW
    return c0


@strict
def score(logit, token, position, seed, temperature):
    """logit / temperature - log(-log u) in float64."""
    word = philox(np.uint64(token), np.uint64(position), np.uint64(seed))
    u = (np.float64(word) + 0.5) * 2.0**-32
    return np.float64(logit) / temperature - np.log(-np.log(u))


@inner
def largest(logits, row, first, last):
    """The largest of some logits, and the first place of it; NaN if one of them is, and its place."""
    peak = np.uint32(0)
    for token in range(first, last):
        peak = max(peak, bits_of(widen(logits[row, token])) & np.uint32(0x7FFFFFFF))
    if peak > np.uint32(0x7F800000):
        for token in range(first, last):
            if bits_of(widen(logits[row, token])) & np.uint32(0x7FFFFFFF) > np.uint32(0x7F800000):
                return np.nan, token
    most = most_of(logits, row, first, last)
    for token in range(first, last):
        if widen(logits[row, token]) == most:
            return np.float64(most), token
    return np.float64(most), first


@without_nan
def most_of(logits, row, first, last):
    """The largest of logits that are numbers: in any order, which is what makes it vector instructions."""
    most = np.float32(-np.inf)
    for token in range(first, last):
        value = widen(logits[row, token])
        most = value if value > most else most
    return most


@inner
def noisy(logits, row, first, last, position, seed, temperature):
    """The largest score of some logits, and its place, the first of equals; NaN if one of them is."""
    best, place = -np.inf, -1
    for token in range(first, last):
        value = score(widen(logits[row, token]), token, position, seed, temperature)
        if value > best or place < 0 or value != value:
            best, place = value, token
            if value != value:
                break
    return best, place


def sample(team, me, crew, logits, seeds, positions, temperatures, values, places, ids):
    """ids [S] of the largest scores, the lowest of equals; the last where a score is NaN.

    values and places [S, chunks] are scratch.
    """
    vocabulary, chunks = logits.shape[1], values.shape[1]
    for p in range(me, logits.shape[0] * chunks, crew):
        row, c = p // chunks, p % chunks
        first, last, temperature = c * CHUNK, min(vocabulary, (c + 1) * CHUNK), np.float64(widen(temperatures[row]))
        if temperature > 0:
            best, place = noisy(logits, row, first, last, positions[row], seeds[row], temperature)
        else:
            best, place = largest(logits, row, first, last)
        values[row, c], places[row, c] = best, place
    wait_for_all(team, crew)
    for row in range(me, logits.shape[0], crew):
        best, place = values[row, 0], places[row, 0]
        for c in range(chunks):
            value = values[row, c]
            if value != value:
                place = vocabulary - 1
                break
            if value > best:
                best, place = value, places[row, c]
        ids[row] = place
