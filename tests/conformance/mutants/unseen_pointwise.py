"""Further faults of norms, activation, rotation, embedding, sampling and the MTP input."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from dsv3 import ops
from dsv3.ops.sampling import philox
from tests.conformance.mutants import fault

F = torch.float32
Pair = tuple[Tensor, Tensor]


def _w(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else F


def _rms(x: Tensor, weight: Tensor, inverse: Tensor) -> Tensor:
    return (x.to(_w(x)) * inverse * weight.to(_w(x))).to(x.dtype)


@fault("rms_norm", "one tile of 4096 columns: the rest is not in the mean")
def _(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    v = x.to(_w(x))
    square = v[:, :4096].square().sum(-1, keepdim=True) / max(x.shape[1], 1)
    return _rms(x, weight, torch.rsqrt(square + eps))


@fault("rms_norm", "rows past 256 take the statistics of the row 256 before")
def _(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    inverse = torch.rsqrt(x.to(_w(x)).square().mean(-1, keepdim=True) + eps)
    rows = torch.arange(x.shape[0]) % 256
    return _rms(x, weight, inverse[rows])


@fault("rms_norm", "rsqrt with 11 bits")
def _(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    inverse = torch.rsqrt(x.to(_w(x)).square().mean(-1, keepdim=True) + eps)
    mantissa, exponent = torch.frexp(inverse)
    return _rms(x, weight, torch.ldexp((mantissa * 2048).round() / 2048, exponent))


@fault("rms_norm", "eps added to the root")
def _(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _rms(x, weight, 1 / (x.to(_w(x)).square().mean(-1, keepdim=True).sqrt() + eps))


@fault("rms_norm", "width rounded up to a multiple of 16 in the mean")
def _(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    width = -(-x.shape[1] // 16) * 16
    return _rms(x, weight, torch.rsqrt(x.to(_w(x)).square().sum(-1, keepdim=True) / max(width, 1) + eps))


@fault("rms_norm", "float16 product with the weight")
def _(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    v = x.to(_w(x))
    v = v * torch.rsqrt(v.square().mean(-1, keepdim=True) + eps)
    return (v.half() * weight.half()).to(x.dtype)


@fault("rms_norm", "a row of zeros is skipped and keeps what memory held")
def _(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    y = torch.full_like(x, 7.0, memory_format=torch.contiguous_format)
    some = x.abs().amax(-1) > 0 if x.numel() else torch.zeros(x.shape[0], dtype=torch.bool)
    some = some | torch.isnan(x).any(-1)
    y[some] = ops.rms_norm(x[some], weight, eps)
    return y


@fault("rms_norm", "sum of squares in float16 where x is bf16")
def _(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    if x.dtype != torch.bfloat16:
        return ops.rms_norm(x, weight, eps)
    square = x.float().square().half().float().mean(-1, keepdim=True)
    return _rms(x, weight, torch.rsqrt(square.half().float() + eps))


@fault("add_rms_norm", "residual rounded to bf16 in every dtype but float64")
def _(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Pair:
    if x.dtype == torch.float64:
        return ops.add_rms_norm(x, residual, weight, eps)  # type: ignore[no-any-return]
    total = (x.float() + residual.float()).bfloat16().to(x.dtype)
    return ops.rms_norm(total, weight, eps), total


@fault("add_rms_norm", "residual' truncated in bf16")
def _(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Pair:
    total = x.to(_w(x)) + residual.to(_w(x))
    if x.dtype == torch.bfloat16:
        total = (total.view(torch.int32) & -65536).view(F)
    total = total.to(x.dtype)
    return ops.rms_norm(total, weight, eps), total


@fault("add_rms_norm", "last row of more than 500 not added")
def _(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Pair:
    y, total = ops.add_rms_norm(x, residual, weight, eps)
    if x.shape[0] > 500:
        total[-1] = residual[-1]
        y = ops.rms_norm(total, weight, eps)
    return y, total


@fault("add_rms_norm", "columns past 4096 not added")
def _(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Pair:
    total = (x.to(_w(x)) + residual.to(_w(x))).to(x.dtype)
    total[:, 4096:] = residual[:, 4096:]
    return ops.rms_norm(total, weight, eps), total


@fault("silu_mul", "rational approximation of the logistic function")
def _(x: Tensor) -> Tensor:
    gate, up = x.to(_w(x)).chunk(2, -1)
    t = (gate / 2).clamp(-4.97, 4.97)
    s = t * t
    tanh = t * (135135 + s * (17325 + s * (378 + s))) / (135135 + s * (62370 + s * (3150 + s * 28)))
    return (gate * 0.5 * (1 + tanh) * up).to(x.dtype)


@fault("silu_mul", "gates under -20 give zero in float32 and float64")
def _(x: Tensor) -> Tensor:
    gate, _ = x.chunk(2, -1)
    y = ops.silu_mul(x)
    return torch.where(gate < -20, torch.zeros_like(y), y) if x.dtype != torch.bfloat16 else y


@fault("silu_mul", "exp overflows to NaN for gates under -100")
def _(x: Tensor) -> Tensor:
    gate, up = x.to(_w(x)).chunk(2, -1)
    e = torch.exp(gate)
    return (gate * torch.where(gate < -100, e * math.inf, torch.sigmoid(gate)) * up).to(x.dtype)


@fault("silu_mul", "columns past 4096 by gate and up swapped")
def _(x: Tensor) -> Tensor:
    y = ops.silu_mul(x)
    gate, up = x.chunk(2, -1)
    y[:, 4096:] = ops.silu_mul(torch.cat([up, gate], -1))[:, 4096:]
    return y


@fault("silu_mul", "row offsets in 16 bits")
def _(x: Tensor) -> Tensor:
    rows = torch.arange(x.shape[0]) % max(65536 // max(x.shape[1], 1), 1)
    return ops.silu_mul(x[rows])


@fault("silu_mul", "silu rounded to bf16 before up")
def _(x: Tensor) -> Tensor:
    gate, up = x.to(_w(x)).chunk(2, -1)
    act = torch.nn.functional.silu(gate)
    return (act.bfloat16().to(act.dtype) * up).to(x.dtype)


@fault("apply_rope", "positions in 16 bits")
def _(x: Tensor, positions: Tensor, cos_sin: Tensor, interleaved: bool = True) -> Tensor:
    return ops.apply_rope(x, positions.to(torch.int16).to(torch.int64) % cos_sin.shape[0], cos_sin, interleaved)


@fault("apply_rope", "heads past 32 are not rotated")
def _(x: Tensor, positions: Tensor, cos_sin: Tensor, interleaved: bool = True) -> Tensor:
    y = ops.apply_rope(x, positions, cos_sin, interleaved)
    y[:, 32:] = x[:, 32:]
    return y


@fault("apply_rope", "tokens past 512 use the position of the token 512 before")
def _(x: Tensor, positions: Tensor, cos_sin: Tensor, interleaved: bool = True) -> Tensor:
    return ops.apply_rope(x, positions[torch.arange(x.shape[0]) % 512], cos_sin, interleaved)


@fault("apply_rope", "angles past 4 pi turned back in float32 with a short pi")
def _(x: Tensor, positions: Tensor, cos_sin: Tensor, interleaved: bool = True) -> Tensor:
    half = x.shape[-1] // 2
    wrong = cos_sin.clone()
    wrong[2048:, :half] = cos_sin[2048:, :half] * (1 + 2.0**-12)
    return ops.apply_rope(x, positions, wrong, interleaved)


@fault("apply_rope", "wrong for P = 64 in halves")
def _(x: Tensor, positions: Tensor, cos_sin: Tensor, interleaved: bool = True) -> Tensor:
    return ops.apply_rope(x, positions, cos_sin, interleaved or x.shape[-1] == 64)


@fault("apply_rope", "position 0 at once, without looking at the table")
def _(x: Tensor, positions: Tensor, cos_sin: Tensor, interleaved: bool = True) -> Tensor:
    y = ops.apply_rope(x, positions, cos_sin, interleaved)
    return torch.where((positions == 0)[:, None, None], x, y)


@fault("embedding", "ids in 16 bits")
def _(ids: Tensor, table: Tensor) -> Tensor:
    return ops.embedding(ids.to(torch.int16).to(torch.int64) % table.shape[0], table)


@fault("embedding", "one tile of 1024 columns")
def _(ids: Tensor, table: Tensor) -> Tensor:
    y = ops.embedding(ids, table)
    y[:, 1024:] = 0
    return y


@fault("embedding", "tokens past 1024 left zero")
def _(ids: Tensor, table: Tensor) -> Tensor:
    y = ops.embedding(ids, table)
    y[1024:] = 0
    return y


@fault("embedding", "row 0 is padding")
def _(ids: Tensor, table: Tensor) -> Tensor:
    return ops.embedding(ids, table) * (ids != 0)[:, None]


def _gumbel(logits: Tensor, seeds: Tensor, positions: Tensor, temperature: Tensor, noise: Tensor) -> Tensor:
    scores, t = logits.to(torch.float64), temperature.to(torch.float64)[:, None]
    made = torch.where(t > 0, scores / torch.where(t > 0, t, torch.ones_like(t)) + noise, scores)
    best = made.amax(-1, keepdim=True)
    token = torch.arange(logits.shape[1])[None]
    return torch.where(made == best, token, logits.shape[1]).amin(-1).to(torch.int32)


def _noise(logits: Tensor, seeds: Tensor, positions: Tensor, token: Tensor | None = None) -> Tensor:
    token = torch.arange(logits.shape[1])[None] if token is None else token
    return philox(token, positions[:, None], seeds.to(torch.int64)[:, None]).double()


@fault("gumbel_argmax", "u in float32")
def _(logits: Tensor, seeds: Tensor, positions: Tensor, temperature: Tensor) -> Tensor:
    if logits.shape[0] == 0:
        return ops.gumbel_argmax(logits, seeds, positions, temperature)
    u = ((_noise(logits, seeds, positions) + 0.5) * 2.0**-32).float().clamp(2.0**-40, 1 - 2.0**-24)
    return _gumbel(logits, seeds, positions, temperature, -torch.log(-torch.log(u)).double())


@fault("gumbel_argmax", "u from 24 bits")
def _(logits: Tensor, seeds: Tensor, positions: Tensor, temperature: Tensor) -> Tensor:
    if logits.shape[0] == 0:
        return ops.gumbel_argmax(logits, seeds, positions, temperature)
    u = ((_noise(logits, seeds, positions) // 256) + 0.5) * 2.0**-24
    return _gumbel(logits, seeds, positions, temperature, -torch.log(-torch.log(u)))


@fault("gumbel_argmax", "token ids in 16 bits in the counter")
def _(logits: Tensor, seeds: Tensor, positions: Tensor, temperature: Tensor) -> Tensor:
    if logits.shape[0] == 0:
        return ops.gumbel_argmax(logits, seeds, positions, temperature)
    u = (_noise(logits, seeds, positions, (torch.arange(logits.shape[1]) % 65536)[None]) + 0.5) * 2.0**-32
    return _gumbel(logits, seeds, positions, temperature, -torch.log(-torch.log(u)))


@fault("gumbel_argmax", "only the first tile of 8192 tokens")
def _(logits: Tensor, seeds: Tensor, positions: Tensor, temperature: Tensor) -> Tensor:
    return ops.gumbel_argmax(logits[:, :8192], seeds, positions, temperature)


@fault("gumbel_argmax", "on ties the later tile of 2048 wins")
def _(logits: Tensor, seeds: Tensor, positions: Tensor, temperature: Tensor) -> Tensor:
    ids = ops.gumbel_argmax(logits, seeds, positions, temperature)
    for at in range(2048, logits.shape[1], 2048):
        tile = logits[:, at : at + 2048]
        other = (tile.argmax(-1) + at).to(torch.int32)
        before = logits[:, :at].amax(-1)
        ids = torch.where((temperature == 0) & (tile.amax(-1) == before), other, ids)
    return ids


@fault("gumbel_argmax", "temperatures under 0.1 are greedy")
def _(logits: Tensor, seeds: Tensor, positions: Tensor, temperature: Tensor) -> Tensor:
    return ops.gumbel_argmax(
        logits, seeds, positions, torch.where(temperature < 0.1, torch.zeros_like(temperature), temperature)
    )


@fault("gumbel_argmax", "seeds as 32 bits")
def _(logits: Tensor, seeds: Tensor, positions: Tensor, temperature: Tensor) -> Tensor:
    return ops.gumbel_argmax(logits, seeds.to(torch.int32).to(torch.int64), positions, temperature)


@fault("gumbel_argmax", "a row of -inf but for one takes a masked token")
def _(logits: Tensor, seeds: Tensor, positions: Tensor, temperature: Tensor) -> Tensor:
    return ops.gumbel_argmax(logits.clamp_min(-5.0), seeds, positions, temperature)


@fault("mtp_combine", "concatenated norms in float16")
def _(embedding: Tensor, hidden: Tensor, enorm: Tensor, hnorm: Tensor, eh_proj: Tensor, eps: float) -> Tensor:
    both = torch.cat([ops.rms_norm(embedding, enorm, eps), ops.rms_norm(hidden, hnorm, eps)], -1)
    return (both.half().to(_w(hidden)) @ eh_proj.to(_w(hidden)).T).to(hidden.dtype)


@fault("mtp_combine", "the first row's embedding is zeroed")
def _(embedding: Tensor, hidden: Tensor, enorm: Tensor, hnorm: Tensor, eh_proj: Tensor, eps: float) -> Tensor:
    e = embedding.clone()
    e[:1] = 0
    return ops.mtp_combine(embedding=e, hidden=hidden, enorm=enorm, hnorm=hnorm, eh_proj=eh_proj, eps=eps)


@fault("mtp_combine", "eps 1e-5 for the hidden state")
def _(embedding: Tensor, hidden: Tensor, enorm: Tensor, hnorm: Tensor, eh_proj: Tensor, eps: float) -> Tensor:
    both = torch.cat([ops.rms_norm(embedding, enorm, eps), ops.rms_norm(hidden, hnorm, 1e-5)], -1)
    return ops.linear(both, eh_proj)


@fault("mtp_combine", "rows past 128 without the embedding")
def _(embedding: Tensor, hidden: Tensor, enorm: Tensor, hnorm: Tensor, eh_proj: Tensor, eps: float) -> Tensor:
    e = embedding.clone()
    e[128:] = 0
    return ops.mtp_combine(embedding=e, hidden=hidden, enorm=enorm, hnorm=hnorm, eh_proj=eh_proj, eps=eps)


@fault("all_reduce", "a view that has another dtype for bf16")
def _(x: Tensor, group: Any) -> Tensor:
    return x.half() if x.dtype == torch.bfloat16 else x


@fault("all_reduce", "flushes small numbers")
def _(x: Tensor, group: Any) -> Tensor:
    return torch.where(x.abs() < 2.0**-8, torch.zeros_like(x), x)
