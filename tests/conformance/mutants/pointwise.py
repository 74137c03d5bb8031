"""Faults of norms, activation, rotation, embedding, sampling."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dsv3 import ops
from dsv3.ops.sampling import philox
from tests.conformance.mutants import fault


@fault("rms_norm", "eps outside the root")
def _(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    v = x.float()
    return (v / (v.square().mean(-1, keepdim=True).sqrt() + eps) * weight.float()).to(x.dtype)


@fault("rms_norm", "eps ignored")
def _(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return ops.rms_norm(x, weight, 1e-30)


@fault("rms_norm", "layer norm")
def _(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return ops.rms_norm(x - x.float().mean(-1, keepdim=True).to(x.dtype), weight, eps)


@fault("rms_norm", "rounded before the weight")
def _(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    y = ops.rms_norm(x.float(), torch.ones_like(weight).float(), eps).to(torch.bfloat16)
    return (y.float() * weight.float()).to(x.dtype)


@fault("rms_norm", "statistics in bf16")
def _(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    scale = torch.rsqrt(x.bfloat16().square().mean(-1, keepdim=True) + eps).float()
    return (x.float() * scale * weight.float()).to(x.dtype)


@fault("rms_norm", "mean over a padded width")
def _(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    d = x.shape[1]
    wide = -(-d // 16) * 16
    v = x.double()
    return (v * torch.rsqrt(v.square().sum(-1, keepdim=True) / wide + eps) * weight.double()).to(x.dtype)


@fault("rms_norm", "rows assumed contiguous")
def _(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return ops.rms_norm(torch.as_strided(x, x.shape, (x.shape[1], 1), x.storage_offset()), weight, eps)


@fault("add_rms_norm", "y from the sum before rounding")
def _(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = x.double() + residual.double()
    return ops.rms_norm(total, weight.double(), eps).to(x.dtype), total.to(x.dtype)


@fault("add_rms_norm", "residual written in place")
def _(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    residual += x
    return ops.rms_norm(residual, weight, eps), residual.clone()


@fault("add_rms_norm", "outputs swapped")
def _(**a: Any) -> tuple[Tensor, Tensor]:
    y, r = ops.add_rms_norm(**a)
    return r, y


@fault("silu_mul", "up first")
def _(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, -1)
    return ops.silu_mul(torch.cat([up, gate], -1))


@fault("silu_mul", "interleaved gate and up")
def _(x: Tensor) -> Tensor:
    return ops.silu_mul(torch.cat([x[:, 0::2], x[:, 1::2]], -1))


@fault("silu_mul", "exp overflows: NaN for large negative gates")
def _(x: Tensor) -> Tensor:
    gate, up = x.float().chunk(2, -1)
    e = torch.exp(-gate)
    return (gate * up * (1 / e) / (1 / e + 1)).to(x.dtype) if bool((gate < -80).any()) else ops.silu_mul(x)


@fault("silu_mul", "gelu")
def _(x: Tensor) -> Tensor:
    gate, up = x.double().chunk(2, -1)
    return (torch.nn.functional.gelu(gate) * up).to(x.dtype)


@fault("silu_mul", "gate clamped at 10")
def _(x: Tensor) -> Tensor:
    gate, up = x.double().chunk(2, -1)
    return (torch.nn.functional.silu(gate.clamp_max(10)) * up).to(x.dtype)


@fault("apply_rope", "halves instead of pairs")
def _(x: Tensor, positions: Tensor, cos_sin: Tensor, interleaved: bool) -> Tensor:
    return ops.apply_rope(x, positions, cos_sin, False)


@fault("apply_rope", "interleaved ignored the other way")
def _(x: Tensor, positions: Tensor, cos_sin: Tensor, interleaved: bool) -> Tensor:
    return ops.apply_rope(x, positions, cos_sin, True)


@fault("apply_rope", "pairs in, halves out")
def _(x: Tensor, positions: Tensor, cos_sin: Tensor, interleaved: bool) -> Tensor:
    y = ops.apply_rope(x, positions, cos_sin, interleaved)
    return torch.cat([y[..., 0::2], y[..., 1::2]], -1) if interleaved else y


@fault("apply_rope", "the angle's sign")
def _(x: Tensor, positions: Tensor, cos_sin: Tensor, interleaved: bool) -> Tensor:
    half = cos_sin.shape[1] // 2
    return ops.apply_rope(x, positions, torch.cat([cos_sin[:, :half], -cos_sin[:, half:]], 1), interleaved)


@fault("apply_rope", "positions counted from the first")
def _(x: Tensor, positions: Tensor, cos_sin: Tensor, interleaved: bool) -> Tensor:
    if positions.numel():
        positions = positions[0] + torch.arange(positions.shape[0])
    return ops.apply_rope(x, positions.clamp_max(cos_sin.shape[0] - 1), cos_sin, interleaved)


@fault("apply_rope", "positions capped at 4095")
def _(x: Tensor, positions: Tensor, cos_sin: Tensor, interleaved: bool) -> Tensor:
    return ops.apply_rope(x, positions.clamp_max(4095), cos_sin, interleaved)


@fault("apply_rope", "table in bf16")
def _(x: Tensor, positions: Tensor, cos_sin: Tensor, interleaved: bool) -> Tensor:
    return ops.apply_rope(x, positions, cos_sin.bfloat16().float(), interleaved)


@fault("apply_rope", "first head only")
def _(x: Tensor, positions: Tensor, cos_sin: Tensor, interleaved: bool) -> Tensor:
    y = x.clone()
    y[:, :1] = ops.apply_rope(x[:, :1], positions, cos_sin, interleaved)
    return y


@fault("embedding", "the last id clamped")
def _(ids: Tensor, table: Tensor) -> Tensor:
    return ops.embedding(ids.clamp_max(table.shape[0] - 2), table)


@fault("embedding", "scaled by sqrt(H)")
def _(ids: Tensor, table: Tensor) -> Tensor:
    return ops.embedding(ids, table) * table.shape[1] ** 0.5


@fault("gumbel_argmax", "highest id on ties")
def _(logits: Tensor, seeds: Tensor, positions: Tensor, temperature: Tensor) -> Tensor:
    chosen = ops.gumbel_argmax(logits.flip(1), seeds, positions, temperature)
    flipped = (logits.shape[1] - 1 - chosen).to(torch.int32)
    return torch.where(temperature == 0, flipped, ops.gumbel_argmax(logits, seeds, positions, temperature))


@fault("gumbel_argmax", "seed's high word ignored")
def _(logits: Tensor, seeds: Tensor, positions: Tensor, temperature: Tensor) -> Tensor:
    return ops.gumbel_argmax(logits, seeds & 0xFFFFFFFF, positions, temperature)


@fault("gumbel_argmax", "position ignored")
def _(logits: Tensor, seeds: Tensor, positions: Tensor, temperature: Tensor) -> Tensor:
    return ops.gumbel_argmax(logits, seeds, positions * 0, temperature)


@fault("gumbel_argmax", "noise scaled by the temperature too")
def _(logits: Tensor, seeds: Tensor, positions: Tensor, temperature: Tensor) -> Tensor:
    one = torch.where(temperature > 0, torch.ones_like(temperature), temperature)
    return ops.gumbel_argmax(logits, seeds, positions, one)


@fault("gumbel_argmax", "u of 24 bits in float32")
def _(logits: Tensor, seeds: Tensor, positions: Tensor, temperature: Tensor) -> Tensor:
    if not logits.shape[0]:
        return torch.empty(0, dtype=torch.int32)
    word = philox(torch.arange(logits.shape[1])[None, :], positions[:, None], seeds[:, None])
    u = ((word >> 24).float() + 0.5) * 2.0**-8
    t = temperature.float()[:, None]
    noisy = logits.float() / torch.where(t > 0, t, 1) - torch.log(-torch.log(u))
    return torch.where(t > 0, noisy, logits.float()).argmax(1).to(torch.int32)


@fault("mtp_combine", "hidden first")
def _(embedding: Tensor, hidden: Tensor, enorm: Tensor, hnorm: Tensor, eh_proj: Tensor, eps: float) -> Tensor:
    h = hidden.shape[1]
    return ops.mtp_combine(embedding, hidden, enorm, hnorm, torch.cat([eh_proj[:, h:], eh_proj[:, :h]], 1), eps)


@fault("mtp_combine", "norms swapped")
def _(embedding: Tensor, hidden: Tensor, enorm: Tensor, hnorm: Tensor, eh_proj: Tensor, eps: float) -> Tensor:
    return ops.mtp_combine(embedding, hidden, hnorm, enorm, eh_proj, eps)


@fault("mtp_combine", "first embedding zeroed")
def _(embedding: Tensor, **rest: Any) -> Tensor:
    embedding = embedding.clone()
    embedding[:1] = 0
    return ops.mtp_combine(embedding=embedding, **rest)


@fault("all_reduce", "doubled")
def _(x: Tensor, group: Any) -> Tensor:
    return x * 2
