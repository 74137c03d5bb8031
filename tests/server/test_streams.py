"""Streams that are left, that fail, that nobody reads; a server that is told to stop."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import Any

import pytest

from tests.server.conftest import Running
from tests.server.test_limits import ask, post

HEAD = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n"
LONG = {"prompt": "Once upon a time", "max_tokens": 3000, "ignore_eos": True, "temperature": 0.8, "seed": 1}


def settled(server: Running, steps: int) -> None:
    """All blocks are back, at most so many steps after `steps` were taken."""
    engine = server.service.engine
    deadline = time.monotonic() + 10
    while engine.pool.free != engine.pool.total:
        assert time.monotonic() < deadline, "blocks are still held"
        time.sleep(0.002)
    assert not server.service.streams and engine.idle


def open_post(server: Running, body: dict[str, Any]) -> socket.socket:
    data = json.dumps(body).encode()
    raw = socket.create_connection(("127.0.0.1", server.port))
    raw.sendall(HEAD.format(len(data)).encode() + data)
    return raw


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_takes_its_request_along(server: Running, stream: bool) -> None:
    engine = server.service.engine
    for _ in range(3):
        raw = open_post(server, {**LONG, "stream": stream})
        deadline = time.monotonic() + 30
        while not engine.running:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        time.sleep(0.05)
        raw.close()
        before = engine.steps
        settled(server, before)
        left = server.service.metrics.finished.labels("aborted")._value.get()
        assert left > 0, "who left is counted"
        assert engine.steps - before < 60  # of 3000: what was taken until the loop saw the end of the connection


def test_random_aborts_leave_nothing_behind(server: Running) -> None:
    import random

    rng = random.Random(1)
    for _ in range(40):
        drawn = {"stream": rng.random() < 0.5, "draft_tokens": rng.choice([0, 2]), "n": rng.choice([1, 3])}
        raw = open_post(server, {**LONG, **drawn})
        time.sleep(rng.random() * 0.03)
        raw.close()
    settled(server, 0)
    server.service.engine.check()


def test_a_bystander_gets_the_same_text_while_others_misbehave(server: Running) -> None:
    body = {"prompt": "The little fox", "max_tokens": 60, "temperature": 0.9, "seed": 7, "ignore_eos": True}
    alone = post(server, "/v1/completions", body)[1]["choices"][0]["text"]
    stop = threading.Event()

    def misbehave() -> None:
        n = 0
        while not stop.is_set():
            n += 1
            raw = open_post(server, {**LONG, "stream": bool(n % 2)})
            time.sleep(0.01)
            raw.close()
            post(server, "/v1/completions", b"{" * n)

    other = threading.Thread(target=misbehave)
    other.start()
    try:
        for _ in range(3):
            assert post(server, "/v1/completions", body)[1]["choices"][0]["text"] == alone
    finally:
        stop.set()
        other.join()
    settled(server, 0)


@pytest.mark.slow  # the system buffers megabytes first
def test_a_stream_that_nobody_reads_is_ended(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsv3.server.service.STREAM_BYTES", 200)
    raw = socket.socket()
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
    raw.connect(("127.0.0.1", server.port))
    data = json.dumps({**LONG, "stream": True, "logprobs": 20}).encode()
    raw.sendall(HEAD.format(len(data)).encode() + data)
    deadline = time.monotonic() + 30
    while not server.service.engine.running:
        time.sleep(0.005)
    while server.service.engine.running:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert server.service.engine.pool.free == server.service.engine.pool.total
    raw.close()


def test_an_engine_fault_reaches_the_stream_as_an_error(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = server.service.engine._runner
    real = runner.run

    def failing(cache: Any, plan: Any) -> Any:
        if any(w.request.new >= 5 for w in plan):
            raise RuntimeError("the device is on fire")
        return real(cache, plan)

    monkeypatch.setattr(runner, "run", failing)
    raw = open_post(server, {**LONG, "stream": True})
    text = b""
    while part := raw.recv(65536):
        text += part
        if b'"error"' in text:
            break
    raw.close()
    assert b"on fire" in text and b"[DONE]" not in text and text.count(b"data: ") >= 2
    status, body = post(server, "/v1/completions", {**LONG, "max_tokens": 20})
    assert status == 500 and body["error"]["type"] == "server_error" and "on fire" in body["error"]["message"]
    monkeypatch.undo()
    assert post(server, "/v1/completions", {**LONG, "max_tokens": 20})[0] == 200
    settled(server, 0)


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_sigterm_with_twenty_streams_loses_nothing(tmp_path: Any) -> None:
    command = [sys.executable, "-m", "dsv3", "serve", "--port", "0", "--backend", "cpu", "--drain", "60", "--max-batch", "20"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    line = ""
    while " at http://" not in line:
        line = process.stderr.readline()
        assert line, "the server ended"
    port = int(line.split(":")[3].split()[0])
    body = {"prompt": "Once upon a time", "max_tokens": 60, "ignore_eos": True, "temperature": 0, "stream": True}
    body["stream_options"] = {"include_usage": True}
    texts: list[bytes] = []

    def one() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        texts.append(connection.getresponse().read())

    threads = [threading.Thread(target=one) for _ in range(20)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 60
    while ask(port, "GET", "/health/ready")[1]["streams"] < 20:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGTERM)
    for thread in threads:
        thread.join()
    assert process.wait(60) == 0
    assert len(texts) == 20 and all(text.endswith(b"data: [DONE]\n\n") for text in texts)
    assert [answer(text) for text in texts] == [60] * 20


def answer(stream: bytes) -> int:
    """Tokens of a stream that came to its end."""
    chunks = [json.loads(line[6:]) for line in stream.splitlines() if line.startswith(b"data: {")]
    assert [c["choices"][0]["finish_reason"] for c in chunks if c["choices"]][-1] == "length"
    return int(chunks[-1]["usage"]["completion_tokens"])


def test_experts_are_seen_where_steps_are_replayed(server: Running) -> None:
    """A replayed step cannot be looked into; some are run kernel by kernel for that."""
    body = {"model": "demo", "prompt": "Once upon a time", "max_tokens": 70, "temperature": 0}
    before = server.app.state.experts.seen()["tokens"]
    _, said = post(server, "/v1/completions", body)
    assert server.app.state.experts.seen()["tokens"] >= before + 4
    model = server.service.model
    assert model.graphs.offered()
    assert said["choices"][0]["text"] == model.generate("Once upon a time", max_new_tokens=70, temperature=0).text
