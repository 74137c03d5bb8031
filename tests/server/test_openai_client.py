"""The official client's calls: what they return, and that it is what the library itself says."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from openai import NotFoundError, OpenAI

import dsv3
from tests.server.conftest import Running

PROMPT = "Once upon a time"


@pytest.fixture(scope="module")
def client(server: Running) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def wanted(demo_model: dsv3.Model) -> Any:
    """The library's own answer, by a model that no server uses."""
    return dsv3.load("demo", dtype="float32").generate(PROMPT, max_new_tokens=20)


def test_models_are_listed(client: OpenAI) -> None:
    (model,) = client.models.list().data
    assert model.id == "demo" and client.models.retrieve("demo").id == "demo"
    with pytest.raises(NotFoundError, match="does not exist"):
        client.models.retrieve("other")
    with pytest.raises(NotFoundError, match="does not exist"):
        client.completions.create(model="other", prompt="x")


def test_a_completion_is_the_librarys(client: OpenAI, wanted: Any) -> None:
    found = client.completions.create(model="demo", prompt=PROMPT, max_tokens=20, temperature=0)
    assert found.choices[0].text == wanted.text and found.choices[0].finish_reason == wanted.finish_reason
    assert found.usage is not None
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (wanted.stats["prompt_tokens"], 20)
    assert found.object == "text_completion" and found.id.startswith("cmpl-")


@pytest.mark.parametrize("drafts", [0, 2])
def test_a_stream_joins_to_the_whole(client: OpenAI, wanted: Any, drafts: int) -> None:
    chunks = list(
        client.completions.create(
            model="demo", prompt=PROMPT, max_tokens=20, temperature=0, stream=True, stream_options={"include_usage": True},
            extra_body={"draft_tokens": drafts},
        )
    )  # fmt: skip
    assert "".join(c.choices[0].text for c in chunks[:-1]) == wanted.text
    assert len({(c.id, c.created, c.model) for c in chunks}) == 1
    assert [c.choices[0].finish_reason for c in chunks[:-1]].count(None) == len(chunks) - 2
    assert not chunks[-1].choices and chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 20
    assert all(c.usage is None for c in chunks[:-1])
    assert (chunks[-1].usage.model_extra["dsv3"]["accepted"] > 0) == bool(drafts)


def test_many_prompts_and_answers_come_in_order(client: OpenAI) -> None:
    prompts = ["Once upon a time", "The little fox"]
    found = client.completions.create(model="demo", prompt=prompts, n=2, max_tokens=6, temperature=0.9, seed=3)
    assert [c.index for c in found.choices] == [0, 1, 2, 3]
    one = client.completions.create(model="demo", prompt=prompts[1], n=2, max_tokens=6, temperature=0.9, seed=3)
    assert [c.text for c in one.choices] == [c.text for c in found.choices[2:]]
    assert one.choices[0].text != one.choices[1].text


def test_prompts_may_be_token_ids(client: OpenAI, demo_model: dsv3.Model, wanted: Any) -> None:
    ids = demo_model.tokenizer.encode(PROMPT)
    for prompt in (ids, [ids]):
        found = client.completions.create(model="demo", prompt=prompt, max_tokens=20, temperature=0)
        assert found.choices[0].text == wanted.text
    echoed = client.completions.create(model="demo", prompt=PROMPT, max_tokens=20, temperature=0, echo=True)
    assert echoed.choices[0].text == PROMPT + wanted.text


def test_stop_strings_end_and_are_not_shown(client: OpenAI, wanted: Any) -> None:
    word = wanted.text.split()[4]
    for stream in (False, True):
        found = client.completions.create(model="demo", prompt=PROMPT, max_tokens=20, temperature=0, stop=[word], stream=stream)
        parts = list(found) if stream else [found]
        assert "".join(p.choices[0].text for p in parts) == wanted.text[: wanted.text.index(word)]
        assert parts[-1].choices[0].finish_reason == "stop"


def test_log_probabilities_of_completions(client: OpenAI, wanted: Any) -> None:
    found = client.completions.create(model="demo", prompt=PROMPT, max_tokens=20, temperature=0, logprobs=3)
    logprobs = found.choices[0].logprobs
    assert logprobs is not None and len(logprobs.tokens) == 20 and "".join(logprobs.tokens) == wanted.text
    assert all(max(top.values()) == own for top, own in zip(logprobs.top_logprobs, logprobs.token_logprobs, strict=True))
    assert logprobs.text_offset[1] == len(logprobs.tokens[0])
    chunks = list(client.completions.create(model="demo", prompt=PROMPT, max_tokens=20, temperature=0, logprobs=3, stream=True))
    streamed = [t for c in chunks if c.choices[0].logprobs for t in c.choices[0].logprobs.tokens]
    assert streamed == logprobs.tokens


def test_log_probabilities_say_where_tokens_are_also_of_parts_of_characters(client: OpenAI, demo_model: dsv3.Model) -> None:
    tokenizer = demo_model.tokenizer
    assert tokenizer is not None
    parts = tokenizer.encode_literal("🦄")
    assert len(parts) > 1
    bias = {str(i): 100 for i in parts}
    for stop in (None, ["zzz"], ["🦄"]):
        options: Any = {"max_tokens": 24, "temperature": 1.5, "seed": 5, "logprobs": 4, "logit_bias": bias, "stop": stop}
        whole = client.completions.create(model="demo", prompt=PROMPT, **options).choices[0]
        assert whole.logprobs is not None
        chunks = list(client.completions.create(model="demo", prompt=PROMPT, stream=True, **options))
        told = [c.choices[0].logprobs for c in chunks if c.choices and c.choices[0].logprobs]
        for name in ("tokens", "token_logprobs", "text_offset", "top_logprobs"):
            assert [x for part in told for x in getattr(part, name)] == getattr(whole.logprobs, name), name
        assert all(len(top) == 4 for top in whole.logprobs.top_logprobs), "none hides another"
        assert any(t.startswith("bytes:\\x") for t in whole.logprobs.tokens) or stop == ["🦄"]
        assert whole.logprobs.text_offset == sorted(whole.logprobs.text_offset)
        assert max(whole.logprobs.text_offset, default=0) <= len(whole.text)
        assert "".join(c.choices[0].text for c in chunks) == whole.text


def test_an_echoed_prompt_has_log_probabilities_as_harnesses_ask_for_them(client: OpenAI, demo_model: dsv3.Model) -> None:
    assert demo_model.tokenizer is not None
    ids = demo_model.tokenizer.encode("The fox 🦄 said no.")
    shares = torch.log_softmax(demo_model.logits(ids), dim=-1)
    wanted = [float(shares[n, token]) for n, token in enumerate(ids[1:])]
    for prompt, new in ((ids, 1), (ids, 0), ("The fox 🦄 said no.", 4)):
        options: Any = {"prompt": prompt, "echo": True, "logprobs": 2, "max_tokens": new, "temperature": 0}
        whole = client.completions.create(model="demo", **options)
        choice = whole.choices[0]
        rated = choice.logprobs
        assert rated is not None and choice.text.startswith("The fox 🦄 said no.") and whole.usage.completion_tokens == new
        assert len(rated.tokens) == len(rated.text_offset) == len(rated.top_logprobs) == len(ids) + new
        assert rated.token_logprobs[0] is None and rated.top_logprobs[0] is None
        assert rated.token_logprobs[1 : len(ids)] == pytest.approx(wanted, abs=1e-4)
        assert any(token.startswith("bytes:\\x") for token in rated.tokens)
        for token, at in zip(rated.tokens[1:], rated.text_offset[1:], strict=True):
            assert token.startswith("bytes:") or choice.text[at:].startswith(token), (token, at)
        chunks = list(client.completions.create(model="demo", stream=True, **options))
        assert "".join(c.choices[0].text for c in chunks) == choice.text
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            told = [x for c in chunks if c.choices[0].logprobs for x in getattr(c.choices[0].logprobs, name)]
            assert told == getattr(rated, name), name


def test_a_schema_is_kept_to(client: OpenAI) -> None:
    schema = {
        "type": "object", "properties": {"name": {"type": "string", "maxLength": 9}, "age": {"type": "integer", "maximum": 99}},
        "required": ["name", "age"], "additionalProperties": False,
    }  # fmt: skip
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": schema, "strict": True}}
    for extra in ({}, {"draft_tokens": 3}):
        found = client.completions.create(
            model="demo", prompt=PROMPT, max_tokens=300, temperature=0.7, seed=1, extra_body={"response_format": form, **extra}
        )
        person = json.loads(found.choices[0].text)
        assert set(person) == {"name", "age"} and isinstance(person["age"], int) and found.choices[0].finish_reason == "stop"
