"""Models in float64: nothing that the engine does to go faster changes a token. A small one always, the demo where time is."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import dsv3
from dsv3.engine.request import Request, Status
from dsv3.errors import Dsv3Error

PROMPTS = ["Once upon a time", "The little fox", "There was once a king who", "Once upon a time there was a big"]
RULES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"temperature": 0.9, "seed": 5},
    "nucleus": {"temperature": 1.2, "top_p": 0.8, "seed": -3},
    "top_k": {"temperature": 1.2, "top_k": 5, "seed": 4},
    "min_p": {"temperature": 1.5, "min_p": 0.1, "seed": 4},
    "repetition": {"repetition_penalty": 1.3},
    "presence": {"presence_penalty": 1.5, "temperature": 0.7, "seed": 1},
    "frequency": {"frequency_penalty": 0.9},
    "bias": {"logit_bias": {17: 4.0, 300: -100.0}, "temperature": 0.8, "seed": 2},
    "stop": {"stop": ["e w", "the", "\n"], "temperature": 0.8, "seed": 9},
    "regex": {"grammar": ("regex", r" [A-Z][a-z]{2,8}( [a-z]{1,9}){4,12}\."), "temperature": 0.8, "seed": 3},
    "schema": {
        "grammar": (
            "json_schema",
            json.dumps(
                {
                    "type": "object", "required": ["a", "b"], "additionalProperties": False,
                    "properties": {"a": {"type": "string", "maxLength": 8}, "b": {"type": "boolean"}},
                }
            ),
        ),
        "temperature": 0.8,
        "seed": 3,
    },
}  # fmt: skip
TOKENS = 20


@pytest.fixture(scope="module", params=["small", pytest.param("demo", marks=pytest.mark.slow)])
def model(request: pytest.FixtureRequest, small_folder: Path) -> Iterator[dsv3.Model]:
    with dsv3.load(str(small_folder) if request.param == "small" else "demo", dtype="float64") as found:
        yield found


class Alone:
    """What a prompt gives under a rule by itself, in an engine that has seen nothing."""

    def __init__(self, model: dsv3.Model) -> None:
        self.model = model
        self.found: dict[tuple[str, str], tuple[list[int], str, str]] = {}

    def __call__(self, rule: str, prompt: str) -> tuple[list[int], str, str]:
        if (rule, prompt) not in self.found:
            kept, self.model._engine = self.model._engine, None
            self.found[rule, prompt] = seen(self.model.generate(prompt, max_new_tokens=TOKENS, **RULES[rule]))
            self.model.close()
            self.model._engine = kept
        return self.found[rule, prompt]


@pytest.fixture(scope="module")
def alone(model: dsv3.Model) -> Alone:
    return Alone(model)


def test_rejection_sampling_is_greedy_where_there_is_no_chance_and_takes_the_likely_where_there_is(model: dsv3.Model) -> None:
    drafts = {"draft": "mtp", "draft_tokens": 3, "verify": "rejection", "max_new_tokens": TOKENS}
    plain = model.generate(PROMPTS, max_new_tokens=TOKENS)
    assert [g.ids for g in model.generate(PROMPTS, **drafts)] == [g.ids for g in plain]
    first = model.generate(PROMPTS, temperature=0.8, top_k=20, seed=3, **drafts)
    again = [model.generate(p, temperature=0.8, top_k=20, seed=3, **drafts) for p in PROMPTS]
    assert [g.ids for g in first] == [g.ids for g in again], "noise has no state"
    assert sum(g.stats["accepted"] for g in first) > 0
    model.engine.check()


class Costly:
    """A grammar that allows some tokens and then cannot go on."""

    finished = False

    def __init__(self, after: int, where: str) -> None:
        self.left, self.where = after, where

    def _fail(self, where: str) -> None:
        if self.left <= 0 and where == self.where:
            raise Dsv3Error("the grammar failed: too costly")

    def accept(self, token: int) -> None:
        self.left -= 1
        self._fail("accept")

    def masks(self, drafts: Any) -> list[torch.Tensor]:
        self._fail("masks")
        return [torch.ones(4096, dtype=torch.bool)] * (len(drafts) + 1)


@pytest.mark.parametrize("where", ["accept", "masks"])
@pytest.mark.parametrize("drafts", [0, 2])
def test_a_grammar_that_fails_ends_its_request_alone(model: dsv3.Model, where: str, drafts: int) -> None:
    extra = {"draft": "mtp", "draft_tokens": drafts} if drafts else {}
    wanted = model.generate(PROMPTS[0], max_new_tokens=TOKENS)
    good, bad = model.requests(PROMPTS[:2], {"max_new_tokens": TOKENS, **extra})
    bad.grammar = Costly(5, where)
    engine = model.engine
    engine.submit([good, bad])
    for _ in engine.drive([good, bad]):
        engine.check()
    assert bad.status is Status.ABORTED and "too costly" in str(bad.error)
    assert seen(good.result()) == seen(wanted)


def seen(g: Any) -> tuple[list[int], str, str]:
    return g.ids, g.text, g.finish_reason


@pytest.mark.parametrize("drafts", [0, 1, 3])
@pytest.mark.parametrize("rule", RULES)
def test_batched_with_and_without_drafts_is_alone(model: dsv3.Model, alone: Alone, rule: str, drafts: int) -> None:
    extra = {"draft": "mtp", "draft_tokens": drafts} if drafts else {}
    found = model.generate(PROMPTS, max_new_tokens=TOKENS, **RULES[rule], **extra)
    assert [seen(g) for g in found] == [alone(rule, p) for p in PROMPTS]
    model.engine.check()


def test_drafts_are_often_right(model: dsv3.Model) -> None:
    """Else the tests here would say little of them."""
    found = model.generate(PROMPTS, max_new_tokens=TOKENS, draft="mtp", draft_tokens=3, ignore_eos=True)
    drafted, accepted = (sum(g.stats[name] for g in found) for name in ("drafted", "accepted"))
    assert 0.2 * drafted < accepted < 0.98 * drafted


@pytest.mark.parametrize("drafts", [0, 2])
def test_chunks_preemption_and_sharing_change_nothing(model: dsv3.Model, drafts: int) -> None:
    extra = {"draft": "mtp", "draft_tokens": drafts} if drafts else {}
    long = [p * 8 for p in PROMPTS]
    before = [g.ids for g in model.generate(long, max_new_tokens=TOKENS)]
    for budget, beside, most in ((24, 7, 4), (2048, 256, 32)):
        engine = model.serve_with(cache_tokens=64 * 4, budget=budget, beside=beside, most=most)
        for _ in range(2):  # the second time beginnings are shared
            assert [g.ids for g in model.generate(long, max_new_tokens=TOKENS, **extra)] == before
        engine.check()
    model.close()


def test_text_ids_and_log_probabilities_say_the_same(model: dsv3.Model) -> None:
    for rule in ("greedy", "stop", "sampled"):
        for drafts in ({}, {"draft": "mtp", "draft_tokens": 3}):
            for g in model.generate(PROMPTS, max_new_tokens=TOKENS, logprobs=2, **RULES[rule], **drafts):
                assert g.logprobs is not None and len(g.logprobs) == len(g.ids)
                if rule == "greedy":
                    assert [most[0][0] for _, most in g.logprobs] == g.ids
                    assert all(own == most[0][1] for own, most in g.logprobs)
    model.close()


def test_events_are_the_tokens_and_their_text(model: dsv3.Model) -> None:
    """What streams are made of: every token once, its text held back only while it may begin a stop string."""
    for rule in ("greedy", "stop"):
        (r,) = model.requests([PROMPTS[0]], {"max_new_tokens": TOKENS, **RULES[rule]})
        model.engine.submit([r])
        events = []
        for _ in model.engine.drive([r]):
            events += r.take_events()
        found = r.result()
        assert "".join(text for _, text in events) == found.text
        tokens = [token for token, _ in events if token >= 0]
        assert tokens[: len(found.ids)] == found.ids and len(tokens) <= len(found.ids) + 1


def drawn(model: dsv3.Model, rng: random.Random, rules: list[str]) -> tuple[list[Request], list[int | None]]:
    names = rng.choices(rules, k=rng.randint(1, 4))
    requests, aborts = [], []
    for name in names:
        drafts = rng.randint(0, 3)
        extra = {"draft": "mtp", "draft_tokens": drafts} if drafts else {}
        options = {"max_new_tokens": TOKENS, **RULES[name], **extra}
        (request,) = model.requests([rng.choice(PROMPTS)], options)
        request.name = name  # type: ignore[attr-defined]
        requests.append(request)
        aborts.append(rng.randint(0, 20) if rng.random() < 0.2 else None)
    return requests, aborts


def check_schedule(model: dsv3.Model, alone: Alone, seed: int, names: list[str]) -> None:
    """One drawn schedule: arrivals, aborts, budgets and a cache that is too small, over an engine that keeps what it knows."""
    rng = random.Random(seed)
    if seed % 8 == 0:
        model.serve_with(
            cache_tokens=64 * rng.randint(2, 6), budget=rng.choice([3, 8, 64, 2048]), beside=rng.choice([2, 8, 256]),
            most=rng.randint(1, 4),
        )  # fmt: skip
    engine = model.engine
    requests, aborts = drawn(model, rng, names)
    arrivals = [rng.randint(0, 12) for _ in requests]
    now = 0
    while any(not r.done for r in requests):
        engine.submit([r for r, at in zip(requests, arrivals, strict=True) if at == now])
        engine.abort([r for r, at in zip(requests, aborts, strict=True) if at == now and not r.done])
        engine.step()
        engine.check()
        now += 1
        assert now < 2000
    for r in requests:
        wanted = alone(r.name, model.tokenizer.decode(r.prompt))  # type: ignore[attr-defined]
        assert r.error is None
        if r.status is Status.ABORTED:
            assert r.ids == wanted[0][: len(r.ids)]
        else:
            assert seen(r.result()) == wanted


def test_drawn_schedules(model: dsv3.Model, alone: Alone) -> None:
    for seed in range(40):
        check_schedule(model, alone, seed, list(RULES))
    model.close()


@pytest.mark.slow
@pytest.mark.timeout(14400)
def test_two_thousand_drawn_schedules(model: dsv3.Model, alone: Alone) -> None:
    """SCHEDULES=N in the environment draws another number, FIRST_SCHEDULE=M begins at the M-th: the demo takes seconds for
    each."""
    for seed in range(int(os.environ.get("FIRST_SCHEDULE", "0")), int(os.environ.get("SCHEDULES", "2000"))):
        check_schedule(model, alone, 1000 + seed, list(RULES))
    model.close()
