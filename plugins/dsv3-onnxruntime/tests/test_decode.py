"""Absorbed attention over the paged cache against float64."""

import math

import pytest
import torch
from budgets import DTYPES, UNIT, draw
from dsv3_onnxruntime import kernels
from dsv3_onnxruntime.kernels import attention
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3 import ops
from dsv3.plugin import LatentCache

NAN = float("nan")
R, P, HEADS, SCALE = 40, 8, 3, 0.15


def build(lengths: list[int], page: int, dtype: torch.dtype, fp8: bool, rank: int = R) -> tuple[LatentCache, torch.Tensor]:
    """A cache whose pages lie in a shuffled order; all that belongs to no sequence is NaN."""
    counts = [-(-n // page) for n in lengths]
    pages = sum(counts) + 2
    order = torch.randperm(pages, generator=torch.Generator().manual_seed(page))
    table = torch.full((len(lengths), max(counts) + 1), 10_000, dtype=torch.int32)
    stored = torch.float8_e4m3fn if fp8 else dtype
    ckv = torch.full((pages, page, rank), NAN).to(stored)
    kpe = torch.full((pages, page, P), NAN, dtype=dtype)
    scale = torch.full((pages, page, -(-rank // 128)), NAN) if fp8 else None
    cache, used = LatentCache(ckv, kpe, scale), 0
    for s, length in enumerate(lengths):
        mine = order[used : used + counts[s]]
        used += counts[s]
        table[s, : counts[s]] = mine
        position = torch.arange(length)
        slots = mine[position // page] * page + position % page if length else position
        latent, key = draw("outliers", length, rank, seed=s).to(dtype), draw("normal", length, P, seed=s).to(dtype)
        ops.kv_cache_write(ckv=latent, kpe=key, slots=slots, cache=cache)
    return cache, table


def check(lengths: list[int], queries: list[int], page: int, dtype: torch.dtype, fp8: bool = False, start: int = 0) -> None:
    cache, table = build(lengths, page, dtype, fp8)
    cu_q = torch.tensor([0, *torch.tensor(queries).cumsum(0).tolist()], dtype=torch.int32)
    q_c = draw("normal", sum(queries), HEADS, R).to(dtype)
    q_pe = draw("normal", sum(queries), HEADS, P + 3).to(dtype)[..., 3:]
    arguments = {
        "block_table": table, "seq_lens": torch.tensor(lengths), "cu_q": cu_q, "max_q": max(queries),
        "max_k": max(lengths), "scale": SCALE, "start": start,
    }  # fmt: skip
    o, lse = kernels.mla_decode(q_c=q_c, q_pe=q_pe, cache=cache, **arguments)
    assert o.dtype == dtype and lse.dtype == torch.float32
    wanted, wanted_lse = ops.mla_decode(q_c=q_c.double(), q_pe=q_pe.double(), cache=cache, **arguments)
    for s, length in enumerate(lengths):
        rows = slice(int(cu_q[s]), int(cu_q[s + 1]))
        if length <= start or rows.start == rows.stop:
            assert torch.equal(o[rows], torch.zeros_like(o[rows])) and lse[:, rows].isneginf().all()
            continue
        one = {"block_table": table[s : s + 1], "seq_lens": torch.tensor([length]), "total": length - start, "start": start}
        wide = LatentCache(cache.ckv if fp8 else cache.ckv.double(), cache.kpe.double(), cache.scale)
        ckv, kpe = ops.kv_cache_gather(wide, **one)
        terms = torch.einsum("qhr,kr->hqk", q_c[rows].double().abs(), ckv.abs())
        terms = (terms + torch.einsum("qhp,kp->hqk", q_pe[rows].double().abs(), kpe.abs())) * SCALE
        # what float32 sums do to the scores, they do relatively to the probabilities
        spread = 2.0**-24 * (8 + 2 * math.sqrt(R + P) * terms.amax(dim=-1))
        bound = UNIT[dtype] * wanted[rows].abs() + 2 * spread.T[..., None] * _mean_magnitude(q_c[rows], q_pe[rows], ckv, kpe)
        assert ((o[rows].double() - wanted[rows]).abs() <= bound).all()
        assert ((lse[:, rows].double() - wanted_lse[:, rows]).abs() <= spread + 2.0**-22 * wanted_lse[:, rows].abs()).all()


def _mean_magnitude(q_c: torch.Tensor, q_pe: torch.Tensor, ckv: torch.Tensor, kpe: torch.Tensor) -> torch.Tensor:
    """[n, Nh, R]: sum of p * |v|."""
    scores = torch.einsum("qhr,kr->qhk", q_c.double(), ckv) + torch.einsum("qhp,kp->qhk", q_pe.double(), kpe)
    n, m = q_c.shape[0], ckv.shape[0]
    hidden = torch.arange(m)[None] > torch.arange(n)[:, None] + m - n
    scores = (scores * SCALE).masked_fill(hidden[:, None], float("-inf"))
    return torch.einsum("qhk,kr->qhr", scores.softmax(dim=-1), ckv.abs())


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_lengths_around_a_page(dtype: torch.dtype, fp8: bool) -> None:
    check([1, 15, 16, 17, 33], [1, 1, 1, 1, 1], 16, dtype, fp8)
    check([5, 0, 40], [2, 1, 7], 16, dtype, fp8)
    check([2, 17], [1, 3], 16, dtype, fp8, start=1)
    check([1], [1], 64, dtype, fp8, start=1)


@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(0, 4)), min_size=1, max_size=3),
    st.sampled_from((1, 7, 16)),
    st.integers(0, 2),
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_any_lengths(lengths: list[tuple[int, int]], page: int, start: int) -> None:
    total = [n + start for n, _ in lengths]
    check(total, [min(n, q) for n, q in lengths], page, torch.float32, start=start)


def test_slices_of_queries_are_the_same_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "MOST_SCORES", 2 * HEADS * 20)
    check([20, 11], [9, 11], 16, torch.float32)


def test_a_later_nan_key_is_not_seen_by_earlier_queries() -> None:
    cache, table = build([6], 4, torch.float32, False)
    cache.ckv[table[0, 1], 1] = NAN  # slot 5, which only the last query sees
    q_c, q_pe = draw("normal", 3, HEADS, R), draw("normal", 3, HEADS, P)
    o, lse = kernels.mla_decode(
        q_c=q_c, q_pe=q_pe, cache=cache, block_table=table, seq_lens=torch.tensor([6]), cu_q=torch.tensor([0, 3]),
        max_q=3, max_k=6, scale=SCALE,
    )  # fmt: skip
    assert o[:2].isfinite().all() and lse[:, :2].isfinite().all() and o[2].isnan().all()
