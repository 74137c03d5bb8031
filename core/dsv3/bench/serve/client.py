"""One request: sent, and when each piece of its answer came."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass, field
from typing import Any

from dsv3.bench.serve.events import Events
from dsv3.bench.serve.http import Failure, Response, Target, request

_ERROR_BYTES = 1 << 16


@dataclass(frozen=True)
class Question:
    """A request to make. planned: seconds after the start; output_tokens: how many are asked for."""

    index: int
    planned: float
    prompt: list[int]
    output_tokens: int


@dataclass
class Sample:
    """What came of a question. Times are seconds after the start of the run. start: before the connection is made; arrivals: of
    every event that carries text; end: of the answer, or its failure. tokens: by the server's count (`counted`), else the
    number of arrivals. error: a `Failure`'s kind, None if the answer is whole; detail: its message."""

    index: int
    input_tokens: int
    asked_tokens: int
    planned: float
    start: float = 0.0
    end: float = 0.0
    arrivals: list[float] = field(default_factory=list)
    tokens: int = 0
    counted: bool = False
    finish_reason: str | None = None
    cached_tokens: int = 0
    drafted: int = 0
    accepted: int = 0
    error: str | None = None
    detail: str = ""

    @property
    def ttft(self) -> float | None:
        """Seconds to the first token, the connection included."""
        return self.arrivals[0] - self.start if self.arrivals else None

    @property
    def itl(self) -> list[float]:
        """Seconds between events with text, each of one token or, with drafts, several."""
        return [b - a for a, b in zip(self.arrivals, self.arrivals[1:], strict=False)]

    @property
    def per_token(self) -> float | None:
        """Mean seconds of a token after the first (TPOT; Zhong et al. 2024); None where there is no second."""
        return (self.arrivals[-1] - self.arrivals[0]) / (self.tokens - 1) if self.arrivals and self.tokens > 1 else None


async def ask(where: Target, model: str, question: Question, began: float, timeout: float) -> Sample:
    """Failures are part of the sample. began: the run's start, by time.perf_counter. timeout: seconds of the whole request."""
    q = question
    sample = Sample(q.index, len(q.prompt), q.output_tokens, q.planned, start=time.perf_counter() - began)
    body = {
        "model": model, "prompt": q.prompt, "max_tokens": q.output_tokens, "ignore_eos": True, "stream": True,
        "stream_options": {"include_usage": True},
    }  # fmt: skip
    try:
        async with asyncio.timeout(timeout):
            async with request(where, "POST", "/v1/completions", json.dumps(body).encode()) as response:
                await _take(response, sample, began)
    except TimeoutError:
        sample.error, sample.detail = "timeout", f"no end after {timeout:g} s"
    except Failure as failure:
        sample.error, sample.detail = failure.kind, str(failure)
    sample.end = time.perf_counter() - began
    if not sample.counted:
        sample.tokens = len(sample.arrivals)
    return sample


async def _take(response: Response, sample: Sample, began: float) -> None:
    """Until [DONE]. Failure for every other end."""
    if response.status != 200:
        raise Failure(f"http {response.status}", told(await response.read(_ERROR_BYTES)))
    kind = response.headers.get("content-type", "none")
    if not kind.lower().startswith("text/event-stream"):
        raise Failure("malformed", f"a stream was asked for, and the content type is {kind!r}")
    events = Events()
    async for piece in response.pieces():
        now = time.perf_counter() - began
        for data in events.feed(piece):
            if data == "[DONE]":
                if sample.finish_reason is None:
                    raise Failure("malformed", "[DONE] without a finish_reason")
                return
            _note(_object(data), sample, now)
    raise Failure("disconnect", "the stream ended without [DONE]")


def _object(data: str) -> dict[str, Any]:
    try:
        found = json.loads(data)
    except (json.JSONDecodeError, RecursionError) as error:
        raise Failure("malformed", f"an event is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise Failure("malformed", f"an event is not an object: {data[:40]!r}")
    return found


def _note(chunk: dict[str, Any], sample: Sample, now: float) -> None:
    if chunk.get("error"):
        raise Failure("server", told(json.dumps(chunk).encode()))
    try:
        for choice in chunk.get("choices") or ():
            if choice.get("text"):
                sample.arrivals.append(now)
            sample.finish_reason = choice.get("finish_reason") or sample.finish_reason
        if usage := chunk.get("usage"):
            sample.tokens, sample.counted = int(usage["completion_tokens"]), True
            more = usage.get("dsv3") or {}
            sample.cached_tokens = int(more.get("cached_tokens", 0))
            sample.drafted, sample.accepted = int(more.get("drafted", 0)), int(more.get("accepted", 0))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise Failure("malformed", f"an event is not a completion's: {type(error).__name__} {error}") from error


def told(body: bytes) -> str:
    """The message of an error's body, else its beginning."""
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return body[:200].decode("utf-8", "replace")
