"""Attention: one run per sequence, or per slice of its queries, on slices of the tensors. The bounds of the sequences are read
on the host."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from dsv3.plugin import LatentCache
from dsv3_onnxruntime.emit import attention
from dsv3_onnxruntime.emit.quantise import BLOCK
from dsv3_onnxruntime.session import run

# Scores held at once: 64 MiB of float32.
MOST_SCORES = 1 << 24


def mla_prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    scale: float,
    causal: bool = True,
    *,
    provider: str = "cpu",
) -> tuple[Tensor, Tensor]:
    """Rows past cu_q[S] are 0 and -inf."""
    o, lse = _nothing(q, v.shape[2])
    queries, keys = cu_q.tolist(), cu_k.tolist()
    for first_q, last_q, first_k, last_k in zip(queries, queries[1:], keys, keys[1:], strict=False):
        sequence = {"q": q[first_q:last_q]}, {"k": k[first_k:last_k], "v": v[first_k:last_k]}
        part = o[first_q:last_q], lse[:, first_q:last_q]
        _sequence("mla_prefill", attention.prefill, *sequence, *part, causal, provider, {"scale": scale})
    return o, lse


def mla_decode(
    q_c: Tensor,
    q_pe: Tensor,
    cache: LatentCache,
    block_table: Tensor,
    seq_lens: Tensor,
    cu_q: Tensor,
    max_q: int,
    max_k: int,
    scale: float,
    start: int = 0,
    *,
    provider: str = "cpu",
) -> tuple[Tensor, Tensor]:
    """The pages of a sequence, and no others, are gathered in the order of its table."""
    o, lse = _nothing(q_c, q_c.shape[2])
    size = cache.ckv.shape[1]
    bounds = cu_q.tolist()
    for s, length in enumerate(seq_lens.tolist()):
        first, last = bounds[s], bounds[s + 1]
        if last <= first or length <= start:
            continue
        pages = block_table[s, start // size : -(-length // size)]
        slots = slice(start % size, length - start // size * size)
        planes = {"ckv": _rows(cache.ckv, pages, slots), "kpe": _rows(cache.kpe, pages, slots)}
        if cache.scale is not None:
            planes["ckv_scale"] = _rows(cache.scale, pages, slots)
        sequence = {"q_c": q_c[first:last], "q_pe": q_pe[first:last]}, planes
        part = o[first:last], lse[:, first:last]
        facts = {"scale": scale, "padding": -cache.ckv.shape[2] % BLOCK}
        _sequence("mla_decode", attention.decode, *sequence, *part, True, provider, facts)
    return o, lse


def _nothing(q: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """What queries without keys get."""
    o = q.new_zeros(q.shape[0], q.shape[1], width)
    return o, q.new_full((q.shape[1], q.shape[0]), float("-inf"), dtype=torch.float32)


def _rows(plane: Tensor, pages: Tensor, slots: slice) -> Tensor:
    """[pages, page_size, D] -> the rows of a sequence."""
    bits = plane.view(torch.uint8) if plane.element_size() == 1 else plane  # torch cannot index FP8
    return bits.index_select(0, pages).flatten(0, 1)[slots].view(plane.dtype)


def _sequence(
    op: str,
    build: Callable[..., None],
    queries: dict[str, Tensor],
    keys: dict[str, Tensor],
    o: Tensor,
    lse: Tensor,
    causal: bool,
    provider: str,
    facts: Mapping[str, float],
) -> None:
    """Fill o [n, Nh, D] and lse [Nh, n] of one sequence of n queries and m keys, a slice of the queries at a time."""
    n, heads = o.shape[:2]
    m = next(iter(keys.values())).shape[0]
    if n == 0 or m == 0:
        return
    # Each slice passes over the keys again: contiguous once is better than contiguous every time.
    keys = {name: t.contiguous() for name, t in keys.items()}
    # A query must not see the NaN of a later key, and 0 * NaN is NaN: then row by row, over what each may see.
    alone = causal and n > 1 and not all(bool(torch.isfinite(t.float()).all()) for t in keys.values())
    most = 1 if alone else max(1, MOST_SCORES // (heads * m))
    for first in range(0, n, most):
        last = min(first + most, n)
        seen = min(last + m - n, m) if causal else m
        if seen <= 0:
            continue
        inputs = {name: t[first:last] for name, t in queries.items()} | {name: t[:seen] for name, t in keys.items()}
        masked = causal and last - first > 1
        if masked:
            inputs["offset"] = torch.full((1,), first + m - n, dtype=torch.int64, device=o.device)
        part = lse.new_empty(heads, last - first)
        run(op, build, inputs, {"o": o[first:last], "lse": part}, provider, masked=masked, **facts)
        lse[:, first:last] = part
