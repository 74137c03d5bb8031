"""Attention over packed sequences, as one dense product with a mask of who sees whom."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dsv3.export.builder import Graph, Value, work_dtype
from dsv3.export.emit.arguments import Cache, Weight
from dsv3.export.emit.cache import read_latents, rope_cache_write
from dsv3.export.emit.linear import bmm, quant_linear
from dsv3.export.emit.norm import rms_norm


def attend(g: Graph, scores: Value, visible: Value, values: Value) -> tuple[Value, Value]:
    """scores [Nh, q, k], visible [q, k], values [Nh or 1, k, D] -> o [Nh, q, D], lse [Nh, q, 1]; a row that sees nothing is
    0 and -inf. There is at least one key."""
    masked = g.where(visible, scores, float("-inf"))
    largest = g.reduce("Max", masked, -1)
    shift = g.where(largest.equal(float("-inf")), 0.0, largest)
    p = g.op("Exp", masked - shift)
    total = g.reduce("Sum", p, -1)
    o = g.matmul(p, values) / g.where(total.equal(0.0), 1.0, total)
    return o, g.op("Log", total) + shift


def _guarded(g: Graph, scores: Value, visible: Value, values: Value) -> tuple[Value, Value]:
    """`attend` where values that a query must not see may be NaN or infinite: 0 times that is NaN. If it sees one, so is o."""
    difference = values - values
    bad = ~difference.equal(0.0)
    o, lse = attend(g, scores, visible, g.where(bad, 0.0, values))
    seen = g.matmul(visible.to(scores.dtype), bad.to(scores.dtype))
    return g.where(seen > 0.0, float("nan"), o), lse


def segments(g: Graph, bounds: Value, rows: Value) -> tuple[Value, Value, Value, Value]:
    """For row 0 .. rows-1 of packed sequences: its sequence, whether it is in one, its index in it, and that one's length."""
    ends = g.slice(bounds.to("int64"), 0, 1, (1 << 63) - 1)
    row = g.arange(rows)
    sequence = g.count(g.unsqueeze(ends, 0) <= g.unsqueeze(row, 1), 1)
    inside = sequence < g.size(ends, 0)
    start = g.gather(bounds.to("int64"), sequence)
    # Behind the last sequence the end is the last bound: no index leaves the table.
    padded = g.concat([ends, g.slice(bounds.to("int64"), 0, -1, (1 << 63) - 1)], 0)
    return sequence, inside, row - start, g.gather(padded, sequence) - start


def _with_empty_key(g: Graph, x: Value) -> Value:
    """A row of zeros behind the keys, which nobody sees: there is always one key."""
    return g.op("Pad", x, g.ints(0, 0, 0, 1, 0, 0))


def mla_prefill(
    g: Graph,
    q: Value,
    k: Value,
    v: Value,
    cu_q: Value,
    cu_k: Value,
    max_q: int,
    max_k: int,
    scale: float,
    causal: bool = True,
) -> tuple[Value, Value]:
    work = work_dtype(q.dtype)
    keys, values = (_with_empty_key(g, t.to(work)) for t in (k, v))
    sequence, inside, j, n = (g.unsqueeze(t, 1) for t in segments(g, cu_q, g.size(q, 0)))
    owner, real, i, m = (g.unsqueeze(t, 0) for t in segments(g, cu_k, g.size(keys, 0)))
    visible = sequence.equal(owner) & inside & real
    if causal:
        visible = visible & (i <= m - n + j)
    scores = g.matmul(g.transpose(q.to(work), 1, 0, 2), g.transpose(keys, 1, 2, 0)) * scale
    o, lse = _guarded(g, scores, visible, g.transpose(values, 1, 0, 2))
    return g.transpose(o, 1, 0, 2).to(q.dtype), g.squeeze(lse, 2)


def mla_decode(
    g: Graph,
    q_c: Value,
    q_pe: Value,
    cache: Cache,
    block_table: Value,
    seq_lens: Value,
    cu_q: Value,
    max_q: int,
    max_k: int,
    scale: float,
    start: int = 0,
) -> tuple[Value, Value]:
    """Every slot of every sequence's table is a key; what lies past a sequence's end is read as zeros, from page 0."""
    work = work_dtype(q_c.dtype)
    lengths = g.unsqueeze(seq_lens.to("int64"), 1)
    slots = g.size(block_table, 1) * cache.page_size
    slot = g.unsqueeze(g.arange(slots), 0)
    valid = (slot >= start) & (slot < lengths)
    table = g.gather(block_table.to("int64"), g.squeeze(slot, 0) / cache.page_size, 1)
    rows = g.reshape(g.where(valid, table * cache.page_size + slot % cache.page_size, 0), -1)
    real = g.reshape(valid, -1)
    ckv, kpe = read_latents(g, cache, rows, work)
    ckv, kpe = (g.where(g.unsqueeze(real, 1), t, 0.0) for t in (ckv, kpe))
    owner = g.reshape(g.unsqueeze(g.arange(g.size(seq_lens, 0)), 1) + slot * 0, -1)
    place = g.reshape(slot + lengths * 0, -1)
    sequence, inside, j, n = segments(g, cu_q, g.size(q_c, 0))
    limit = g.gather(g.op("Pad", seq_lens.to("int64"), g.ints(0, 1)), sequence) - n + j
    visible = g.unsqueeze(sequence, 1).equal(g.unsqueeze(owner, 0)) & (g.unsqueeze(place, 0) <= g.unsqueeze(limit, 1))
    visible = visible & g.unsqueeze(inside, 1) & g.unsqueeze(real, 0)
    heads, rotated = (g.transpose(t.to(work), 1, 0, 2) for t in (q_c, q_pe))
    scores = g.matmul(heads, g.transpose(ckv, 1, 0)) + g.matmul(rotated, g.transpose(kpe, 1, 0))
    o, lse = _guarded(g, scores * scale, visible, g.unsqueeze(ckv, 0))
    return g.transpose(o, 1, 0, 2).to(q_c.dtype), g.squeeze(lse, 2)


def merge_attn_states(g: Graph, o1: Value, lse1: Value, o2: Value, lse2: Value) -> tuple[Value, Value]:
    work = work_dtype(o1.dtype)
    a, b = lse1.to(work), lse2.to(work)
    largest = g.op("Max", a, b)
    shift = g.where(largest.equal(float("-inf")), 0.0, largest)
    lse = g.op("Log", g.op("Exp", a - shift) + g.op("Exp", b - shift)) + shift
    shift = g.where(lse.equal(float("-inf")), 0.0, lse)
    total = None
    for o, side in ((o1, a), (o2, b)):
        weight = g.unsqueeze(g.transpose(g.op("Exp", side - shift), 1, 0), 2)
        empty = g.unsqueeze(g.transpose(side.equal(float("-inf")), 1, 0), 2)
        part = g.where(empty, 0.0, weight * o.to(work))
        total = part if total is None else total + part
    assert total is not None
    return total.to(o1.dtype), lse


def mla_prolog(
    g: Graph,
    x: Value,
    weights: Mapping[str, Any],
    positions: Value,
    cos_sin: Value,
    slots: Value,
    cache: Cache,
    eps: float,
    n_heads: int,
) -> tuple[Value, Value]:
    w_uk: Value = weights["w_uk"]
    if w_uk.shape is None or (nope := w_uk.shape[1]) is None:
        raise AssertionError("w_uk is an input of the model")
    if "q_a" in weights:
        q_a = rms_norm(g, quant_linear(g, x, weights["q_a"]), weights["q_a_norm"], eps)
        last: Weight = weights["q_b"]
        q = quant_linear(g, q_a, last)
    else:
        last = weights["q"]
        q = quant_linear(g, x, last)
    width = last.shape[0] // n_heads
    q_nope, q_pe = g.split(g.reshape(g.work(q), -1, n_heads, width), 2, nope, width - nope)
    latent, kpe = g.split(g.work(quant_linear(g, x, weights["kv_a"])), 1, cache.rank, cache.rope)
    latent = rms_norm(g, latent.to(x.dtype), weights["kv_a_norm"], eps)
    q_pe = rope_cache_write(g, q_pe.to(x.dtype), kpe.to(x.dtype), latent, positions, cos_sin, slots, cache)
    return bmm(g, q_nope.to(x.dtype), w_uk), q_pe
