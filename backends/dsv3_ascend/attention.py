"""Attention through the vendor's fused operator. It takes lengths as lists: the host waits for them, and no graph holds it.

What it does not take, known on the host then, goes through torch's operators: sequences without queries or keys, more than 16
queries at once over the cache, keys hidden at the start.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsv3 import ops
from dsv3.plugin import LatentCache
from dsv3_ascend import vendor

_MOST_QUERIES = 16
_MOST_SEQUENCES = 4096


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
) -> tuple[Tensor, Tensor]:
    ends, lengths = cu_q[1:].tolist(), seq_lens.tolist()
    if start or not decode_fits(ends, lengths):
        return ops.mla_decode(
            q_c=q_c, q_pe=q_pe, cache=cache, block_table=block_table, seq_lens=seq_lens, cu_q=cu_q, max_q=max_q, max_k=max_k,
            scale=scale, start=start,
        )  # fmt: skip
    # Entries past a sequence's pages may be anything; the vendor checks none.
    size = cache.ckv.shape[1]
    used = torch.arange(block_table.shape[1], device=block_table.device) * size < seq_lens[:, None]
    table = torch.where(used, block_table, 0).to(torch.int32)
    n = ends[-1]
    o, lse = vendor.of(q_c).latent_attention(
        q_c[:n].contiguous(), q_pe[:n].contiguous(), cache.ckv, cache.kpe, table, ends, lengths, scale
    )
    return _with_rest(o, lse, q_c.shape[0])


def decode_fits(ends: list[int], lengths: list[int]) -> bool:
    """Every sequence has 1 to 16 queries, and keys for each."""
    counts = [end - begin for begin, end in zip([0, *ends], ends, strict=False)]
    fine = all(0 < n <= _MOST_QUERIES and n <= length for n, length in zip(counts, lengths, strict=True))
    return 0 < len(ends) <= _MOST_SEQUENCES and fine


def mla_prefill(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, scale: float, causal: bool = True
) -> tuple[Tensor, Tensor]:
    ends_q, ends_k = cu_q[1:].tolist(), cu_k[1:].tolist()
    if not prefill_fits(ends_q, ends_k):
        return ops.mla_prefill(
            q=q, k=k, v=v, cu_q=cu_q, cu_k=cu_k, max_q=max_q, max_k=max_k, scale=scale, causal=causal
        )  # fmt: skip
    n, m = ends_q[-1], ends_k[-1]
    o, lse = vendor.of(q).packed_attention(
        q[:n].contiguous(), k[:m].contiguous(), v[:m].contiguous(), ends_q, ends_k, scale, causal
    )
    return _with_rest(o, lse, q.shape[0])


def prefill_fits(ends_q: list[int], ends_k: list[int]) -> bool:
    """Every sequence has queries, and at least as many keys."""
    counts = [[end - begin for begin, end in zip([0, *ends], ends, strict=False)] for ends in (ends_q, ends_k)]
    fine = all(0 < n <= m for n, m in zip(*counts, strict=True))
    return 0 < len(ends_q) <= _MOST_SEQUENCES and fine


def _with_rest(o: Tensor, lse: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """o [n, Nh, D], lse [n, Nh, 1] -> [T, Nh, D], [Nh, T]; rows past the last query are 0 and -inf."""
    lse = lse.squeeze(-1).T
    if rows == o.shape[0]:
        return o, lse.contiguous()
    return _padded(o, rows, 0.0), _padded(lse.T, rows, float("-inf")).T.contiguous()


def _padded(x: Tensor, rows: int, value: float) -> Tensor:
    rest = torch.full((rows - x.shape[0], *x.shape[1:]), value, dtype=x.dtype, device=x.device)
    return torch.cat((x, rest))
