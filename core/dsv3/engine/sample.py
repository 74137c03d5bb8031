"""From logits to the logits that a token is drawn from, and which drafts are accepted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dsv3.engine.request import Request, TokenLogprobs
from dsv3.ops.sampling import philox

# Added to seeds for draws that must not share their noise with the token's own.
_ACCEPTING, _RESIDUAL = 0x5851F42D4C957F2D, 0x14057B7EF767814F
_WORD = (1 << 64) - 1


class Row(NamedTuple):
    """A row of logits: whose, which drafts were fed before it, the position of the token that is drawn, and what the request's
    grammar allows there (bool [V]), if it has one."""

    request: Request
    ahead: Sequence[int]
    position: int
    allowed: Tensor | None = None


def processed(logits: Tensor, rows: Sequence[Row]) -> Tensor:
    """Logits [R, V] after bias, penalties, grammar and truncation, see `Sampling`; the same tensor where there are none."""
    if not any(
        r.request.sampling.penalised or r.request.sampling.logit_bias or r.request.sampling.truncated or r.allowed is not None
        for r in rows
    ):
        return logits
    out = logits.to(torch.promote_types(logits.dtype, torch.float32), copy=True)
    for values, row in zip(out, rows, strict=True):
        s = row.request.sampling
        if s.logit_bias:
            ids, biases = zip(*s.logit_bias, strict=True)
            values.index_add_(0, _index(ids, out), torch.tensor(biases, dtype=out.dtype, device=out.device))
        if s.penalised:
            _penalise(values, row)
        if row.allowed is not None:
            values.masked_fill_(~row.allowed.to(out.device), float("-inf"))
    cut = [n for n, row in enumerate(rows) if row.request.sampling.truncated]
    if cut:
        which = _index(cut, out)
        out[which] = _truncated(out[which], [rows[n].request for n in cut])
    return out


def _index(ids: Sequence[int], like: Tensor) -> Tensor:
    return torch.tensor(ids, dtype=torch.int64, device=like.device)


def _penalise(values: Tensor, row: Row) -> None:
    r, s = row.request, row.request.sampling
    new = Counter(r.tokens[len(r.prompt) :])
    new.update(row.ahead)
    if s.repetition_penalty != 1:
        seen = _index(sorted({*r.prompt, *new}), values)
        found = values[seen]
        values[seen] = torch.where(found > 0, found / s.repetition_penalty, found * s.repetition_penalty)
    if new and (s.presence_penalty or s.frequency_penalty):
        counts = torch.tensor(list(new.values()), dtype=values.dtype, device=values.device)
        values.index_add_(0, _index(list(new), values), -(s.presence_penalty + s.frequency_penalty * counts))


def _truncated(logits: Tensor, requests: Sequence[Request]) -> Tensor:
    """Unlikely tokens at -inf: all but the top_k likeliest; of these, all but the fewest that have top_p of their probability;
    and those with less than min_p of the likeliest one's."""

    def column(name: str) -> Tensor:
        return torch.tensor([getattr(r.sampling, name) for r in requests], dtype=torch.float64, device=logits.device)[:, None]

    scaled = logits.to(torch.float64) / column("temperature")
    ordered, order = torch.sort(scaled, dim=-1, descending=True, stable=True)
    rank = torch.arange(logits.shape[1], device=logits.device)[None]
    k = column("top_k")
    drop = (k > 0) & (rank >= k)
    shares = torch.softmax(ordered.masked_fill(drop, float("-inf")), dim=-1)
    drop |= shares.cumsum(dim=-1) - shares >= column("top_p")
    drop |= shares < column("min_p") * shares[:, :1]
    drop[:, 0] = False
    return logits.masked_fill(torch.zeros_like(drop).scatter_(1, order, drop), float("-inf"))


def logprobs_of(logits: Tensor, chosen: Sequence[int], counts: Sequence[int | None]) -> list[TokenLogprobs | None]:
    """Of each row's chosen id, and of so many likeliest ones, under the model's own logits."""
    wanted = [n for n, count in enumerate(counts) if count is not None]
    found: list[TokenLogprobs | None] = [None] * len(chosen)
    if not wanted:
        return found
    rows = logits[_index(wanted, logits)]
    shares = torch.log_softmax(rows.to(torch.promote_types(rows.dtype, torch.float32)), dim=-1)
    most = max(counts[n] or 0 for n in wanted)
    values, ids = shares.topk(min(most, shares.shape[1]), dim=-1) if most else (shares[:, :0], shares[:, :0])
    own = shares.gather(1, _index([chosen[n] for n in wanted], logits)[:, None])[:, 0].tolist()
    for n, value, some, which in zip(wanted, own, values.tolist(), ids.tolist(), strict=True):
        found[n] = value, [(int(i), v) for i, v in zip(which, some, strict=True)][: counts[n]]
    return found


def signed(seed: int) -> int:
    """Any integer as the signed 64 bits that a tensor holds."""
    low = int(seed) & _WORD
    return low - (1 << 64) if low >> 63 else low


def uniform(seed: int, position: int) -> float:
    """A number between 0 and 1 for the acceptance of the draft at a position."""
    key = torch.tensor(signed(seed + _ACCEPTING), dtype=torch.int64)
    return (float(philox(torch.tensor(0), torch.tensor(position), key)) + 0.5) * 2.0**-32


def accepted(target: Tensor, draft: Tensor, token: int, request: Request, position: int) -> int | None:
    """Rejection sampling of one drafted token: None if it is accepted, else the token that comes instead.

    target, draft [V]: processed logits. Accepted with probability min(1, p / q); else a draw from max(0, p - q), normalised.
    Source: Leviathan et al. 2023, Chen et al. 2023.
    """
    temperature = request.sampling.temperature
    if temperature == 0:
        best = int(target.argmax())
        return None if best == token else best
    p, q = (torch.softmax(v.to(torch.float64) / temperature, dim=-1) for v in (target, draft))
    if uniform(request.seed, position) * q[token] < p[token]:
        return None
    rest = (p - q).clamp_min_(0).cpu()
    if not bool(rest.any()):  # p is q but for rounding
        rest = p.cpu()
    word = philox(torch.arange(rest.shape[0]), torch.tensor(position), torch.tensor(signed(request.seed + _RESIDUAL)))
    noise = -torch.log(-torch.log((word.to(torch.float64) + 0.5) * 2.0**-32))
    return int((torch.log(rest) + noise).argmax())
