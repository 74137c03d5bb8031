"""Budgets of attention: scores, probabilities and values, each with its error."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv3.budget.approx import Approx
from dsv3.budget.expectation import Expectation, Real
from dsv3.budget.rules import Arguments, real, rule
from dsv3.budget.units import BF16_OPERAND, growth, half_ulp, tiny, work_ulp
from dsv3.ops.attention import _visible
from dsv3.ops.cache import read_latent

_TEXT = (
    "on o: u |o| + the errors of the scores (g sum |q k| scale, and 2^-22 (|s| + max|s|) in exp) and of the sum, weighted by "
    "p |v|; bf16-p adds 2^-8 sum p |v|. On lse: 2^-22 max(1, |lse|) + the scores' errors"
)


def attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float, n: str, w: float) -> tuple[Tensor, ...]:
    """One head group of one sequence in float64: q [h, q, d], k and v [h or 1, k, d], visible [q, k] ->
    o, radius of o [h, q, dv], lse, radius of lse [h, q]."""
    hidden = ~visible
    s = (torch.matmul(q, k.transpose(-1, -2)) * scale).masked_fill(hidden, float("-inf"))
    size = torch.matmul(q.abs(), k.abs().transpose(-1, -2)) * abs(scale)
    lse = torch.logsumexp(s, dim=-1)
    top = s.amax(dim=-1, keepdim=True)
    empty = torch.isneginf(top)
    top = torch.where(empty, torch.zeros_like(top), top)
    p = torch.where(hidden | empty, torch.zeros_like(s), torch.exp(s - torch.where(empty[..., 0], 0.0, lse)[..., None]))
    kind = torch.float64 if w < 2.0**-40 else torch.float32
    finite = torch.where(hidden, torch.zeros_like(s), s)
    size = torch.where(hidden, torch.zeros_like(size), size)
    error = growth(n, q.shape[-1], kind) * size + 4 * w * (finite.abs() + top.abs() + 2)
    drift = (p * error).sum(dim=-1)
    # Values that a query must not see may be NaN; those that any query sees count in full.
    seen = visible.any(dim=0)
    vs = torch.where(seen[None, :, None], v, torch.zeros_like(v))
    if bool(torch.isfinite(vs).all()):
        o, terms, moved = (torch.matmul(m, x) for m, x in ((p, vs), (p, vs.abs()), (p * error, vs.abs())))
    else:
        parts = [[torch.matmul(m[:, j, None, see], x[:, see]) for j, see in enumerate(visible)]
                 for m, x in ((p, v), (p, v.abs()), (p * error, v.abs()))]  # fmt: skip
        o, terms, moved = (torch.cat(part, dim=1) for part in parts)
    g = growth(n, k.shape[-2], kind) + 8 * w + (BF16_OPERAND if n == "bf16-p" else 0.0)
    radius = moved + (drift[..., None] + g) * terms
    lse_radius = 4 * w * torch.where(empty[..., 0], 1.0, lse.abs()).clamp_min(1) + drift
    return o, radius, lse, lse_radius


class _Collected:
    """The results of all sequences; a row that nobody writes is empty: o = 0, lse = -inf."""

    def __init__(self, rows: int, heads: int, width: int, last: int) -> None:
        self.o, self.ro = (torch.zeros(rows, heads, width, dtype=torch.float64) for _ in range(2))
        self.lse = torch.full((heads, rows), float("-inf"), dtype=torch.float64)
        self.rl = torch.zeros(heads, rows, dtype=torch.float64)
        self.skip = torch.arange(rows) >= last

    def put(self, rows: slice, made: tuple[Tensor, ...]) -> None:
        self.o[rows], self.ro[rows] = made[0].transpose(0, 1), made[1].transpose(0, 1)
        self.lse[:, rows], self.rl[:, rows] = made[2], made[3]

    def expectations(self, dtype: torch.dtype, n: str) -> list[Expectation]:
        o = real("o", 0, Approx(self.o, self.ro, dtype), dtype, n, skip=self.skip[:, None, None])
        kind = torch.float64 if dtype == torch.float64 else torch.float32
        tolerance = self.rl + half_ulp(kind) * self.lse.abs().nan_to_num(0, 0, 0) + tiny(kind)
        return [o, Real("lse", 1, self.lse, tolerance, skip=self.skip[None, :])]


@rule("mla_prefill", text=f"{_TEXT}. A row without keys is exactly 0 and -inf.")
def mla_prefill(a: Arguments, n: str) -> list[Expectation]:
    q, k, v = (a[name].to(torch.float64) for name in ("q", "k", "v"))
    bounds_q, bounds_k = a["cu_q"].tolist(), a["cu_k"].tolist()
    made = _Collected(q.shape[0], q.shape[1], v.shape[2], bounds_q[-1])
    w = work_ulp(a["q"].dtype)
    for s in range(len(bounds_q) - 1):
        rows, keys = slice(*bounds_q[s : s + 2]), slice(*bounds_k[s : s + 2])
        if rows.stop > rows.start and keys.stop > keys.start:
            parts = [t.transpose(0, 1) for t in (q[rows], k[keys], v[keys])]
            visible = _visible(parts[0].shape[1], parts[1].shape[1], a["causal"], q.device)
            made.put(rows, attend(parts[0], parts[1], parts[2], visible, a["scale"], n, w))
    return made.expectations(a["q"].dtype, n)


@rule("mla_decode", text=f"{_TEXT}. The cache as it is stored, dequantised exactly.")
def mla_decode(a: Arguments, n: str) -> list[Expectation]:
    q = torch.cat([a["q_c"], a["q_pe"]], dim=-1).to(torch.float64)
    cache, start, bounds = a["cache"], a["start"], a["cu_q"].tolist()
    rank, page_size = a["q_c"].shape[-1], a["cache"].ckv.shape[1]
    made = _Collected(q.shape[0], q.shape[1], rank, bounds[-1])
    w = work_ulp(a["q_c"].dtype)
    for s, length in enumerate(a["seq_lens"].tolist()):
        rows = slice(bounds[s], bounds[s + 1])
        if rows.stop == rows.start or length <= start:
            continue
        position = torch.arange(start, length)
        pages = a["block_table"][s].to(torch.int64)[position // page_size]
        ckv, kpe = read_latent(cache, pages, position % page_size, torch.float64)
        visible = _visible(rows.stop - rows.start, length - start, True, q.device)
        keys = torch.cat([ckv, kpe], dim=-1)[None]
        made.put(rows, attend(q[rows].transpose(0, 1), keys, ckv[None], visible, a["scale"], n, w))
    return made.expectations(a["q_c"].dtype, n)


@rule("merge_attn_states", text="on o: u |o| + (8 + 4 (|lse1| + |lse2|)) 2^-24 sum w_i |o_i|; on lse: 2^-22 max(1, |lse|).")
def merge_attn_states(a: Arguments, n: str) -> list[Expectation]:
    from dsv3.ops import merge_attn_states as reference

    dtype, w = a["o1"].dtype, work_ulp(a["o1"].dtype)
    wide = {name: t.to(torch.float64) for name, t in a.items()}
    o, lse = reference(**wide)
    sides = [torch.where(torch.isneginf(wide[f"lse{i}"]).T[..., None], 0.0, wide[f"o{i}"]).abs() for i in (1, 2)]
    terms, _ = reference(sides[0], wide["lse1"], sides[1], wide["lse2"])
    size = sum(wide[f"lse{i}"].abs().nan_to_num(0, 0, 0) for i in (1, 2))
    radius = (8 + 4 * size).T[..., None] * w * terms
    expected = real("o", 0, Approx(o, radius, dtype), dtype, n)
    return [expected, Real("lse", 1, lse, 4 * w * lse.abs().nan_to_num(0, 0, 0).clamp_min(1))]
