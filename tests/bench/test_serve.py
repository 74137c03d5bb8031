"""The load client against a small server in the test: what it measures of known delays, and what it says of everything that can
go wrong on the way."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from dsv3.bench.serve.client import Question, Sample, ask
from dsv3.bench.serve.events import Events
from dsv3.bench.serve.figures import Goal, outcome, quantile, spread
from dsv3.bench.serve.http import Failure, target
from dsv3.bench.serve.load import Lengths, lengths, model_of, plan, run
from dsv3.bench.serve.plot import HEIGHT, WIDTH, svg
from dsv3.cli import main
from dsv3.errors import Dsv3Error, UsageError

Send = Callable[[bytes], Awaitable[None]]
Answer = Callable[[dict[str, Any], Send], Awaitable[None]]
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
PLAIN = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"  # ends with the connection
DONE = b"data: [DONE]\n\n"


def event(text: str = "", reason: str | None = None, **more: Any) -> bytes:
    choice = {"index": 0, "text": text, "finish_reason": reason}
    return f"data: {json.dumps({'object': 'text_completion', 'choices': [choice], 'usage': None, **more})}\n\n".encode()


def usage(tokens: int, **extension: int) -> bytes:
    counts = {"prompt_tokens": 2, "completion_tokens": tokens, "dsv3": extension}
    return f"data: {json.dumps({'choices': [], 'usage': counts})}\n\n".encode()


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


class Server:
    """Answers completions as told. asked: their bodies; most: how many at once; heads: what they began with."""

    def __init__(self, answer: Answer) -> None:
        self.answer, self.url = answer, ""
        self.asked: list[dict[str, Any]] = []
        self.heads: list[str] = []
        self.now = self.most = 0

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async def send(data: bytes) -> None:
            writer.write(data)
            await writer.drain()

        self.now += 1
        self.most = max(self.most, self.now)
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            self.heads.append(head)
            if head.startswith("GET /v1/models "):
                body = b'{"object": "list", "data": [{"id": "small"}]}'
                await send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
                return
            assert head.startswith("POST /v1/completions HTTP/1.1\r\n")
            length = next(int(line.split(":")[1]) for line in head.splitlines() if line.startswith("Content-Length"))
            self.asked.append(json.loads(await reader.readexactly(length)))
            await self.answer(self.asked[-1], send)
        except ConnectionError:
            pass  # the client has left
        finally:
            self.now -= 1
            writer.close()


@contextlib.asynccontextmanager
async def serving(answer: Answer) -> AsyncIterator[Server]:
    server = Server(answer)
    listening = await asyncio.start_server(server, "127.0.0.1", 0)
    server.url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
    async with listening:
        yield server


def once(answer: Answer, timeout: float = 20.0, prompt: Sequence[int] = (5, 6), asked: int = 3) -> tuple[Sample, Server]:
    """One question to a server that answers so."""

    async def go() -> tuple[Sample, Server]:
        async with serving(answer) as server:
            question = Question(0, 0.0, list(prompt), asked)
            return await ask(target(server.url), "small", question, time.perf_counter(), timeout), server

    return asyncio.run(go())


def says(*parts: bytes, gap: float = 0.0) -> Answer:
    """Bytes, one write after the other."""

    async def answer(_: dict[str, Any], send: Send) -> None:
        for n, part in enumerate(parts):
            if n:
                await asyncio.sleep(gap)
            await send(part)

    return answer


WHOLE = (event("a"), event("b"), event("c", "length"), usage(3), DONE)


def test_a_request_is_what_the_interface_says() -> None:
    sample, server = once(says(HEAD, *map(chunk, WHOLE), b"0\r\n\r\n"))
    assert sample.error is None and sample.tokens == 3 and sample.counted and sample.finish_reason == "length"
    assert server.asked == [{
        "model": "small", "prompt": [5, 6], "max_tokens": 3, "ignore_eos": True, "stream": True,
        "stream_options": {"include_usage": True},
    }]  # fmt: skip
    assert "Connection: close" in server.heads[0] and "Authorization" not in server.heads[0]


def test_times_are_those_of_the_server() -> None:
    """Delays of 0.15 s and then 0.08 s: never less than was slept, and not much more."""

    async def answer(_: dict[str, Any], send: Send) -> None:
        await send(HEAD)
        await asyncio.sleep(0.15)
        for n in range(4):
            await send(chunk(event("x", "length" if n == 3 else None)))
            await asyncio.sleep(0.08)
        await send(chunk(usage(4)) + chunk(DONE) + b"0\r\n\r\n")

    sample, _ = once(answer)
    assert sample.error is None and sample.ttft is not None and sample.per_token is not None
    assert 0.149 <= sample.ttft < 0.4
    assert len(sample.itl) == 3 and all(gap > 0.06 for gap in sample.itl)
    assert 0.079 <= sample.per_token < 0.2 and sample.per_token == pytest.approx(sum(sample.itl) / 3)
    assert sample.end - sample.start >= 0.15 + 4 * 0.08 - 0.002


def test_drafts_come_several_tokens_an_event() -> None:
    sample, _ = once(says(PLAIN, event("a"), event("bcd", "length"), usage(4, drafted=6, accepted=2, cached_tokens=1), DONE))
    assert (sample.tokens, len(sample.arrivals)) == (4, 2)
    assert (sample.drafted, sample.accepted, sample.cached_tokens) == (6, 2, 1)
    assert sample.per_token == pytest.approx((sample.arrivals[1] - sample.arrivals[0]) / 3)
    found = outcome([sample], Goal())
    assert "4 tokens came in 2 events" in " ".join(found.notes) and "1 of 2 prompt tokens were in" in " ".join(found.notes)


def test_without_usage_events_are_counted() -> None:
    sample, _ = once(says(PLAIN, event("a"), event(""), event("c", "stop"), DONE))
    assert sample.error is None and sample.tokens == 2 and not sample.counted
    assert any("events with text are counted" in note for note in outcome([sample], Goal()).notes)


@pytest.mark.parametrize("step", [1, 2, 7, 1000])
def test_chunks_cut_anywhere(step: int) -> None:
    """The framing has nothing to do with events: here a chunk is `step` bytes, with an extension, and trailers follow."""
    body = b": welcome\r\n\r\n" + event("ä😀") + b"event: x\n" + event("b", "length").replace(b"\n", b"\r\n") + usage(2) + DONE
    parts = [body[i : i + step] for i in range(0, len(body), step)]
    framed = b"".join(b"%X;a=b\r\n%s\r\n" % (len(p), p) for p in parts) + b"0\r\nTrailer: x\r\n\r\n"
    sample, _ = once(says(b"HTTP/1.1 100 Continue\r\n\r\n" + HEAD + framed))
    assert sample.error is None and sample.tokens == 2 and len(sample.arrivals) == 2


def test_content_length() -> None:
    body = b"".join(WHOLE)
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ncontent-length: %d\r\n\r\n"
    assert once(says(head % len(body), body))[0].error is None
    assert once(says(head % (len(body) + 1), b"".join(WHOLE[:3])))[0].error == "disconnect"


REFUSED = b'{"error": {"message": "the queue is full", "type": "x", "param": null, "code": null}}'
BAD: dict[str, tuple[tuple[bytes, ...], str, str]] = {
    "full": ((b"HTTP/1.1 429 Too Many\r\nRetry-After: 1\r\n\r\n", REFUSED), "http 429", "the queue is full"),
    "traceback": ((b"HTTP/1.1 500 Oh\r\n\r\n", b"<h1>no</h1>"), "http 500", "<h1>no</h1>"),
    "nothing": ((), "disconnect", "closed"),
    "half a head": ((b"HTTP/1.1 200 OK\r\nContent-",), "disconnect", "closed"),
    "another protocol": ((b"SSH-2.0-x\r\n\r\n",), "malformed", "not HTTP"),
    "odd header": ((b"HTTP/1.1 200 OK\r\nnonsense\r\n\r\n",), "malformed", "header"),
    "endless headers": ((b"HTTP/1.1 200 OK\r\n", b"a: b\r\n" * 200, b"\r\n"), "malformed", "headers"),
    "endless line": ((b"HTTP/1.1 200 OK\r\na: ", b"b" * (1 << 17), b"\r\n\r\n"), "malformed", "64 KiB"),
    "not a stream": ((b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n", b"{}"), "malformed", "content type"),
    "cut": ((PLAIN, event("a")), "disconnect", "without [DONE]"),
    "cut in an event": ((PLAIN, event("a"), b"data: [DO"), "disconnect", "without [DONE]"),
    "cut in a chunk": ((HEAD, chunk(event("a"))[:-9]), "disconnect", "before the end"),
    "chunk size": ((HEAD, b"-5\r\n"), "malformed", "chunk size"),
    "chunk too long": ((HEAD, b"3\r\ndata: x\r\n"), "malformed", "longer than it says"),
    "not JSON": ((PLAIN, b"data: {oops\n\n"), "malformed", "not JSON"),
    "deep JSON": ((PLAIN, b"data: " + b"[" * 200_000 + b"\n\n"), "malformed", "not JSON"),
    "not an object": ((PLAIN, b"data: [1]\n\n"), "malformed", "not an object"),
    "odd object": ((PLAIN, b'data: {"choices": [3]}\n\n'), "malformed", "not a completion's"),
    "odd usage": ((PLAIN, b'data: {"usage": {"prompt_tokens": 3}}\n\n'), "malformed", "not a completion's"),
    "not UTF-8": ((PLAIN, b'data: {"a": "\xff"}\n\n'), "malformed", "UTF-8"),
    "endless event": ((PLAIN, b"data: " + b"x" * (5 << 20)), "malformed", "4 MiB"),
    "no end": ((PLAIN, event("a"), DONE), "malformed", "without a finish_reason"),
    "gave up": ((PLAIN, event("a"), b"data: " + REFUSED + b"\n\n"), "server", "the queue is full"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_goes_wrong_is_named(name: str) -> None:
    parts, kind, detail = BAD[name]
    sample, _ = once(says(*parts))
    assert sample.error == kind and detail in sample.detail, f"{name}: {sample.error}: {sample.detail}"
    assert sample.end >= sample.start


def test_a_server_that_hangs_and_one_that_is_not_there() -> None:
    async def hang(_: dict[str, Any], send: Send) -> None:
        await send(PLAIN + event("a"))
        while True:  # until the client has left
            await asyncio.sleep(0.02)
            await send(b": still there\n\n")

    sample, _ = once(hang, timeout=0.2)
    assert sample.error == "timeout" and sample.detail == "no end after 0.2 s" and len(sample.arrivals) == 1

    async def nobody() -> tuple[Sample, str]:
        listening = await asyncio.start_server(lambda r, w: None, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
        listening.close()
        await listening.wait_closed()
        with pytest.raises(Dsv3Error, match="start a server with `dsv3 serve`") as error:
            await model_of(target(url))
        return await ask(target(url), "m", Question(0, 0.0, [3], 1), 0.0, 5.0), str(error.value)

    sample, _ = asyncio.run(nobody())
    assert sample.error == "connect"


def test_events_in_every_way_to_cut_them() -> None:
    lines = ': hello\r\ndata: {"a": "é😀"}\r\n\r\nid: 4\ndata: two\ndata:lines\n\ndata\n\n: ping\n\n'
    text = f"{lines}data: [DONE]\r\rdata: cut".encode()
    for i in range(len(text)):
        events = Events()
        found = [*events.feed(text[:i]), *events.feed(text[i:])]
        assert found == ['{"a": "é😀"}', "two\nlines", "[DONE]"], i
    events = Events()
    assert [d for n in range(len(text)) for d in events.feed(text[n : n + 1])] == ['{"a": "é😀"}', "two\nlines", "[DONE]"]


def test_a_plan_is_the_seeds() -> None:
    made, again, other = (plan(4000, 20.0, Lengths(3, 9), Lengths(1, 2), 50, seed) for seed in (1, 1, 2))
    assert made == again != other
    gaps = [b.planned - a.planned for a, b in itertools.pairwise(made)]
    mean = sum(gaps) / len(gaps)
    assert mean == pytest.approx(1 / 20, rel=0.08)  # five standard errors of an exponential law
    assert sum((g - mean) ** 2 for g in gaps) / len(gaps) == pytest.approx(mean**2, rel=0.25)
    assert {len(q.prompt) for q in made} == set(range(3, 10)) and {q.output_tokens for q in made} == {1, 2}
    ids = {i for q in made for i in q.prompt}
    assert min(ids) == 3 and max(ids) == 49
    assert {q.planned for q in plan(5, math.inf, Lengths(1, 1), Lengths(1, 1), 9, 0)} == {0.0}


def test_no_more_at_once_than_allowed() -> None:
    async def go(cap: int | None) -> tuple[list[Sample], Server]:
        async with serving(says(PLAIN, *WHOLE, gap=0.02)) as server:
            questions = plan(9, math.inf, Lengths(2, 2), Lengths(3, 3), 99, seed=0)
            return await run(target(server.url), "small", questions, cap), server

    samples, server = asyncio.run(go(3))
    assert server.most == 3 and [s.index for s in samples] == list(range(9)) and all(s.error is None for s in samples)
    assert max(s.start - s.planned for s in samples) > 0.15  # two rounds of five writes were waited for
    assert outcome(samples, Goal()).notes == []
    samples[1].planned = 0.01
    assert any("the rate was not kept" in note for note in outcome(samples, Goal()).notes)
    assert sorted(map(str, (a["prompt"] for a in server.asked))) == sorted(str(q.prompt) for q in plan(
        9, math.inf, Lengths(2, 2), Lengths(3, 3), 99, seed=0))  # fmt: skip
    samples, server = asyncio.run(go(None))
    assert server.most == 9


def sample(start: float, arrivals: list[float], end: float, error: str | None = None, tokens: int = 0) -> Sample:
    made = Sample(0, 10, 3, start, start, end, arrivals, tokens or len(arrivals), True, "length", error=error)
    made.detail = "why" if error else ""
    return made


RUN = [
    sample(1.0, [1.5, 1.6, 1.8], 1.9),
    sample(1.0, [2.0, 2.2, 2.4], 2.5),
    sample(2.0, [2.1, 2.2], 3.0, "disconnect"),
    sample(2.0, [], 2.0, "http 429"),
    sample(2.0, [], 2.1, "http 429"),
]


def test_figures_of_a_run_by_hand() -> None:
    found = outcome(RUN, Goal(ttft=0.6, per_token=0.16))
    assert (found.requests, found.whole, found.tokens, found.prompt_tokens, found.seconds) == (5, 2, 6, 20, 2.0)
    assert (found.tokens_s, found.requests_s, found.goodput) == (3.0, 1.0, 0.5)
    assert found.errors == {"http 429": 2, "disconnect": 1}
    first, gaps, per, all_of_it = (found.spreads[name] for name in ("ttft", "itl", "per token", "whole answer"))
    assert (first.count, first.median, first.worst) == (2, pytest.approx(0.75), pytest.approx(1.0))
    assert first.p90 == pytest.approx(0.95) and first.p99 == pytest.approx(0.995) and first.mean == pytest.approx(0.75)
    assert gaps.count == 4 and gaps.median == pytest.approx(0.2) and gaps.worst == pytest.approx(0.2)
    assert per.median == pytest.approx(0.175) and all_of_it.worst == pytest.approx(1.5)
    assert [outcome(RUN, g).good for g in (Goal(), Goal(1.1), Goal(0.4), Goal(None, 0.16), Goal(None, 0.1))] == [2, 2, 0, 1, 0]
    assert "first http 429: request 0: why" in found.notes


def test_nothing_whole_is_still_a_result() -> None:
    found = outcome(RUN[2:], Goal(ttft=1.0))
    assert found.spreads == {} and found.tokens_s == 0 and found.good == 0 and found.errors["http 429"] == 2


def test_quantiles() -> None:
    assert [quantile([1.0, 2.0, 3.0, 4.0], q) for q in (0.0, 0.5, 0.9, 1.0)] == [1.0, 2.5, pytest.approx(3.7), 4.0]
    assert spread([7.0]).p99 == 7.0


def test_the_picture() -> None:
    tree = ElementTree.fromstring(svg(outcome(RUN, Goal(0.8)), RUN, "small <at> home", Goal(0.8)))
    curves = tree.findall(".//{http://www.w3.org/2000/svg}path")
    places = [tuple(map(float, xy.split())) for c in curves for xy in c.get("d", "")[1:].split("L")]
    assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in places)
    styles = [c.get("class") for c in curves]
    assert styles.count("line") == 3 and styles.count("other") == 1 and styles.count("goal") == 1
    first = next(c for c in curves if c.get("class") == "line")
    steps = [tuple(map(float, xy.split())) for xy in first.get("d", "")[1:].split("L")]
    rises = [a[1] - b[1] for a, b in itertools.pairwise(steps) if a[0] == b[0] and a[1] != b[1]]
    assert rises == [pytest.approx(94.0), pytest.approx(94.0)]  # two requests, half of the height each
    assert ElementTree.fromstring(svg(outcome(RUN[2:], Goal()), RUN[2:], "t", Goal())) is not None


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "key").write_text("secret-key\n")
    turns = itertools.count()

    async def answer(_: dict[str, Any], send: Send) -> None:
        if next(turns) == 0:
            await send(b"HTTP/1.1 429 Too Many\r\n\r\n" + REFUSED)
        else:
            await send(PLAIN + event("a"))
            await asyncio.sleep(0.01)
            await send(event("b", "length") + usage(2, drafted=4, accepted=3) + DONE)

    async def go() -> tuple[int, Server]:
        async with serving(answer) as server:
            flags = ["--url", server.url, "--requests", "6", "--rate", "200", "--concurrency", "1", "--output-tokens", "2"]
            flags += ["--input-tokens", "4-8", "--seed", "3", "--slo-ttft", "5000", "--key-file", str(tmp_path / "key")]
            flags += ["--json", str(tmp_path / "r.json"), "--plot", str(tmp_path / "r.svg")]
            return await asyncio.to_thread(main, ["bench", "serve", *flags]), server

    code, server = asyncio.run(go())
    out, err = capsys.readouterr()
    assert code == 0, err
    assert "secret-key" not in out + err and all("Authorization: Bearer secret-key\r\n" in head for head in server.heads)
    assert "http 429" in out and "83.3 % kept first token 5000 ms" in out and "75.0" in out and "6 of 6" in err
    found = json.loads((tmp_path / "r.json").read_text())
    assert found["kind"] == "dsv3 bench" and found["what"] == "serve" and found["subject"]["model"] == "small"
    assert found["outcome"]["errors"] == {"http 429": 1} and found["outcome"]["whole"] == 5 and len(found["requests"]) == 6
    assert found["outcome"]["tokens_s"] == pytest.approx(10 / found["outcome"]["seconds"])
    assert all(len(r["arrivals"]) == 2 for r in found["requests"] if r["error"] is None)
    assert (tmp_path / "r.svg").read_text().startswith("<svg") and sorted(p.name for p in tmp_path.iterdir()) == [
        "key", "r.json", "r.svg"]  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--url", "127.0.0.1:8000"], "is not http://HOST:PORT"), (["--url", "http://u:p@h"], "only a host"),
        (["--url", "http://h:99999"], "--url"), (["--rate", "0"], "--rate 0"), (["--rate", "nan"], "--rate nan"),
        (["--requests", "0"], "--requests 0"), (["--concurrency", "0"], "--concurrency 0"),
        (["--input-tokens", "9-3"], "the smaller number first"), (["--output-tokens", "x"], "such as 128"),
        (["--output-tokens", "0"], "at least 1"), (["--vocabulary", "3"], "more than 3"), (["--slo-itl", "-1"], "--slo-itl -1"),
        (["--key-file", "/nowhere"], "--key-file"), (["--plot", "x.pdf"], "SVG"), (["--json", "/nowhere/x"], "no folder"),
    ],
)  # fmt: skip
def test_wrong_flags(flags: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "serve", *flags]) == 2
    assert told in capsys.readouterr().err


def test_lengths_and_targets() -> None:
    assert lengths("5", "n") == Lengths(5, 5) and lengths("2-7", "n") == Lengths(2, 7)
    assert str(target("http://h/v1/")) == "http://h:80" and target("https://h/a/v1").path == "/a"
    assert target("https://h").port == 443 and str(target("http://[::1]:8000")) == "http://[::1]:8000"
    for key in ("", "a b", "ä", "a\r\nHost: x"):
        with pytest.raises(UsageError, match="key"):
            target("http://h", key)
    with pytest.raises(Failure, match="4 MiB"):
        Events().feed(b"data: " + b"x" * (5 << 20))
