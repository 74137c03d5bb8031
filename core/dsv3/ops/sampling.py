"""Sampling with noise that depends only on the seed, the position and the token: no generator state anywhere."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv3.ops.spec import primitive

_MASK = 0xFFFFFFFF
_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85


def _mul_hi_lo(constant: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of constant * x; int64 would overflow on the 64-bit product, so halves of 16 bits."""
    low, high = x & 0xFFFF, x >> 16
    upper = constant * high + ((constant * low) >> 16)
    return upper >> 16, (constant * x) & _MASK


def philox(token: Tensor, position: Tensor, seed: Tensor) -> Tensor:
    """Word 0 of Philox4x32-10 as int64 in [0, 2^32): counter (token, position, 0, 0), key (seed low, seed high).

    Tensors broadcast. Source: Salmon et al. 2011, Random123.
    """
    token, position, seed = torch.broadcast_tensors(token.to(torch.int64), position.to(torch.int64), seed)
    c0, c1 = token & _MASK, position & _MASK
    c2 = c3 = torch.zeros_like(c0)
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(10):
        hi0, lo0 = _mul_hi_lo(_M0, c0)
        hi1, lo1 = _mul_hi_lo(_M1, c2)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return c0


@primitive("logits[S,V] seeds[S]:int positions[S]:int temperature[S]:act -> ids[S]:i32")
def gumbel_argmax(logits: Tensor, seeds: Tensor, positions: Tensor, temperature: Tensor) -> Tensor:
    """Sample one token per row.

    logits [S, V], seeds i64 [S], positions [S], temperature [S] -> ids i32 [S]. Temperature 0: argmax, the lowest id
    on ties. Else argmax(logits / temperature - log(-log u)), a draw from softmax(logits / temperature), with u = (w +
    0.5) * 2^-32 in float64 and w the `philox` word of (seed, position, token id). Source: Gumbel 1954; Maddison et
    al. 2014.

    Invariants:
    - the same seed, position and logits give the same id, in any batch
    - adding one number to a row of logits changes nothing but for rounding
    """
    rows, vocab = logits.shape
    scores = logits.to(torch.float64)
    t = temperature.to(torch.float64)[:, None]
    if rows == 0:
        return torch.empty(0, dtype=torch.int32, device=logits.device)
    token = torch.arange(vocab, device=logits.device)[None, :]
    word = philox(token, positions[:, None], seeds.to(torch.int64)[:, None])
    u = (word.to(torch.float64) + 0.5) * 2.0**-32
    noisy = scores / torch.where(t > 0, t, torch.ones_like(t)) - torch.log(-torch.log(u))
    chosen = torch.where(t > 0, noisy, scores)
    # torch.argmax does not promise which of several maxima it returns.
    best = chosen.amax(dim=-1, keepdim=True)
    first = torch.where(chosen == best, token, vocab).amin(dim=-1)
    return first.clamp_max(vocab - 1).to(torch.int32)
