"""The law of the sampler, with and without drafts, against the probabilities themselves."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from dsv3 import ops
from dsv3.engine.options import check_options
from dsv3.engine.request import Request
from dsv3.engine.sample import Row, accepted, processed
from dsv3.errors import UsageError

V, DRAWS = 50, 40_000
TARGET = torch.randn(V, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 1.5
DRAFT = TARGET + 0.8 * torch.randn(V, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def request(seed: int = 0, prompt: list[int] | None = None, **options: Any) -> Request:
    return Request(prompt or [1], check_options(**options), seed, 100, frozenset(), None)


def distance(counts: torch.Tensor, p: torch.Tensor) -> float:
    """Total variation."""
    return float((counts / counts.sum() - p).abs().sum() / 2)


def draw(logits: torch.Tensor, temperature: float, salt: int) -> torch.Tensor:
    seeds = torch.arange(DRAWS, dtype=torch.int64) + salt
    rows = logits.expand(DRAWS, V)
    out = [
        ops.gumbel_argmax(
            logits=part, seeds=seed, positions=torch.full((len(seed),), 7), temperature=torch.full((len(seed),), t)
        )
        for part, seed, t in zip(rows.split(5000), seeds.split(5000), [temperature] * 99, strict=False)
    ]
    return torch.cat(out).to(torch.int64)


def test_draws_have_the_models_law() -> None:
    floor = math.sqrt(V / DRAWS)
    for temperature in (0.7, 1.0, 1.6):
        p = torch.softmax(TARGET / temperature, -1)
        assert distance(torch.bincount(draw(TARGET, temperature, 0), minlength=V).double(), p) < floor
        assert distance(torch.bincount(draw(DRAFT, temperature, 0), minlength=V).double(), p) > 3 * floor


def test_rejection_has_the_models_law_and_accepts_what_it_can() -> None:
    temperature, count = 1.0, 3000
    drafts = draw(DRAFT, temperature, 0)[:count].tolist()
    found, taken = [], 0
    for seed, token in enumerate(drafts):
        instead = accepted(TARGET, DRAFT, token, request(seed, temperature=temperature, verify="rejection"), 7)
        taken += instead is None
        found.append(token if instead is None else instead)
    p, q = torch.softmax(TARGET, -1), torch.softmax(DRAFT, -1)
    assert distance(torch.bincount(torch.tensor(found), minlength=V).double(), p) < math.sqrt(V / count)
    assert abs(taken / count - float(torch.minimum(p, q).sum())) < 0.03


def test_shared_noise_accepts_almost_as_much() -> None:
    both = draw(TARGET, 1.0, 0) == draw(DRAFT, 1.0, 0)
    bound = float(torch.minimum(torch.softmax(TARGET, -1), torch.softmax(DRAFT, -1)).sum())
    assert 0.75 * bound < float(both.double().mean()) <= bound + 0.01


def row(ahead: list[int] | None = None, **options: Any) -> Row:
    r = request(prompt=[1, 2, 2], **options)
    r.tokens += [3, 3, 4]
    return Row(r, ahead or [], 6)


def test_penalties_count_new_tokens_and_the_drafts_before() -> None:
    logits = TARGET[None].clone()
    found = processed(logits, [row([4, 5], presence_penalty=0.5, frequency_penalty=0.25)])[0]
    wanted = TARGET.clone()
    for token, count in ((3, 2), (4, 2), (5, 1)):
        wanted[token] -= 0.5 + 0.25 * count
    assert torch.equal(found, wanted) and torch.equal(logits[0], TARGET)
    found = processed(logits, [row([5], repetition_penalty=1.5)])[0]
    wanted = TARGET.clone()
    for token in (1, 2, 3, 4, 5):
        wanted[token] = wanted[token] / 1.5 if wanted[token] > 0 else wanted[token] * 1.5
    assert torch.equal(found, wanted)


def test_bias_and_grammar() -> None:
    allowed = torch.zeros(V, dtype=torch.bool)
    allowed[[3, 9]] = True
    r = row(logit_bias={9: 3.5, 11: 2.0})
    found = processed(TARGET[None], [r._replace(allowed=allowed)])[0]
    assert found[9] == TARGET[9] + 3.5 and found[3] == TARGET[3]
    assert torch.isneginf(found).sum() == V - 2


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_truncation_keeps_what_it_says(temperature: float) -> None:
    p = torch.softmax(TARGET / temperature, -1)
    ordered = p.sort(descending=True).values

    def kept(**options: Any) -> torch.Tensor:
        out = processed(TARGET[None], [row(temperature=temperature, **options)])[0]
        keep = ~torch.isneginf(out)
        assert torch.equal(out[keep], TARGET[keep])
        assert float(p[keep].min()) >= float(p[~keep].max())
        return keep

    assert int(kept(top_k=7).sum()) == 7
    count = int(kept(top_p=0.6).sum())
    assert float(ordered[:count].sum()) >= 0.6 > float(ordered[: count - 1].sum())
    assert torch.equal(kept(min_p=0.2), p >= 0.2 * p.max())
    assert int(kept(top_k=1, top_p=0.01, min_p=1.0).sum()) == 1


def test_rows_do_not_touch_each_other() -> None:
    rows = [row(), row(top_k=3, temperature=1.0), row(presence_penalty=1.0)]
    together = processed(TARGET.expand(3, V), rows)
    for n, r in enumerate(rows):
        assert torch.equal(together[n], processed(TARGET[None], [r])[0])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"temperature": float("nan")}, "temperature is nan"), ({"top_p": 0}, "top_p is 0"), ({"min_p": 1.5}, "min_p is 1.5"),
        ({"top_k": -1}, "top_k is -1"), ({"presence_penalty": 2.5}, "presence_penalty"), ({"draft": "x"}, "draft is 'x'"),
        ({"draft_tokens": 9}, "draft_tokens is 9"), ({"logprobs": 21}, "logprobs is 21"), ({"verify": "no"}, "verify is 'no'"),
        ({"logit_bias": {-1: 0.0}}, "logit_bias"), ({"grammar": "x"}, "grammar is 'x'"),
        ({"max_new_tokens": 1.5}, "max_new_tokens"),
        ({"grammar": ("regex", "a"), "ignore_eos": True}, "ignore_eos"), ({"topk": 1}, "'topk' is no option"),
        ({"logit_bias": [5]}, "logit_bias"), ({"logit_bias": 5}, "logit_bias"), ({"logit_bias": {5: "x"}}, "logit_bias"),
        ({"logit_bias": [([1], 2)]}, "logit_bias is"),
    ],
)  # fmt: skip
def test_wrong_options_are_named(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        check_options(**options)


def test_numbers_may_be_numpys() -> None:
    numbers = {"temperature": np.float32(0.5), "top_k": np.int64(3), "min_p": np.float64(0), "seed": np.int8(1)}
    found = check_options(**numbers, logit_bias={np.int32(4): np.float16(2)})
    assert found == check_options(temperature=0.5, top_k=3, min_p=0, logit_bias={4: 2}, seed=1)
    with pytest.raises(UsageError, match="temperature"):
        check_options(temperature=np.float32("nan"))
