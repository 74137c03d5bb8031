"""Budgets of what writes and reads the latent cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dsv3.budget.approx import Approx
from dsv3.budget.expectation import Expectation, Finding, combine, same_values, within
from dsv3.budget.pointwise import rotate, rotated
from dsv3.budget.quantised import Quantised
from dsv3.budget.rules import FACTOR, Arguments, against_decomposition, real, rule
from dsv3.budget.tensors import clone_cache, raw_bytes
from dsv3.budget.units import activation_ulp, half_ulp, tiny
from dsv3.ops import kv_cache_gather as gather
from dsv3.plugin import LatentCache
from dsv3.quant.fp8 import BLOCK

_WRITE = "only the named slots change, bit for bit"


@dataclass
class CacheRows(Expectation):
    """The cache after a call: named slots hold these rows, all others every bit they held before.

    rows: latent and key [T, .] with their errors; `exact`: stored as they are. The mutated cache comes last among outputs.
    """

    before: LatentCache
    slots: Tensor
    ckv: Approx
    kpe: Approx
    exact_ckv: bool
    exact_kpe: bool
    rounding: float = 0.0
    extra: tuple[Tensor, Tensor] | None = None  # tolerances from the decomposition, [T, 1] each
    name: str = "cache"

    def __post_init__(self) -> None:
        self.reference = self.ckv.value

    def check(self, outputs: Sequence[Any]) -> Finding:
        after = outputs[-1]
        slots = self.slots.to(torch.int64)
        keep = slots >= 0
        found = [self._others(after, slots[keep])]
        if bool(keep.any()):
            found += self._rows(after, slots[keep], keep)
        return combine(found)

    def _others(self, after: LatentCache, slots: Tensor) -> Finding:
        """Slots that were not named."""
        for name in ("ckv", "kpe", "scale"):
            old, new = getattr(self.before, name), getattr(after, name)
            if old is None:
                continue
            old, new = (raw_bytes(t).view(t.shape[0] * t.shape[1], -1) for t in (old, new))
            new[slots] = old[slots]
            finding = same_values(f"cache.{name} outside the named slots, bytes", new, old)
            if finding.message:
                return finding
        return Finding()

    def _rows(self, after: LatentCache, slots: Tensor, keep: Tensor) -> list[Finding]:
        page = after.ckv.shape[1]
        at = (slots // page, slots % page)
        kpe = after.kpe[at]
        ckv = after.ckv.view(torch.uint8)[at].view(after.ckv.dtype) if after.scale is not None else after.ckv[at]
        found = [self._plane("cache.kpe rows", kpe, self.kpe.rows(keep), self.exact_kpe, 1, keep)]
        if after.scale is not None:
            encoding = str(after.ckv.dtype).removeprefix("torch.")
            latent = self.ckv.rows(keep)
            if self.extra is not None:
                latent = Approx(latent.value, latent.radius + self.extra[0][keep], latent.dtype)
            quantised = Quantised("cache.ckv rows", 0, latent, BLOCK, encoding, rounding=self.rounding)
            found.append(quantised.check((ckv, after.scale[at])))
        else:
            found.append(self._plane("cache.ckv rows", ckv, self.ckv.rows(keep), self.exact_ckv, 0, keep))
        return found

    def _plane(self, name: str, stored: Tensor, rows: Approx, exact: bool, which: int, keep: Tensor) -> Finding:
        if exact:
            return same_values(name, stored, rows.value.to(stored.dtype))
        tolerance = (
            (half_ulp(stored.dtype) + self.rounding) * (rows.value.abs() + rows.radius) + rows.radius + tiny(stored.dtype)
        )
        if self.extra is not None:
            tolerance = torch.maximum(tolerance, self.extra[which][keep])
        return within(name, stored, rows.value, tolerance)


@rule("kv_cache_write", text=f"exact in the cache's dtype, {_WRITE}; an FP8 latent as act_quant.")
def kv_cache_write(a: Arguments, n: str) -> list[Expectation]:
    ckv = a["ckv"].to(torch.float32) if a["cache"].scale is not None else a["ckv"]
    return [CacheRows(a["cache"], a["slots"], Approx.of(ckv), Approx.of(a["kpe"]), True, True)]


@rule("rope_cache_write", text=f"q_pe' and the stored key as apply_rope, the latent as kv_cache_write; {_WRITE}.")
def rope_cache_write(a: Arguments, n: str) -> list[Expectation]:
    q = rotated(a["q_pe"], a["positions"], a["cos_sin"], a["interleaved"])
    key = rotated(a["kpe"].unsqueeze(1), a["positions"], a["cos_sin"], a["interleaved"])
    key = Approx(key.value[:, 0], key.radius[:, 0], key.dtype)
    ckv = a["ckv"].to(torch.float32) if a["cache"].scale is not None else a["ckv"]
    rows = CacheRows(a["cache"], a["slots"], Approx.of(ckv), key, True, False, activation_ulp(a["kpe"].dtype))
    return [real("q_pe'", 0, q, a["q_pe"].dtype, n), rows]


@rule("kv_cache_gather", text="exact; an FP8 latent u |y| + 2^-23 |y| of code times scale.")
def kv_cache_gather(a: Arguments, n: str) -> list[Expectation]:
    cache = a["cache"]
    wide = LatentCache(
        cache.ckv if cache.scale is not None else cache.ckv.to(torch.float64), cache.kpe.to(torch.float64), cache.scale
    )
    ckv, kpe = gather(**{**a, "cache": wide})
    unit = 0.0 if cache.scale is None else 2.0**-23
    dtype = cache.kpe.dtype
    made = [
        real("ckv", 0, Approx(ckv, unit * ckv.abs(), dtype), dtype, n),
        real("kpe", 1, Approx(kpe, 0 * kpe, dtype), dtype, n),
    ]
    if cache.scale is None and cache.ckv.dtype == dtype:
        made[0].tolerance = torch.zeros_like(ckv)
    made[1].tolerance = torch.zeros_like(kpe)
    return list(made)


@rule(
    "mla_prolog",
    text="u |y| + the errors along the chain, with intermediates in 16 bits or not (4 times the root of their squares), or 4 "
    f"times (per row) what the decomposition errs; {_WRITE}.",
)
def mla_prolog(a: Arguments, n: str) -> list[Expectation]:
    weights, eps, dtype = a["weights"], a["eps"], a["x"].dtype
    x = Approx.of(a["x"])
    if weights.get("q_a") is not None:
        low = x.through(weights["q_a"], n).stored().norm(weights["q_a_norm"], eps).stored()
        q = low.through(weights["q_b"], n).stored()
    else:
        q = x.through(weights["q"], n).stored()
    w_uk = weights["w_uk"].to(torch.float64)
    nope, rank = w_uk.shape[1:]
    t, heads = q.value.shape[0], a["n_heads"]
    q = q.take(lambda v: v.view(t, heads, v.shape[1] // heads))
    kv = x.through(weights["kv_a"], n).stored()
    latent = kv.take(lambda v: v[:, :rank]).norm(weights["kv_a_norm"], eps).stored().settled()
    where = (a["positions"], a["cos_sin"])
    key = rotate(kv.take(lambda v: v[:, None, rank:]), *where, True).take(lambda v: v[:, 0]).stored().settled()
    q_pe = rotate(q.take(lambda v: v[..., nope:]), *where, True)
    head = q.take(lambda v: v[..., :nope].transpose(0, 1))
    q_c = head.product(w_uk.transpose(1, 2), n).take(lambda v: v.transpose(0, 1))
    outputs: list[Expectation] = [real("q_c", 0, q_c.settled(), dtype, n), real("q_pe", 1, q_pe.settled(), dtype, n)]
    rows = CacheRows(a["cache"], a["slots"], latent, key, False, False, 2 * activation_ulp(dtype), _row_errors(a, latent, key))
    return [*against_decomposition("mla_prolog", a, outputs, n, always=True), rows]


def _row_errors(a: Arguments, latent: Approx, key: Approx) -> tuple[Tensor, Tensor]:
    """FACTOR times the largest error per row of what the decomposition writes, with a cache that keeps what it is given."""
    old = a["cache"]
    t, dtype = a["x"].shape[0], a["x"].dtype
    plain = LatentCache(*(torch.zeros(1, max(t, 1), p.shape[-1], dtype=dtype) for p in (old.ckv, old.kpe)))
    given = {**a, "cache": clone_cache(plain), "slots": torch.arange(t)}
    from dsv3.ops import mla_prolog as reference

    reference(**given)
    made = []
    for plane, rows in ((given["cache"].ckv, latent), (given["cache"].kpe, key)):
        error = (plane[0, :t].to(torch.float64) - rows.value).abs()
        made.append(FACTOR * (error.amax(dim=-1, keepdim=True) if error.numel() else torch.zeros(t, 1, dtype=torch.float64)))
    return made[0], made[1]
