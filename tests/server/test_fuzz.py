"""Whatever a client sends: no 5xx, no death, and another's stream is what it would have been."""

from __future__ import annotations

import copy
import json
import random
import threading
from typing import Any

import pytest

from tests.server.conftest import Running
from tests.server.test_limits import ask, post

BYSTANDER = {"prompt": "The little fox", "max_tokens": 40, "temperature": 0.9, "seed": 7, "ignore_eos": True}
BODIES: list[tuple[str, dict[str, Any]]] = [
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


def mutated(rng: random.Random) -> tuple[str, bytes]:
    path, body = copy.deepcopy(rng.choice(BODIES))
    for _ in range(rng.randint(1, 3)):
        *way, last = rng.choice(places(body))
        inner: Any = body
        for key in way:
            inner = inner[key]
        kind = rng.random()
        if kind < 0.7:
            inner[last] = copy.deepcopy(rng.choice(ODD))
        elif kind < 0.85 and isinstance(inner, dict):
            inner[rng.choice(["x", "model", "n", "stream", "tools", "seed"])] = copy.deepcopy(rng.choice(ODD))
        else:
            del inner[last]
        if not body:
            break
    data = json.dumps(body).encode("utf-8", "surrogatepass")
    if rng.random() < 0.2 and data:
        at = rng.randrange(len(data))
        data = data[:at] + bytes([rng.randrange(256)]) + data[at + rng.randint(0, 3) :]
    return path, data


def fuzz(server: Running, count: int, seed: int) -> None:
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
            path, data = mutated(rng)
            status, body = post(server, path, data)
            codes.add(status)
            assert status < 500, (path, data[:500], body)
            assert status == 200 or set(body["error"]) == {"message", "type", "param", "code"}, (data[:300], body)
    finally:
        stop.set()
        bystander.join()
    assert codes >= {200, 400} and seen and set(seen) == {wanted}
    assert ask(server.port, "GET", "/health/ready")[0] == 200
    server.service.engine.check()


def test_mutated_bodies(server: Running) -> None:
    fuzz(server, 200, 1)


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
