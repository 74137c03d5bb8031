"""Multi-head latent attention: over expanded keys and values (prefill), and absorbed over the latent cache (decode)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dsv3.ops.cache import read_latent
from dsv3.ops.norm import work_dtype
from dsv3.ops.spec import composite, primitive
from dsv3.plugin import LatentCache, Prepared


def _softmax_v(scores: Tensor, visible: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """scores [Nh, q, k], visible [q, k], values [Nh or 1, k, D] -> o [Nh, q, D], lse [Nh, q]; an empty row is 0 and -inf."""
    scores = scores.masked_fill(~visible, float("-inf"))
    lse = torch.logsumexp(scores, dim=-1)
    shift = torch.where(torch.isinf(lse), torch.zeros_like(lse), lse)
    p = torch.exp(scores - shift[..., None])
    if bool(visible.all()) or bool(torch.isfinite(values).all()):
        return torch.matmul(p, values), lse
    # A value that a query must not see may be NaN, and 0 * NaN is NaN: row by row over what each sees.
    rows = [torch.matmul(p[:, j, None, seen], values[..., seen, :]) for j, seen in enumerate(visible)]
    return torch.cat(rows, dim=1), lse


def _visible(queries: int, keys: int, causal: bool, device: torch.device) -> Tensor:
    """Bottom-right aligned: query j of n sees keys up to keys - n + j."""
    if not causal:
        return torch.ones(queries, keys, dtype=torch.bool, device=device)
    limit = torch.arange(queries, device=device)[:, None] + (keys - queries)
    return torch.arange(keys, device=device)[None, :] <= limit


@primitive("q[Tq,Nh,Dqk] k[Tk,Nh,Dqk] v[Tk,Nh,Dv] cu_q[S+1]:int cu_k[S+1]:int -> o[Tq,Nh,Dv] lse[Nh,Tq]:f32")
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
) -> tuple[Tensor, Tensor]:
    """Attention of packed sequences over expanded keys and values.

    q [Tq, Nh, Dn+P], k [Tk, Nh, Dn+P], v [Tk, Nh, Dv]; sequence s has queries cu_q[s] to cu_q[s+1] and keys cu_k[s]
    to cu_k[s+1]; max_q, max_k host integers -> o [Tq, Nh, Dv] in q.dtype, lse f32 [Nh, Tq], the natural logarithm
    over scaled scores. Causal is aligned bottom right. A row without keys has o = 0, lse = -inf; rows past cu_q[S]
    are unspecified (here 0 and -inf). This reference reads cu_q and cu_k on the host. Source: DeepSeek-V2 report,
    equations 9 to 19.

    Invariants:
    - sequences do not mix
    - permuting the keys of a sequence changes nothing where not causal
    - with one visible key, o is its value and lse its score
    """
    work = work_dtype(q)
    o = torch.zeros(q.shape[0], q.shape[1], v.shape[2], dtype=q.dtype, device=q.device)
    lse = torch.full((q.shape[1], q.shape[0]), float("-inf"), dtype=work, device=q.device)
    if q.is_meta:
        return o, lse
    bounds_q, bounds_k = cu_q.tolist(), cu_k.tolist()
    for s in range(len(bounds_q) - 1):
        rows, keys = slice(*bounds_q[s : s + 2]), slice(*bounds_k[s : s + 2])
        qs, ks, vs = (t.to(work).transpose(0, 1) for t in (q[rows], k[keys], v[keys]))
        if qs.shape[1] == 0 or ks.shape[1] == 0:
            continue
        visible = _visible(qs.shape[1], ks.shape[1], causal, q.device)
        out, lse[:, rows] = _softmax_v(torch.matmul(qs, ks.transpose(1, 2)) * scale, visible, vs)
        o[rows] = out.transpose(0, 1).to(q.dtype)
    return o, lse


@primitive(
    "q_c[T,Nh,R] q_pe[T,Nh,P] cache<pages,page_size,R,P> block_table[S,maxp]:int seq_lens[S]:int cu_q[S+1]:int"
    " -> o[T,Nh,R] lse[Nh,T]:f32"
)
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
    """Absorbed attention over the paged latent cache: all heads share one key [latent | rope] and one value, the latent.

    q_c [T, Nh, R], q_pe [T, Nh, P], block_table [S, maxp], seq_lens [S] (this step's tokens included), cu_q [S+1] ->
    o [T, Nh, R] in q_c.dtype, lse f32 [Nh, T]. Query j of the n of a sequence sees slots start <= slot < seq_len - n
    + j + 1. Cache slots past seq_len and table entries past the last page are never read. This reference reads
    seq_lens, cu_q and the table on the host. Source: DeepSeek-V2 report, appendix B (absorption), and 2.1.2.

    Invariants:
    - relabelling pages in cache and table changes nothing
    - sequences may share pages
    - NaN in slots past seq_len does not show
    - halves of the keys, merged by merge_attn_states, give the whole
    """
    work = work_dtype(q_c)
    o = torch.zeros_like(q_c)
    lse = torch.full((q_c.shape[1], q_c.shape[0]), float("-inf"), dtype=work, device=q_c.device)
    if q_c.is_meta:
        return o, lse
    page_size = cache.ckv.shape[1]
    bounds = cu_q.tolist()
    for s, length in enumerate(seq_lens.tolist()):
        rows = slice(bounds[s], bounds[s + 1])
        queries = rows.stop - rows.start
        if queries == 0 or length <= start:
            continue
        position = torch.arange(start, length, device=q_c.device)
        block = torch.div(position, page_size, rounding_mode="floor")
        pages = block_table[s].index_select(0, block).to(torch.int64)
        ckv, kpe = read_latent(cache, pages, position - block * page_size, work)
        scores = torch.matmul(q_c[rows].to(work).transpose(0, 1), ckv.T)
        scores = (scores + torch.matmul(q_pe[rows].to(work).transpose(0, 1), kpe.T)) * scale
        visible = _visible(queries, length - start, True, q_c.device)
        out, lse[:, rows] = _softmax_v(scores, visible, ckv)
        o[rows] = out.transpose(0, 1).to(q_c.dtype)
    return o, lse


@primitive("o1[T,Nh,D] lse1[Nh,T]:f32 o2[T,Nh,D] lse2[Nh,T]:f32 -> o[T,Nh,D] lse[Nh,T]:f32")
def merge_attn_states(o1: Tensor, lse1: Tensor, o2: Tensor, lse2: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the union of two disjoint key sets, from the results over each.

    o [T, Nh, D] and lse f32 [Nh, T] of both sides -> the merged pair. A side with lse = -inf is ignored even where it is NaN;
    both -inf: o = 0, lse = -inf. Source: Milakov and Gimelshein 2018, section 3.1.

    Invariants:
    - a side with lse = -inf gives the other's o and lse, bit for bit
    - symmetric; associative within the budget
    """
    work = work_dtype(o1)
    a, b = lse1.to(work), lse2.to(work)
    lse = torch.logaddexp(a, b)
    shift = torch.where(torch.isneginf(lse), torch.zeros_like(lse), lse)
    total = torch.zeros(o1.shape, dtype=work, device=o1.device)
    for o, side in ((o1, a), (o2, b)):
        weight = torch.exp(side - shift).T[..., None]
        total = total + torch.where(torch.isneginf(side).T[..., None], torch.zeros_like(total), weight * o.to(work))
    return total.to(o1.dtype), lse


@composite(
    "x[T,H] weights.q_a{Rq,H}? weights.q_a_norm[Rq]? weights.q_b{Nq,Rq}? weights.q{Nq,H}? weights.kv_a{R+P,H}"
    " weights.kv_a_norm[R] weights.w_uk[Nh,Dn,R] positions[T]:int cos_sin[L,P]:f32 slots[T]:int"
    " cache<pages,page_size,R,P> -> q_c[T,Nh,R] q_pe[T,Nh,P]",
    mutates=("cache",),
)
def mla_prolog(
    ops: Any,
    x: Tensor,
    weights: Mapping[str, Prepared | Tensor],
    positions: Tensor,
    cos_sin: Tensor,
    slots: Tensor,
    cache: LatentCache,
    eps: float,
    n_heads: int,
) -> tuple[Tensor, Tensor]:
    """Everything of absorbed attention before the attention itself.

    x [T, H]; weights: q_a [Rq, H], q_a_norm [Rq] and q_b [Nh(Dn+P), Rq], or q [Nh(Dn+P), H]; kv_a [R+P, H], kv_a_norm
    [R], w_uk [Nh, Dn, R] (may be a strided view) -> q_c [T, Nh, R], rotated q_pe [T, Nh, P]; writes the normalised
    latent and the rotated key into the cache. eps is that of the two latent norms. Source: DeepSeek-V2 report,
    appendix B.

    Invariants:
    - equal to its decomposition within the budget
    - all other slots keep their bits
    """
    if "q_a" in weights:
        q_a = ops.quant_linear(x=x, w=weights["q_a"])
        q = ops.quant_linear(x=ops.rms_norm(x=q_a, weight=weights["q_a_norm"], eps=eps), w=weights["q_b"])
    else:
        q = ops.quant_linear(x=x, w=weights["q"])
    w_uk = weights["w_uk"]
    nope, rank = w_uk.shape[1:]
    q = q.view(x.shape[0], n_heads, q.shape[1] // n_heads)
    kv = ops.quant_linear(x=x, w=weights["kv_a"])
    latent = ops.rms_norm(x=kv[:, :rank], weight=weights["kv_a_norm"], eps=eps)
    q_pe = ops.rope_cache_write(
        q_pe=q[..., nope:],
        kpe=kv[:, rank:],
        ckv=latent,
        positions=positions,
        cos_sin=cos_sin,
        slots=slots,
        cache=cache,
        interleaved=True,
    )
    return ops.bmm(x=q[..., :nope], weight=w_uk), q_pe
