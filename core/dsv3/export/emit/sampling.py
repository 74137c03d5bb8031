"""Sampling: Philox4x32-10 in 64-bit integers, without a product or a shift that could overflow or be missing somewhere."""

from __future__ import annotations

from dsv3.export.builder import Graph, Value

_WORD = 1 << 32
_HALF = 1 << 16
_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85


def gumbel_argmax(g: Graph, logits: Value, seeds: Value, positions: Value, temperature: Value) -> Value:
    """In float64. ArgMax takes the first of equal values."""
    scores = g.work(logits).to("float64")
    t = g.unsqueeze(g.work(temperature).to("float64"), 1)
    sampled = t > 0.0
    token = g.unsqueeze(g.arange(g.size(logits, 1)), 0)
    word = _philox(g, token, g.unsqueeze(positions.to("int64"), 1), g.unsqueeze(seeds.to("int64"), 1))
    u = (word.to("float64") + 0.5) * 2.0**-32
    noise = -g.op("Log", -g.op("Log", u))
    noisy = scores / g.where(sampled, t, 1.0) + noise
    chosen = g.where(sampled, noisy, scores)
    return g.op("ArgMax", chosen, dtype="int64", axis=1, keepdims=0, select_last_index=0).to("int32")


def _philox(g: Graph, token: Value, position: Value, seed: Value) -> Value:
    """Word 0 as int64 in [0, 2^32); Mod takes the sign of the divisor, so that negative numbers wrap as in two's complement."""
    low = seed % _WORD
    k0, k1 = low, ((seed - low) / _WORD) % _WORD
    shape = (token + position + seed) * 0
    c0, c1, c2, c3 = token % _WORD + shape, position % _WORD + shape, shape, shape
    for _ in range(10):
        hi0, lo0 = _product(c0, _M0)
        hi1, lo1 = _product(c2, _M1)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + _W0) % _WORD, (k1 + _W1) % _WORD
    return c0


def _product(x: Value, constant: int) -> tuple[Value, Value]:
    """High and low 32 bits of x * constant, from the halves of x."""
    low, high = x % _HALF, x / _HALF
    small, big = low * constant, high * constant
    upper = big + small / _HALF
    return upper / _HALF, ((upper % _HALF) * _HALF) + small % _HALF
