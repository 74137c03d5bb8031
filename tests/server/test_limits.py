"""What a server does not let through, and what it says then: OpenAI's error object, never a traceback, never 422."""

from __future__ import annotations

import http.client
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

import dsv3
from dsv3.server.guard import OPEN
from dsv3.server.limits import Limits
from tests.server.conftest import Running

CHAT = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2}
TEXT = {"prompt": "Once", "max_tokens": 2, "temperature": 0}


def ask(port: int, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    data = body if isinstance(body, bytes) else None if body is None else json.dumps(body).encode()
    sent = {"Content-Type": "application/json"} if data is not None else {}
    connection.request(method, path, data, {**sent, **(headers or {})})
    response = connection.getresponse()
    text = response.read()
    connection.close()
    try:
        return response.status, json.loads(text)
    except json.JSONDecodeError:
        return response.status, text


def post(server: Running, path: str, body: Any, headers: dict[str, str] | None = None) -> tuple[int, Any]:
    return ask(server.port, "POST", path, body, headers)


def nested(depth: int) -> dict[str, Any]:
    found: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        found = {"type": "object", "properties": {"a": found}}
    return found


def schema(value: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": value}}}


TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("/v1/completions", {"n": 17}, "n"), ("/v1/completions", {"n": 0}, "n"), ("/v1/completions", {"temperature": -1}, "temperature"),
    ("/v1/completions", {"temperature": 1e9}, "temperature"), ("/v1/completions", {"top_p": -0.1}, "top_p"),
    ("/v1/completions", {"top_p": 1.01}, "top_p"), ("/v1/completions", {"stop": ["a"] * 5}, "stop"),
    ("/v1/completions", {"stop": "a" * 129}, "stop"), ("/v1/completions", {"stop": [""]}, "stop[0]"),
    ("/v1/completions", {"logprobs": 21}, "logprobs"), ("/v1/completions", {"logit_bias": {"x": 1}}, "logit_bias"),
    ("/v1/completions", {"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias"), ("/v1/completions", {"logit_bias": {"99999": 1}}, "logit_bias"),
    ("/v1/completions", {"presence_penalty": 2.1}, "presence_penalty"), ("/v1/completions", {"frequency_penalty": -3}, "frequency_penalty"),
    ("/v1/completions", {"max_tokens": -1}, "max_tokens"), ("/v1/completions", {"prompt": []}, "prompt"),
    ("/v1/completions", {"prompt": [99999]}, "prompt"), ("/v1/completions", {"prompt": [[1], "a"]}, "prompt"),
    ("/v1/completions", {"prompt": [1.5]}, "prompt"), ("/v1/completions", {"suffix": "x"}, "suffix"),
    ("/v1/completions", {"prompt": ["a"] * 65}, "prompt"), ("/v1/completions", {"draft_tokens": 9}, "draft_tokens"),
    ("/v1/completions", {"prompt": "word " * 900, "echo": True, "logprobs": 20, "n": 16}, "logprobs"),
    ("/v1/completions", {"prompt": "word " * 5000}, "prompt"), ("/v1/completions", {"maxtokens": 3}, "maxtokens"),
    ("/v1/completions", {"stream_options": {"x": 1}}, "stream_options.x"), ("/v1/completions", schema(nested(40)), "response_format"),
    ("/v1/completions", schema({"enum": ["x" * 70000]}), "response_format"), ("/v1/completions", schema({"type": "nothing"}), "response_format"),
    ("/v1/completions", {"response_format": {"type": "regex", "regex": "(?=x)"}}, "response_format"),
    ("/v1/completions", {"response_format": {"type": "regex"}}, "response_format"),
    ("/v1/completions", {"response_format": {"type": "grammar", "grammar": "start: nothing"}}, "response_format"),
    ("/v1/chat/completions", {"messages": []}, "messages"), ("/v1/chat/completions", {"messages": [{"role": "x", "content": ""}]}, "messages[0].role"),
    ("/v1/chat/completions", {"top_logprobs": 3}, "top_logprobs"), ("/v1/chat/completions", {"top_logprobs": 21}, "top_logprobs"),
    ("/v1/chat/completions", {"tools": [TOOL] * 129}, "tools"), ("/v1/chat/completions", {"tool_choice": "required"}, "tool_choice"),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages[0].content[0].type"),
    ("/v1/tokenize", {}, "prompt"), ("/v1/detokenize", {"tokens": [99999]}, "tokens"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "change", "param"), WRONG, ids=lambda v: str(v)[:40])
def test_wrong_requests_are_explained(server: Running, path: str, change: dict[str, Any], param: str | None) -> None:
    base = {"/v1/completions": TEXT, "/v1/chat/completions": CHAT}.get(path, {})
    status, body = post(server, path, {**base, **change})
    assert status == 400 and set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["type"] == "invalid_request_error" and "Traceback" not in body["error"]["message"]
    if param is not None:
        assert body["error"]["param"] == param


def test_what_would_have_been_right_is_said(server: Running) -> None:
    for change, said in (
        ({"messages": [{"role": "human", "content": "a"}]}, "Invalid enum value 'human'; expected one of 'assistant', 'developer',"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "Invalid value 'image_url'; expected one of 'text'"),
        ({"response_format": {"type": "xml"}}, "expected one of 'grammar', 'json_object', 'json_schema', 'regex', 'text'"),
        ({"n": "5"}, 'Expected `int | null`, got `str`; found "5" (at n)'), ({"temperature": -1}, "Expected `float` >= 0.0; found -1"),
        ({"stop": ["a", 5]}, "Expected `str`, got `int`; found 5 (at stop[1])"),
    ):  # fmt: skip
        status, body = post(server, "/v1/chat/completions", {**CHAT, **change})
        assert status == 400 and said in body["error"]["message"], body


def test_a_misspelt_field_is_named(server: Running) -> None:
    _, body = post(server, "/v1/completions", {**TEXT, "temprature": 1})
    assert body["error"]["message"] == "unknown field 'temprature'; did you mean 'temperature'?"


@pytest.mark.parametrize(
    "data", [b"", b"{", b"[]", b"\xff\xfe", b'{"prompt": "a', b"[" * 100_000, b'{"prompt": "\\ud800"}', b"1e999"]
)
def test_what_is_no_json_is_400(server: Running, data: bytes) -> None:
    status, body = post(server, "/v1/completions", data)
    assert status == 400 and body["error"]["message"]


def test_limits_at_and_past_the_edge(server: Running) -> None:
    for change in (
        {"n": 16, "max_tokens": 1},
        {"stop": ["a" * 128] * 4},
        {"logprobs": 20},
        {"logit_bias": {str(i): 1 for i in range(1024)}},
        {"top_p": 0, "temperature": 1},
        {"prompt": ""},
        {"prompt": None},
    ):
        assert post(server, "/v1/completions", {**TEXT, **change})[0] == 200, change
    assert post(server, "/v1/completions", {**TEXT, **schema(nested(10)), "max_tokens": 1})[0] == 200


def test_sizes_and_headers(server: Running) -> None:
    big = b'{"prompt": "' + b"a" * (4 << 20) + b'"}'
    assert post(server, "/v1/completions", big)[0] == 413
    status, body = post(server, "/v1/completions", TEXT, {f"x-{i}": "1" for i in range(100)})
    assert status == 431 and "header" in body["error"]["message"]
    assert post(server, "/v1/completions", TEXT, {"x-long": "a" * (70 << 10)})[0] in (400, 431)
    with socket.create_connection(("127.0.0.1", server.port)) as raw:  # chunked, without a length
        raw.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n"
        )
        chunk = b"10000\r\n" + b"a" * 0x10000 + b"\r\n"
        try:
            for _ in range(70):
                raw.sendall(chunk)
            raw.sendall(b"0\r\n\r\n")
        except OSError:
            pass
        assert b" 413 " in raw.recv(200)


def test_other_content_types_and_hosts_are_refused(server: Running) -> None:
    for kind in ("text/plain", "application/jsonfoo", ""):
        assert post(server, "/v1/completions", TEXT, {"Content-Type": kind})[0] == 400
    assert post(server, "/v1/completions", TEXT, {"Content-Type": "Application/JSON ; charset=utf-8"})[0] == 200
    status, body = post(server, "/v1/completions", TEXT, {"Host": "evil.example"})
    assert status == 403 and "evil.example" in body["error"]["message"]
    for host in ("localhost:1", "127.0.0.1", "[::1]:80", "192.168.1.5:8000"):
        assert post(server, "/v1/tokenize", {"prompt": "a"}, {"Host": host})[0] == 200


def test_paths_and_methods(server: Running) -> None:
    assert ask(server.port, "GET", "/v1/nothing")[0] == 404
    assert ask(server.port, "GET", "/v1/completions")[0] == 405
    assert ask(server.port, "GET", "/v1/models/")[0] == 404 and ask(server.port, "GET", "/v1/models/demo")[0] == 200
    assert ask(server.port, "POST", "/v1/nothing")[0] == 404 and ask(server.port, "POST", "/health/live")[0] == 405
    with socket.create_connection(("127.0.0.1", server.port)) as raw:
        raw.sendall(b"GET /health/live HTTP/1.0\r\n\r\n")
        assert b" 200 " in raw.recv(200)
    assert ask(server.port, "GET", "/../../etc/passwd")[0] == 404
    assert ask(server.port, "GET", "/health/live")[0] == 200 and ask(server.port, "GET", "/health/ready")[0] == 200
    status, text = ask(server.port, "GET", "/metrics")
    assert status == 200 and b"dsv3_generated_tokens_total" in text
    status, found = ask(server.port, "GET", "/openapi.json")
    assert status == 200 and set(found["paths"]) >= {"/v1/completions", "/v1/chat/completions", "/v1/models"}


def test_a_schema_of_many_properties_is_followed_and_one_that_nothing_satisfies_refused(server: Running) -> None:
    many = schema({"type": "object", "properties": {f"name{n}": {"type": "string"} for n in range(1500)}})
    status, found = post(server, "/v1/completions", {**TEXT, **many})
    assert status == 200, found
    circle = schema({"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"})
    status, found = post(server, "/v1/completions", {**TEXT, **circle})
    assert status == 400 and found["error"]["message"] == "the grammar allows nothing"


def test_a_grammar_that_becomes_too_costly_on_the_way_is_the_request_s_fault(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dsv3.engine.grammar._ROW", 100)
    many = {"type": "object", "properties": {f"name{n}": {"type": "string"} for n in range(60)}}
    deep = schema({"type": "array", "prefixItems": [{"const": 1}, many], "minItems": 2})
    for stream in (False, True):
        status, found = post(server, "/v1/completions", {**TEXT, **deep, "max_tokens": 200, "stream": stream})
        if stream:
            (found,) = [json.loads(line[6:]) for line in found.splitlines() if b'"error"' in line]
        assert (status == 200) is stream and found["error"]["type"] == "invalid_request_error", found
        assert "the grammar is too costly" in found["error"]["message"]


AMBIGUOUS = ["start: a*\na: b*\nb: c*\nc: /[a-z]/*", "start: a\na: a a | /[a-z]/"]


@pytest.mark.parametrize("grammar", AMBIGUOUS)
@pytest.mark.parametrize("drafts", [0, 3])
def test_a_grammar_that_makes_each_token_dearer_is_ended_before_others_wait_long(
    server: Running, grammar: str, drafts: int
) -> None:
    costly = {"response_format": {"type": "grammar", "grammar": grammar}, "max_tokens": 2000, "draft_tokens": drafts}
    status, body = post(server, "/v1/completions", {**TEXT, **costly})
    assert status == 400 and body["error"]["param"] == "response_format", body
    assert "the grammar is too costly" in body["error"]["message"]
    (taken,) = re.findall(r"([0-9.]+) s for", body["error"]["message"])
    assert float(taken) < 8, "without an end it is minutes"
    assert post(server, "/v1/completions", TEXT)[0] == 200


LONG_TEXT = "word and other " * 100_000
LONG_BODIES: list[tuple[str, dict[str, Any], int]] = [
    ("/v1/tokenize", {"prompt": LONG_TEXT}, 200), ("/v1/completions", {"prompt": LONG_TEXT}, 400),
    ("/tokenize", {"messages": [{"role": "user", "content": LONG_TEXT}]}, 200),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": LONG_TEXT}]}, 400),
]  # fmt: skip


@pytest.mark.parametrize(("path", "body", "status"), LONG_BODIES, ids=[f"{p} {next(iter(b))}" for p, b, _ in LONG_BODIES])
def test_who_asks_meanwhile_does_not_wait_for_a_long_text_to_be_tokenised(
    server: Running, path: str, body: dict[str, Any], status: int
) -> None:
    waited, asking = [0.0], threading.Event()

    def others() -> None:
        while not asking.is_set():
            start = time.perf_counter()
            assert ask(server.port, "GET", "/health/live")[0] == 200
            waited.append(time.perf_counter() - start)

    other = threading.Thread(target=others)
    other.start()
    time.sleep(0.1)
    start = time.perf_counter()
    assert post(server, path, body)[0] == status
    taken = time.perf_counter() - start
    asking.set()
    other.join()
    assert max(waited) < taken / 2, "the longest wait, beside what tokenising takes"


@pytest.fixture(scope="module")
def locked(demo_model: dsv3.Model) -> Iterator[Running]:
    running = Running(demo_model, keys=("secret-one", "secret-two"))
    yield running
    running.stop()


def test_every_route_but_health_and_the_page_needs_a_key(locked: Running) -> None:
    seen = 0
    for route in locked.app.routes:
        for method in sorted(route.methods - {"HEAD"}):  # type: ignore[attr-defined]
            path = route.path.replace("{name:path}", "demo")  # type: ignore[attr-defined]
            body = TEXT if method == "POST" else None
            status, found = ask(locked.port, method, path, body)
            if path in OPEN:
                assert status == 200, path
            else:
                assert status == 401 and found["error"]["code"] == "invalid_api_key", path
                for wrong in ("secret-three", "secret-on", "", "secret-one secret-one"):
                    assert ask(locked.port, method, path, body, {"Authorization": f"Bearer {wrong}"})[0] == 401, path
                assert ask(locked.port, method, path, body, {"Authorization": "Basic secret-one"})[0] == 401, path
                assert ask(locked.port, method, path, body, {"Authorization": "Bearer secret-two"})[0] != 401, path
            seen += 1
    assert seen > 12
    for path in ("/v1", "/v1/", "/v2/x", "//v1/models", "/health", "/chat.js/../v1/models"):
        assert ask(locked.port, "GET", path)[0] in (401, 404), path


def test_tenants_do_not_share_what_the_cache_knows(locked: Running) -> None:
    prompt = {"prompt": "the quick brown fox " * 40, "max_tokens": 1, "temperature": 0}

    def cached(key: str) -> int:
        status, found = post(locked, "/v1/completions", prompt, {"Authorization": f"Bearer {key}"})
        assert status == 200
        return int(found["usage"]["prompt_tokens_details"]["cached_tokens"])

    assert cached("secret-one") == 0
    assert cached("secret-one") > 64
    assert cached("secret-two") == 0


def test_too_many_are_told_to_come_later(demo_model: dsv3.Model) -> None:
    running = Running(demo_model, limits=Limits(queue=2), most=1)
    try:
        codes: list[int] = []
        threads = [
            threading.Thread(target=lambda: codes.append(post(running, "/v1/completions", {**TEXT, "max_tokens": 150, "ignore_eos": True})[0]))
            for _ in range(12)
        ]  # fmt: skip
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert set(codes) == {200, 429} and codes.count(200) >= 2
        assert running.service.engine.pool.free == running.service.engine.pool.total
    finally:
        running.stop()
