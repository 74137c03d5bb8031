"""Sampling by Gumbel's maximum, in two stages: a vocabulary is too long for one program. Source: Salmon et al. 2011 (Philox);
Gumbel 1954; Maddison et al. 2014."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv3_triton.launch import launch

_M0: tl.constexpr = tl.constexpr(0xD2511F53)
_M1: tl.constexpr = tl.constexpr(0xCD9E8D57)
_W0: tl.constexpr = tl.constexpr(0x9E3779B9)
_W1: tl.constexpr = tl.constexpr(0xBB67AE85)
_MASK: tl.constexpr = tl.constexpr(0xFFFFFFFF)


@triton.jit
def multiply(constant: tl.constexpr, x):
    """High and low 32 bits of constant * x, all in int64: halves of 16 bits keep the product below 2^63."""
    upper = constant * (x >> 16) + ((constant * (x & 0xFFFF)) >> 16)
    return (upper >> 16) & _MASK, (constant * x) & _MASK


@triton.jit
def philox_word(token, position, seed):
    """Word 0 of Philox4x32-10 as int64 in [0, 2^32): counter (token, position, 0, 0), key (seed low, seed high)."""
    c0, c1 = token & _MASK, position & _MASK
    c2, c3 = c0 * 0, c0 * 0
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in tl.static_range(10):
        hi0, lo0 = multiply(_M0, c0)
        hi1, lo1 = multiply(_M1, c2)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return c0


@triton.jit
def best_of_block_kernel(
    logits_ptr, seeds_ptr, positions_ptr, temperature_ptr, best_ptr, id_ptr, V, stride, blocks, BLOCK: tl.constexpr
):
    """One program: the best of BLOCK tokens of one row, and the lowest id that has it. NaN is never chosen."""
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    token = block * BLOCK + tl.arange(0, BLOCK)
    logits = tl.load(logits_ptr + row * stride + token, mask=token < V, other=float("-inf")).to(tl.float64)
    temperature = tl.load(temperature_ptr + row).to(tl.float64) + tl.zeros([BLOCK], tl.float64)
    position = tl.load(positions_ptr + row).to(tl.int64) + tl.zeros([BLOCK], tl.int64)
    seed = tl.load(seeds_ptr + row).to(tl.int64) + tl.zeros([BLOCK], tl.int64)
    word = philox_word(token.to(tl.int64), position, seed)
    u = (word.to(tl.float64) + 0.5) * 2.3283064365386962890625e-10
    hot = temperature > 0.0
    noisy = logits / tl.where(hot, temperature, 1.0) - tl.log(-tl.log(u))
    value = tl.where(hot, noisy, logits)
    value = tl.where((token < V) & (value == value), value, float("-inf"))
    best = tl.max(value, axis=0)
    first = tl.min(tl.where((value == best) & (token < V), token, V), axis=0)
    tl.store(best_ptr + row * blocks + block, best)
    tl.store(id_ptr + row * blocks + block, first)


@triton.jit
def best_of_row_kernel(best_ptr, id_ptr, ids_ptr, blocks, V, BLOCKS: tl.constexpr):
    """One program: one row, over the blocks' best."""
    row = tl.program_id(0).to(tl.int64)
    block = tl.arange(0, BLOCKS)
    value = tl.load(best_ptr + row * blocks + block, mask=block < blocks, other=float("-inf"))
    token = tl.load(id_ptr + row * blocks + block, mask=block < blocks, other=V)
    first = tl.min(tl.where(value == tl.max(value, axis=0), token, V), axis=0)
    tl.store(ids_ptr + row, tl.minimum(first, V - 1))


def gumbel_argmax(logits: Tensor, seeds: Tensor, positions: Tensor, temperature: Tensor, config: Mapping[str, Any]) -> Tensor:
    """`dsv3.ops.gumbel_argmax`. Noise in float64, whose logarithm Triton takes from the device's mathematics library."""
    rows, vocabulary = logits.shape
    blocks = triton.cdiv(vocabulary, config["BLOCK"])
    best = torch.empty(rows, blocks, dtype=torch.float64, device=logits.device)
    found = torch.empty(rows, blocks, dtype=torch.int32, device=logits.device)
    ids = torch.empty(rows, dtype=torch.int32, device=logits.device)
    launch(
        best_of_block_kernel, (rows, blocks), logits, seeds, positions, temperature, best, found, vocabulary,
        logits.stride(0), blocks, BLOCK=config["BLOCK"], num_warps=config["num_warps"],
    )  # fmt: skip
    launch(
        best_of_row_kernel, (rows,), best, found, ids, blocks, vocabulary, BLOCKS=triton.next_power_of_2(blocks), num_warps=4
    )
    return ids
