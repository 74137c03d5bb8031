"""Operators of the model against plain loops in float64, and the edges that kernels get wrong."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dsv3 import ops
from dsv3.plugin import LatentCache

F64 = torch.float64


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def close(found: Tensor, wanted: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


# -- norms, rope, activation


def test_rms_norm_rounds_once() -> None:
    x, w = randn(5, 96, dtype=torch.bfloat16), randn(96, seed=1, dtype=torch.bfloat16)
    v, g = x.double(), w.double()
    wanted = (v / (v.square().mean(-1, keepdim=True) + 1e-6).sqrt() * g).bfloat16()
    assert ((ops.rms_norm(x, w, 1e-6) == wanted).float().mean() > 0.99).item()
    assert (ops.rms_norm(torch.zeros(2, 8), torch.ones(8), 1e-6) == 0).all()
    assert ops.rms_norm(torch.zeros(0, 8), torch.ones(8), 1e-6).shape == (0, 8)


def test_add_rms_norm_normalises_the_rounded_sum() -> None:
    x, r, w = (randn(4, 64, seed=s, dtype=torch.bfloat16) for s in (0, 1, 2))
    y, total = ops.add_rms_norm(x, r, w[0], 1e-6)
    assert torch.equal(total, (x.float() + r.float()).bfloat16())
    assert torch.equal(y, ops.rms_norm(total, w[0], 1e-6))


@pytest.mark.parametrize("interleaved", [True, False])
def test_apply_rope_is_a_complex_rotation_in_place(interleaved: bool) -> None:
    x, positions = randn(6, 3, 8), torch.tensor([0, 5, 2, 9, 9, 1], dtype=torch.int32)
    angles = torch.outer(torch.arange(10, dtype=F64), torch.tensor([1.0, 0.3, 0.1, 0.01], dtype=F64))
    table = torch.cat((angles.cos(), angles.sin()), -1).float()
    y = ops.apply_rope(x, positions, table, interleaved)
    for t in range(6):
        for j in range(4):
            a, b = (2 * j, 2 * j + 1) if interleaved else (j, j + 4)
            turn = complex(table[positions[t], j].item(), table[positions[t], j + 4].item())
            for n in range(3):
                z = complex(x[t, n, a].item(), x[t, n, b].item()) * turn
                assert abs(z - complex(y[t, n, a].item(), y[t, n, b].item())) < 1e-12
    assert torch.equal(y[0], x[0])  # position 0


def test_apply_rope_takes_a_strided_view() -> None:
    whole = randn(4, 2, 12)
    table = torch.cat((torch.eye(5, 4).cos(), torch.eye(5, 4).sin()), -1)
    positions = torch.arange(4, dtype=torch.int32)
    assert torch.equal(
        ops.apply_rope(whole[..., 4:], positions, table), ops.apply_rope(whole[..., 4:].contiguous(), positions, table)
    )


def test_silu_mul_has_the_gate_first_and_no_nan() -> None:
    x = torch.tensor([[-1e4, 2.0, 3.0, 5.0]])
    y = ops.silu_mul(x)
    assert y[0, 0] == 0 and abs(y[0, 1] - 2 / (1 + math.exp(-2)) * 5) < 1e-5


# -- cache and attention


def _cache(pages: int, size: int, r: int, p: int, dtype: torch.dtype = F64, fp8: bool = False) -> LatentCache:
    """Poisoned with NaN: whatever is read without having been written shows."""
    nan = float("nan")
    if fp8:
        ckv = torch.full((pages, size, r), 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn)
        return LatentCache(ckv, torch.full((pages, size, p), nan, dtype=dtype), torch.full((pages, size, -(-r // 128)), nan))
    return LatentCache(torch.full((pages, size, r), nan, dtype=dtype), torch.full((pages, size, p), nan, dtype=dtype))


def test_kv_cache_write_changes_only_the_named_slots() -> None:
    for slots in ([5, -1, 0], [-1, -1, -1], [7, 2, 3], [0, -1, -1]):
        cache = _cache(2, 4, 6, 2)
        ckv, kpe = randn(3, 6), randn(3, 2, seed=1)
        ops.kv_cache_write(ckv, kpe, torch.tensor(slots, dtype=torch.int32), cache)
        for slot in range(8):
            row, key = cache.ckv.view(8, 6)[slot], cache.kpe.view(8, 2)[slot]
            if slot in slots:
                assert torch.equal(row, ckv[slots.index(slot)]) and torch.equal(key, kpe[slots.index(slot)])
            else:
                assert row.isnan().all() and key.isnan().all()
    ops.kv_cache_write(randn(0, 6), randn(0, 2), torch.zeros(0, dtype=torch.int32), _cache(1, 4, 6, 2))


def test_the_cache_may_be_views_of_one_buffer() -> None:
    buffer = torch.full((2, 4, 8), float("nan"), dtype=F64)
    cache = LatentCache(buffer[..., :6], buffer[..., 6:])
    ckv, kpe = randn(2, 6), randn(2, 2, seed=1)
    ops.kv_cache_write(ckv, kpe, torch.tensor([1, 6], dtype=torch.int32), cache)
    assert torch.equal(buffer.view(8, 8)[1], torch.cat((ckv[0], kpe[0])))
    assert int(buffer.isnan().all(-1).sum()) == 6


def test_an_fp8_cache_holds_act_quant_per_token() -> None:
    cache = _cache(2, 4, 160, 4, torch.bfloat16, fp8=True)
    ckv, kpe = randn(3, 160, dtype=torch.bfloat16), randn(3, 4, seed=1, dtype=torch.bfloat16)
    ops.kv_cache_write(ckv, kpe, torch.tensor([6, -1, 1], dtype=torch.int32), cache)
    codes, scale = ops.act_quant(ckv)
    assert cache.scale is not None
    assert torch.equal(cache.ckv.view(torch.uint8)[1, 2], codes.view(torch.uint8)[0])
    assert torch.equal(cache.scale[1, 2], scale[0]) and cache.scale[0, 0].isnan().all()
    table, lengths = torch.tensor([[1]], dtype=torch.int32), torch.tensor([3], dtype=torch.int32)
    found, keys = ops.kv_cache_gather(cache, table, lengths, 1, start=2)
    wanted = codes[0].float() * scale[0].repeat_interleave(128)[:160]
    assert torch.equal(found[0], wanted.bfloat16()) and torch.equal(keys[0], kpe[0])


def test_kv_cache_gather_follows_the_table_and_skips_the_start() -> None:
    cache = _cache(6, 4, 3, 2)
    ckv, kpe = randn(24, 3), randn(24, 2, seed=1)
    ops.kv_cache_write(ckv, kpe, torch.arange(24, dtype=torch.int32), cache)
    table = torch.tensor([[5, 0, 99], [2, 99, 99], [3, 99, -7]], dtype=torch.int32)
    lengths = torch.tensor([6, 0, 4], dtype=torch.int32)
    for start in (0, 1):
        slots = [*[20, 21, 22, 23, 0, 1][start:], *[12, 13, 14, 15][start:]]
        found, keys = ops.kv_cache_gather(cache, table, lengths, len(slots), start)
        assert torch.equal(found, ckv[slots]) and torch.equal(keys, kpe[slots])
    assert ops.kv_cache_gather(cache, table[:0], lengths[:0], 0)[0].shape == (0, 3)


def _attention(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """One head, one query at a time."""
    n, m = len(q), len(k)
    o, lse = torch.zeros(n, v.shape[1], dtype=F64), torch.full((n,), -math.inf, dtype=F64)
    for j in range(n):
        seen = max(0, min(m, m - n + j + 1)) if causal else m
        if seen:
            scores = (k[:seen] @ q[j]) * scale
            lse[j] = torch.logsumexp(scores, 0)
            o[j] = torch.softmax(scores, 0) @ v[:seen]
    return o, lse


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 6)), max_size=4), st.booleans(), st.integers(0, 2**31))
def test_mla_prefill_is_attention_per_sequence(sizes: list[tuple[int, int]], causal: bool, seed: int) -> None:
    heads, d, dv = 2, 5, 3
    cu_q = torch.tensor([0, *torch.tensor([n for n, _ in sizes]).cumsum(0).tolist()], dtype=torch.int32)
    cu_k = torch.tensor([0, *torch.tensor([m for _, m in sizes]).cumsum(0).tolist()], dtype=torch.int32)
    q, k, v = randn(int(cu_q[-1]), heads, d, seed=seed), randn(int(cu_k[-1]), heads, d), randn(int(cu_k[-1]), heads, dv)
    most = [max([s[i] for s in sizes], default=0) for i in (0, 1)]
    o, lse = ops.mla_prefill(q, k, v, cu_q, cu_k, most[0], most[1], 0.4, causal)
    for s, _ in enumerate(sizes):
        a, b, c, e = (int(i) for i in (cu_q[s], cu_q[s + 1], cu_k[s], cu_k[s + 1]))
        for h in range(heads):
            wanted = _attention(q[a:b, h], k[c:e, h], v[c:e, h], 0.4, causal)
            close(o[a:b, h], wanted[0])
            close(lse[h, a:b], wanted[1])


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9)), min_size=1, max_size=4), st.sampled_from([0, 1]),
    st.sampled_from([1, 4]), st.integers(0, 2**31),
)  # fmt: skip
def test_mla_decode_is_attention_over_pages(sizes: list[tuple[int, int]], start: int, page: int, seed: int) -> None:
    """Pages in random order, NaN in every slot and table entry that no sequence owns."""
    heads, r, p = 2, 4, 2
    lengths = [start + max(n, m) for n, m in sizes]
    needed = [-(-length // page) for length in lengths]
    order = torch.randperm(sum(needed) + 1, generator=torch.Generator().manual_seed(seed)).tolist()
    cache = _cache(sum(needed) + 1, page, r, p)
    table = torch.full((len(sizes), max([*needed, 1]) + 1), 10**6, dtype=torch.int32)
    rows = []
    for s, (length, count) in enumerate(zip(lengths, needed, strict=True)):
        mine = [order.pop() for _ in range(count)]
        table[s, :count] = torch.tensor(mine, dtype=torch.int32)
        ckv, kpe = randn(length, r, seed=seed + s), randn(length, p, seed=seed - s)
        slots = [mine[i // page] * page + i % page if i >= start else -1 for i in range(length)]
        ops.kv_cache_write(ckv, kpe, torch.tensor(slots, dtype=torch.int32), cache)
        rows.append((ckv[start:], kpe[start:]))
    cu = torch.tensor([0, *torch.tensor([n for n, _ in sizes]).cumsum(0).tolist()], dtype=torch.int32)
    q_c, q_pe = randn(int(cu[-1]), heads, r, seed=seed), randn(int(cu[-1]), heads, p, seed=seed + 9)
    seq_lens = torch.tensor(lengths, dtype=torch.int32)
    o, lse = ops.mla_decode(q_c, q_pe, cache, table, seq_lens, cu, 3, max(lengths), 0.3, start)
    for s, (ckv, kpe) in enumerate(rows):
        a, b = int(cu[s]), int(cu[s + 1])
        for h in range(heads):
            q = torch.cat((q_c[a:b, h], q_pe[a:b, h]), -1)
            wanted = _attention(q, torch.cat((ckv, kpe), -1), ckv, 0.3, True)
            close(o[a:b, h], wanted[0])
            close(lse[h, a:b], wanted[1])


def test_merge_is_attention_over_the_union() -> None:
    q, k, v = randn(3, 5), randn(8, 5, seed=1), randn(8, 4, seed=2)
    sides = [_attention(q, k[s], v[s], 1.0, False) for s in (slice(0, 3), slice(3, 8))]
    o, lse = ops.merge_attn_states(*[x for o, lse in sides for x in (o[:, None], lse[None])])
    wanted = _attention(q, k, v, 1.0, False)
    close(o[:, 0], wanted[0])
    close(lse[0], wanted[1])


def test_merge_ignores_an_empty_side_even_where_it_is_nan() -> None:
    o1, o2 = torch.full((2, 1, 3), float("nan")), torch.ones(2, 1, 3)
    empty, some = torch.full((1, 2), -math.inf), torch.tensor([[200.0, -200.0]])
    for pair in ((o1, empty, o2, some), (o2, some, o1, empty)):
        o, lse = ops.merge_attn_states(*pair)
        assert torch.equal(o, o2) and torch.equal(lse, some)
    o, lse = ops.merge_attn_states(o1, empty, o1, empty)
    assert (o == 0).all() and torch.equal(lse, empty)


def test_mtp_combine_has_the_embedding_first() -> None:
    e, h, a, b, w = randn(3, 4), randn(3, 4, seed=1), randn(4, seed=2), randn(4, seed=3), randn(4, 8, seed=4)
    wanted = torch.cat((ops.rms_norm(e, a, 1e-6), ops.rms_norm(h, b, 1e-6)), -1) @ w.T
    close(ops.mtp_combine(e, h, a, b, w, 1e-6), wanted)


def test_absorption_equals_expansion() -> None:
    """q' = q W_UK against the latent, then W_UV, is attention over k = W_UK^T c and v = W_UV^T c."""
    heads, nope, value, r, n = 2, 3, 5, 4, 6
    q, c, w_uk, w_uv = randn(n, heads, nope), randn(n, r, seed=1), randn(heads, nope, r, seed=2), randn(heads, r, value, seed=3)
    zero = torch.zeros(n, heads, 2, dtype=F64)
    k, v = torch.einsum("hdr,tr->thd", w_uk, c), torch.einsum("hrv,tr->thv", w_uv, c)
    cu = torch.tensor([0, n], dtype=torch.int32)
    wanted, _ = ops.mla_prefill(q, k, v, cu, cu, n, n, 0.5)
    cache = _cache(2, 4, r, 2)
    ops.kv_cache_write(c, zero[:, 0], torch.arange(n, dtype=torch.int32), cache)
    table, lengths = torch.tensor([[0, 1]], dtype=torch.int32), torch.tensor([n], dtype=torch.int32)
    o, _ = ops.mla_decode(ops.bmm(q, w_uk), zero, cache, table, lengths, cu, n, n, 0.5)
    close(ops.bmm(o, w_uv), wanted)


def test_attention_over_an_fp8_cache_reads_codes_times_scales_unrounded() -> None:
    """Not the latents rounded to the dtype of the rotary keys."""
    r, n = 160, 12
    cache = _cache(3, 4, r, 4, torch.bfloat16, fp8=True)
    ckv, kpe = randn(n, r, dtype=torch.bfloat16), randn(n, 4, seed=1, dtype=torch.bfloat16)
    ops.kv_cache_write(ckv, kpe, torch.arange(n, dtype=torch.int32), cache)
    codes, scale = ops.act_quant(ckv)
    latent = codes.double() * scale.double().repeat_interleave(128, dim=-1)[:, :r]
    q_c, q_pe = randn(1, 2, r, seed=2), randn(1, 2, 4, seed=3)
    table, lengths = torch.tensor([[0, 1, 2]], dtype=torch.int32), torch.tensor([n], dtype=torch.int32)
    o, lse = ops.mla_decode(q_c, q_pe, cache, table, lengths, torch.tensor([0, 1], dtype=torch.int32), 1, n, 0.1)
    for h in range(2):
        q = torch.cat((q_c[:, h], q_pe[:, h]), -1)
        wanted = _attention(q, torch.cat((latent, kpe.double()), -1), latent, 0.1, True)
        close(o[:, h], wanted[0])
        close(lse[h], wanted[1])


def test_nan_in_a_key_that_a_query_must_not_see_does_not_reach_it() -> None:
    cache = _cache(1, 4, 4, 2)
    ckv, kpe = randn(3, 4), randn(3, 2, seed=1)
    ckv[2], kpe[2] = float("nan"), float("nan")
    ops.kv_cache_write(ckv, kpe, torch.arange(3, dtype=torch.int32), cache)
    table, lengths, cu = torch.tensor([[0]]), torch.tensor([3]), torch.tensor([0, 2])
    o, lse = ops.mla_decode(randn(2, 1, 4), randn(2, 1, 2), cache, table, lengths, cu, 2, 3, 1.0)
    assert o[0].isfinite().all() and lse[0, 0].isfinite() and o[1].isnan().all()
    v = randn(3, 1, 2, seed=2)
    v[2] = float("nan")
    o, _ = ops.mla_prefill(randn(3, 1, 4), randn(3, 1, 4), v, torch.tensor([0, 3]), torch.tensor([0, 3]), 3, 3, 1.0)
    assert o[:2].isfinite().all() and o[2].isnan().all()
