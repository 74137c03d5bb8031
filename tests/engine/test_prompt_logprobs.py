"""Log probabilities of a prompt's own tokens: those of `Model.logits`, whatever else the engine does meanwhile."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import dsv3

PROMPTS = ["Once upon a time there was a little fox who lived in the wood", "The", "There was once a king"]


def wanted(model: dsv3.Model, ids: list[int]) -> list[float]:
    shares = torch.log_softmax(model.logits(ids), dim=-1)
    return [float(shares[n, token]) for n, token in enumerate(ids[1:])]


def check(model: dsv3.Model, found: list[Any], ids: list[list[int]], most: int) -> None:
    for g, prompt in zip(found, ids, strict=True):
        first, *rest = g.prompt_logprobs
        assert first is None and len(g.prompt_logprobs) == len(prompt)
        assert [value for value, _ in rest] == pytest.approx(wanted(model, prompt), abs=1e-9)
        for value, likely in rest:
            assert len(likely) == most and [v for _, v in likely] == sorted((v for _, v in likely), reverse=True)
            assert not likely or value <= likely[0][1]


@pytest.mark.parametrize("drafts", [{}, {"draft": "mtp", "draft_tokens": 3}], ids=["plain", "drafts"])
@pytest.mark.parametrize("engine", [{}, {"budget": 5, "beside": 3}, {"cache_tokens": 192, "most": 3}], ids=str)
def test_they_are_those_of_the_model(small: dsv3.Model, engine: dict[str, int], drafts: dict[str, Any]) -> None:
    made = small.serve_with(**engine)
    plain = small.generate(PROMPTS, max_new_tokens=8, **drafts)
    ids = [small.prompt_ids(p) for p in PROMPTS]
    for most in (0, 3):
        found = small.generate(PROMPTS, max_new_tokens=8, prompt_logprobs=most, **drafts)
        assert [g.ids for g in found] == [g.ids for g in plain] and all(g.stats["cached_tokens"] == 0 for g in found)
        check(small, found, ids, most)
        made.check()
    small.close()


def test_without_new_tokens_only_the_prompt_is_computed(small: dsv3.Model) -> None:
    ids = [small.prompt_ids(p) for p in PROMPTS] + [[5]]
    found = small.generate(ids, max_new_tokens=0, prompt_logprobs=2)
    check(small, found, ids, 2)
    assert all(g.ids == [] and g.text == "" and g.finish_reason == "length" for g in found)
    small.engine.check()
    assert small.engine.pool.free == small.engine.pool.total
    assert small.generate(PROMPTS[0], max_new_tokens=0).prompt_logprobs is None


def test_a_prompt_longer_than_the_rows_taken_at_a_time(small: dsv3.Model) -> None:
    ids = [(7 * n * n + 3) % 4096 for n in range(400)]
    check(small, [small.generate(ids, max_new_tokens=1, prompt_logprobs=1)], [ids], 1)


def test_one_that_is_preempted_starts_over(small: dsv3.Model) -> None:
    """Two prompts in chunks, with room for less than both and what comes after."""
    made = small.serve_with(cache_tokens=320, budget=16, most=2)
    ids = [[(7 * n * n + k) % 4096 for n in range(100)] for k in (1, 2)]
    requests = small.requests(ids, {"max_new_tokens": 90, "prompt_logprobs": 0, "ignore_eos": True})
    made.submit(requests)
    for _ in made.drive(requests):
        made.check()
    assert sum(r.preempted for r in requests) > 0
    check(small, [r.result() for r in requests], ids, 0)
    small.close()


def test_one_that_is_preempted_in_the_middle_of_its_prompt_goes_on_where_it_was(small: dsv3.Model) -> None:
    made = small.serve_with(budget=16)
    ids = [(7 * n * n + 1) % 4096 for n in range(100)]
    (r,) = small.requests([ids], {"max_new_tokens": 3, "prompt_logprobs": 2})
    made.submit([r])
    for steps, _ in enumerate(made.drive([r])):
        if steps in (1, 2, 5):
            assert r.rates_prompt and len(r.prompt_logprobs) > 1
            made.scheduler._preempt(r)
    assert r.preempted == 3
    check(small, [r.result()], [ids], 2)
    small.close()
