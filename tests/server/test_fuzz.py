"""Whatever a client sends: no 5xx, no death, and another's stream is what it would have been."""

from __future__ import annotations

import copy
import json
import random
import threading
from collections.abc import Iterator
from typing import Any

import pytest

import dsv3
from tests.server.conftest import Running
from tests.server.test_limits import ask, post

BYSTANDER = {"prompt": "The little fox", "max_tokens": 40, "temperature": 0.9, "seed": 7, "ignore_eos": True}
Body = tuple[str, dict[str, Any]]
BODIES: list[Body] = [
    ("/v1/completions", {"prompt": "Once", "max_tokens": 3, "temperature": 0.5, "stop": ["a"], "logit_bias": {"5": 1}, "n": 2}),
    (
        "/v1/chat/completions",
        {
            "messages": [{"role": "system", "content": "x"}, {"role": "user", "content": [{"type": "text", "text": "Hi"}]}],
            "max_tokens": 3, "logprobs": True, "top_logprobs": 2, "stream": True, "stream_options": {"include_usage": True},
        },
    ),
    (
        "/v1/completions",
        {
            "prompt": [1, 2, 3], "max_tokens": 2,
            "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "integer"}}},
        },
    ),
    ("/v1/tokenize", {"prompt": "Once"}),
    ("/v1/detokenize", {"tokens": [1, 2, 3]}),
]  # fmt: skip
PARAMETERS: dict[str, Any] = {
    "type": "object", "required": ["city"], "additionalProperties": False, "$defs": {"n": {"type": "integer", "maximum": 9}},
    "properties": {"city": {"type": "string", "maxLength": 3}, "n": {"$ref": "#/$defs/n"}, "unit": {"enum": ["C", 1]}},
}  # fmt: skip
TOOL = {"type": "function", "function": {"name": "weather", "description": "x", "parameters": PARAMETERS}}
ASKED = {"id": "a", "type": "function", "function": {"name": "weather", "arguments": '{"city": "x", "n": [1, {"a": null}]}'}}
CONVERSATIONS: list[Body] = [
    (
        "/v1/chat/completions",
        {
            "messages": [{"role": "user", "content": "a"}], "tools": [TOOL], "tool_choice": choice, "max_tokens": 80,
            "stream": choice == "required", "logprobs": True, "stop": ["x"],
        },
    )
    for choice in ("required", "auto", {"type": "function", "function": {"name": "weather"}})
] + [
    (
        "/v1/chat/completions",
        {
            "messages": [
                {"role": "user", "content": "a"}, {"role": "assistant", "content": None, "tool_calls": [ASKED]},
                {"role": "tool", "tool_call_id": "a", "content": "b"}, {"role": "assistant", "content": "c", "refusal": None},
                {"role": "user", "content": [{"type": "text", "text": "d"}]},
            ],
            "tools": [TOOL], "max_tokens": 2, "thinking": False,
        },
    )
]  # fmt: skip
SCHEMAS: list[Any] = [
    {"type": "nope"}, {"$ref": "#/$defs/none"}, {"$ref": "#"}, {"anyOf": [{"type": "integer"}, {}]}, {"allOf": []}, {"not": {}},
    {"enum": []}, {"const": {"a": [1]}}, {"type": ["string", "null"]}, {"pattern": "("}, {"pattern": "(a{1000}){1000}"},
    {"minimum": 3, "maximum": 1, "type": "integer"}, {"minLength": 1 << 40}, {"properties": {"a\"\n<b>": {}}}, {"items": False},
    {"properties": {"": True, "a": False}, "required": ["", "a"]}, {"format": "date", "type": "string"}, {"multipleOf": 0},
    {"x-guidance": {"whitespace_pattern": "("}},
    {"type": "object", "required": ["q"], "additionalProperties": {"enum": ["</"]}},
]  # fmt: skip
ODD: list[Any] = [
    None, True, -1, 0, 1, 1 << 70, 1e308, -0.5, "", "a", "\x00", "<｜User｜>", "é\U0001f600", [], {}, [[]], [None], {"a": {}},
    "x" * 3000, [0] * 300, ["\ud800"],
]  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path] if path else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        found += places(inner, (*path, key))
    return found


def mutated(rng: random.Random, bodies: list[Body], odd: list[Any]) -> tuple[str, bytes]:
    path, body = copy.deepcopy(rng.choice(bodies))
    for _ in range(rng.randint(1, 3)):
        *way, last = rng.choice(places(body))
        inner: Any = body
        for key in way:
            inner = inner[key]
        kind = rng.random()
        if kind < 0.7:
            inner[last] = copy.deepcopy(rng.choice(odd))
        elif kind < 0.85 and isinstance(inner, dict):
            inner[rng.choice(["x", "model", "n", "stream", "tools", "seed", "$ref", "anyOf"])] = copy.deepcopy(rng.choice(odd))
        else:
            del inner[last]
        if not body:
            break
    data = json.dumps(body).encode("utf-8", "surrogatepass")
    if rng.random() < 0.2 and data:
        at = rng.randrange(len(data))
        data = data[:at] + bytes([rng.randrange(256)]) + data[at + rng.randint(0, 3) :]
    return path, data


def fuzz(server: Running, count: int, seed: int, bodies: list[Body] = BODIES, odd: list[Any] = ODD) -> None:
    wanted = post(server, "/v1/completions", BYSTANDER)[1]["choices"][0]["text"]
    seen: list[str] = []
    stop = threading.Event()

    def stand_by() -> None:
        while not stop.is_set():
            seen.append(post(server, "/v1/completions", BYSTANDER)[1]["choices"][0]["text"])

    bystander = threading.Thread(target=stand_by)
    bystander.start()
    rng, codes = random.Random(seed), set()
    try:
        for _ in range(count):
            path, data = mutated(rng, bodies, odd)
            status, body = post(server, path, data)
            codes.add(status)
            assert status < 500, (path, data[:500], body)
            assert status == 200 or set(body["error"]) == {"message", "type", "param", "code"}, (data[:300], body)
            for choice in body.get("choices", []) if isinstance(body, dict) else []:
                if choice["finish_reason"] == "tool_calls":
                    calls = choice["message"]["tool_calls"]
                    assert calls and all(isinstance(json.loads(c["function"]["arguments"]), dict) for c in calls), (data, body)
    finally:
        stop.set()
        bystander.join()
    assert codes >= {200, 400} and seen and set(seen) == {wanted}
    assert ask(server.port, "GET", "/health/ready")[0] == 200
    server.service.engine.check()


def test_mutated_bodies(server: Running) -> None:
    fuzz(server, 200, 1)


@pytest.fixture(params=["deepseek_v3", "deepseek_v31", "deepseek_v32"])
def talking(request: pytest.FixtureRequest, deepseek_model: dsv3.Model) -> Iterator[Running]:
    deepseek_model.chat_family, deepseek_model._chat = request.param, None
    running = Running(deepseek_model)
    yield running
    running.stop()


def test_mutated_conversations_with_tools(talking: Running) -> None:
    fuzz(talking, 40, 3, CONVERSATIONS, ODD + SCHEMAS)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_thousand_mutated_conversations_with_tools(talking: Running) -> None:
    fuzz(talking, 340, 4, CONVERSATIONS, ODD + SCHEMAS)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_thousand_mutated_bodies(server: Running) -> None:
    fuzz(server, 1000, 2)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_thousand_generated_cases(server: Running) -> None:
    """schemathesis, over the server's own OpenAPI document."""
    import schemathesis
    from hypothesis import HealthCheck, given, settings

    counted = 0
    rules = settings(max_examples=260, deadline=None, suppress_health_check=list(HealthCheck), database=None, derandomize=True)
    for operation in schemathesis.openapi.from_url(f"{server.url}/openapi.json").get_all_operations():

        @rules
        @given(case=operation.ok().as_strategy())
        def check(case: Any) -> None:
            nonlocal counted
            response = case.call(timeout=60)
            counted += 1
            assert response.status_code < 500, (case.path, case.body, response.text[:500])

        check()
    assert counted >= 1000
    assert ask(server.port, "GET", "/health/ready")[0] == 200
