"""Sampling: the largest logit, or the largest with noise of a counter-based generator."""

from __future__ import annotations

import numpy as np

from dsv3_cpu.compile import strict
from dsv3_cpu.constants import CHUNK
from dsv3_cpu.kernels.atoms import wait_for_all
from dsv3_cpu.kernels.numbers import widen

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
    """logit / temperature - log(-log u) in float64; the logit itself at temperature 0."""
    if not temperature > 0:
        return np.float64(logit)
    word = philox(np.uint64(token), np.uint64(position), np.uint64(seed))
    u = (np.float64(word) + 0.5) * 2.0**-32
    return np.float64(logit) / temperature - np.log(-np.log(u))


def sample(team, me, crew, logits, seeds, positions, temperatures, values, places, ids):
    """ids [S] of the largest scores, the lowest of equals; the last where a score is NaN.

    values and places [S, chunks] are scratch.
    """
    vocabulary, chunks = logits.shape[1], values.shape[1]
    for p in range(me, logits.shape[0] * chunks, crew):
        row, c = p // chunks, p % chunks
        best, place = -np.inf, -1
        for token in range(c * CHUNK, min(vocabulary, (c + 1) * CHUNK)):
            value = score(widen(logits[row, token]), token, positions[row], seeds[row], np.float64(widen(temperatures[row])))
            if value > best or place < 0 or value != value:
                best, place = value, token
                if value != value:
                    break
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
