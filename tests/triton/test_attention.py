"""Attention: what the conformance suite does not show."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("triton")

import torch

from dsv3 import ops
from dsv3.plugin import LatentCache
from dsv3_triton.decode import mla_decode
from dsv3_triton.launch import recording
from dsv3_triton.prefill import mla_prefill

HEADS, R, P, PAGE = 3, 160, 10, 32
CONFIG = {
    "BLOCK_H": 16, "BLOCK_N": 16, "CHUNK": 64, "SPAN": 16, "TARGET_PROGRAMS": 8, "AHEAD": False, "NATIVE": "", "ROWS": 4,
    "COMBINE_WARPS": 1, "num_warps": 1,
}  # fmt: skip
FP8 = (torch.float8_e4m3fn, torch.float8_e4m3fnuz)


def rows(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def call(stored: torch.dtype = torch.float32, page: int = PAGE, start: int = 0) -> dict[str, Any]:
    """Three sequences of 70, 5 and 33 slots; what they must not read is NaN, or no page at all."""
    lengths, pages = torch.tensor([70, 5, 33]), -(-70 // page)
    ckv, kpe = rows(3 * pages, page, R, seed=1), rows(3 * pages, page, P, seed=2)
    scale = rows(3 * pages, page, 2, seed=3).abs() if stored in FP8 else None
    table = torch.arange(3 * pages).flip(0).view(3, pages).to(torch.int32)
    for s, length in enumerate(lengths.tolist()):
        used = -(-length // page)
        for plane in (kpe, *([ckv] if scale is None else [scale])):
            plane[table[s].long()] = plane[table[s].long()].flatten(0, 1).index_fill(
                0, torch.arange(length, pages * page), float("nan")).view(pages, page, -1)  # fmt: skip
        table[s, used:] = 1 << 30
    cache = LatentCache(ckv.to(stored), kpe, scale)
    return {
        "q_c": rows(4, HEADS, R, seed=4), "q_pe": rows(4, HEADS, P, seed=5), "cache": cache, "block_table": table,
        "seq_lens": lengths, "cu_q": torch.tensor([0, 1, 3, 4]), "max_q": 2, "max_k": 70, "scale": 0.05, "start": start,
    }  # fmt: skip


def same(given: dict[str, Any], config: dict[str, Any]) -> None:
    for a, b in zip(mla_decode(**given, config=config), ops.mla_decode(**given), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("start", [0, 1, 17])
@pytest.mark.parametrize("page", [32, 16, 8, 7])
def test_pages_that_hold_a_block_and_pages_that_do_not(page: int, start: int) -> None:
    same(call(page=page, start=start), CONFIG)


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("stored", FP8)
def test_fp8_by_bits_or_by_conversion_and_a_block_ahead_or_not(stored: torch.dtype, native: bool) -> None:
    name = str(stored).removeprefix("torch.") if native else ""
    for ahead in (False, True):
        same(call(stored, start=1), {**CONFIG, "NATIVE": name, "AHEAD": ahead})


@pytest.mark.parametrize("max_k", [0, 1, 70, 1 << 20])
def test_any_bound_on_keys_gives_the_same(max_k: int) -> None:
    same({**call(), "max_k": max_k}, CONFIG)


def test_a_sequence_is_split_only_where_programs_are_wanting() -> None:
    started: list[tuple[str, tuple[int, ...]]] = []
    with recording(lambda kernel, grid, args, constants: started.append((kernel.fn.__name__, grid))):
        same(call(), {**CONFIG, "TARGET_PROGRAMS": 15})
        same(call(), {**CONFIG, "TARGET_PROGRAMS": 3})
    assert started == [("decode_kernel", (1, 5, 3)), ("combine_kernel", (2, 3)), ("decode_kernel", (1, 1, 3))]


def test_a_query_that_is_nan_shows() -> None:
    given = call()
    given["q_c"][2, 1, 5] = float("nan")
    o, lse = mla_decode(**given, config=CONFIG)
    assert o[2, 1].isnan().all() and lse[1, 2].isnan()
    assert o.isnan().sum() == R and lse.isnan().sum() == 1


def test_blocks_of_keys_that_all_queries_see_need_no_mask() -> None:
    given: dict[str, Any] = {
        "q": rows(21, 2, 24), "k": rows(75, 2, 24, seed=1), "v": rows(75, 2, 44, seed=2)[..., 24:],
        "cu_q": torch.tensor([0, 20, 21]), "cu_k": torch.tensor([0, 70, 75]), "max_q": 20, "max_k": 0, "scale": 0.2,
    }  # fmt: skip
    for causal in (True, False):
        mine = mla_prefill(**given, causal=causal, config={"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 1})
        for a, b in zip(mine, ops.mla_prefill(**given, causal=causal), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
