"""Between HTTP and the engine: admission, streams of what is generated, and their end, whoever ends them."""

from __future__ import annotations

import asyncio
import functools
import hashlib
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from dsv3.engine.chat import ChatFormat
from dsv3.engine.engine import Engine
from dsv3.engine.grammar import Allowance
from dsv3.engine.model import Model
from dsv3.engine.request import Request, Status
from dsv3.engine.text import Tokenizer
from dsv3.errors import Dsv3Error, UsageError
from dsv3.server.errors import ApiError, bad
from dsv3.server.limits import STREAM_BYTES, Limits
from dsv3.server.metrics import Metrics

T = TypeVar("T")


@dataclass
class Piece:
    """New tokens of one of several requests: (token, text), with its log probability where asked for; done at its end."""

    index: int
    events: list[tuple[int, str]]
    done: bool


@dataclass(eq=False)
class Flight:
    """Requests that belong to one HTTP request, and what came of them and was not sent yet."""

    requests: list[Request]
    loop: asyncio.AbstractEventLoop
    mail: asyncio.Queue[Piece] = field(default_factory=asyncio.Queue)
    unread: int = 0
    begun: set[Request] = field(default_factory=set)
    last: float = field(default_factory=time.perf_counter)


class Service:
    """One model for all connections. drafts: how many tokens the MTP module guesses where a request says nothing."""

    def __init__(self, model: Model, engine: Engine, name: str, limits: Limits, metrics: Metrics, drafts: int = 0) -> None:
        self.model, self.engine, self.name, self.limits, self.metrics = model, engine, name, limits, metrics
        self.drafts = drafts if model.graph.mtp else 0
        if model.tokenizer is None:
            raise UsageError("this model's folder has no tokenizer.json; a server needs one")
        self.tokenizer: Tokenizer = model.tokenizer
        self.created = int(time.time())
        self.draining = False
        self._flights: set[Flight] = set()
        self._lock = threading.Lock()
        self._index: dict[Request, tuple[Flight, int]] = {}
        about = f"{model.placement().summary} {model.config!r}"
        self.fingerprint = "fp_" + hashlib.sha256(about.encode()).hexdigest()[:12]

    @property
    def streams(self) -> int:
        return len(self._flights)

    @property
    def chat(self) -> ChatFormat:
        """How the model reads conversations; ApiError where it reads none."""
        try:
            return self.model.chat_format
        except UsageError as error:
            raise bad(str(error)) from error

    @functools.cached_property
    def thinks(self) -> bool:
        """Whether it can be asked to reason, or not to."""
        for thinking in (True, False):
            try:
                self.model.chat_format.prompt([{"role": "user", "content": "?"}], thinking=thinking)
            except UsageError:
                return False
        return True

    @property
    def context(self) -> int:
        """Tokens that a prompt and its answer may have together."""
        return min(self.model.config.max_position_embeddings, self.engine.pool.total * self.engine.pool.size)

    def usage(self, requests: Sequence[Request], n: int) -> dict[str, Any]:
        """OpenAI's usage of n answers to each prompt, which counts once; "dsv3" is an extension."""
        prompt, cached = sum(len(r.prompt) for r in requests[::n]), sum(r.cached for r in requests[::n])
        new = sum(r.new for r in requests)
        found = requests[0].result().stats
        own = {name: found[name] for name in ("ttft_s", "decode_tok_s")}
        own |= {name: sum(getattr(r, name) for r in requests) for name in ("drafted", "accepted", "steps")}
        return {
            "prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new,
            "prompt_tokens_details": {"cached_tokens": cached},
            "completion_tokens_details": {"accepted_prediction_tokens": own["accepted"]},
            "dsv3": {**own, "cached_tokens": cached},
        }  # fmt: skip

    def check_model(self, name: str) -> None:
        if name and name != self.name:
            raise ApiError(404, f"the model {name!r} does not exist; this server has {self.name!r}", "model", "model_not_found")

    async def requests(
        self, prompts: Sequence[Any], options: dict[str, Any], salt: bytes, param: str, seeds: Sequence[int | None]
    ) -> list[Request]:
        """Checked requests, see `Model.requests`; the loop compiles no grammars. param: where the prompts come from."""
        return await self._aside(param, self.model.requests, prompts, options, salt, seeds)

    async def prompt_ids(self, prompt: Any) -> list[int]:
        """Of a text or of ids, checked; tokenising is not done by the loop."""
        return await self._aside("prompt", self.model.prompt_ids, prompt)

    async def _aside(self, param: str, work: Callable[..., T], *arguments: Any) -> T:
        try:
            return await asyncio.to_thread(work, *arguments)
        except UsageError as error:
            raise _wrong(error, param) from error

    def start(self, requests: list[Request]) -> Flight:
        """Hand requests to the engine; ApiError 429 or 503 where it has too much to do."""
        if self.draining:
            raise ApiError(503, "the server is stopping; try another, or later", code="draining", headers={"Retry-After": "5"})
        waiting = self.engine.backlog()
        if waiting.requests + len(requests) > self.limits.queue or waiting.tokens > self.limits.queue_tokens:
            self.metrics.refused.inc()
            raise ApiError(
                429, f"{waiting.requests} requests are waiting already; try again later", code="overloaded",
                headers={"Retry-After": "1"},
            )  # fmt: skip
        flight = Flight(requests, asyncio.get_running_loop())
        allowance = Allowance()
        for request in requests:
            if request.grammar is not None:
                request.grammar.allowance = allowance
        with self._lock:
            self._flights.add(flight)
            for n, request in enumerate(requests):
                self._index[request] = flight, n
        try:
            self.engine.submit(requests, self._tell)
        except UsageError as error:
            self.end(flight)
            raise bad(str(error), "max_tokens") from error
        except Dsv3Error as error:
            self.end(flight)
            raise ApiError(503, str(error), code="draining") from error
        return flight

    async def pieces(self, flight: Flight) -> AsyncIterator[Piece]:
        """What comes of a flight, until all its requests are done. Raises ApiError for one that failed."""
        open_ = len(flight.requests)
        while open_:
            piece = await flight.mail.get()
            flight.unread -= sum(len(text) for _, text in piece.events)
            if piece.done:
                open_ -= 1
                request = flight.requests[piece.index]
                if isinstance(request.error, UsageError):  # such as a grammar that became too costly
                    raise _wrong(request.error, None)
                if request.status is Status.ABORTED:
                    raise ApiError(500, f"the generation failed: {request.error or 'it was ended'}")
            yield piece

    def end(self, flight: Flight) -> None:
        """Whatever of it still runs, stops."""
        with self._lock:
            self._flights.discard(flight)
            for request in flight.requests:
                self._index.pop(request, None)
        left = [r for r in flight.requests if not r.done]
        for request in left:
            self.metrics.ended(request)
        self.engine.abort(left)

    def _tell(self, request: Request, text: str) -> None:
        """Called by the engine's thread."""
        found = self._index.get(request)
        if found is None:
            return
        flight, index = found
        events, done = request.take_events(), request.done
        self.metrics.progress(request, flight, len(events))
        if not events and not done:
            return
        flight.unread += sum(len(piece) for _, piece in events)
        if flight.unread > STREAM_BYTES and not done:
            self.engine.abort(flight.requests, Dsv3Error("the client does not read its stream"))
        try:
            flight.loop.call_soon_threadsafe(flight.mail.put_nowait, Piece(index, events, done))
        except RuntimeError:  # the loop has ended
            self.engine.abort(flight.requests)


def _wrong(error: UsageError, param: str | None) -> ApiError:
    """param: what is wrong where the error does not begin with its name."""
    text = str(error)
    if text.startswith(("grammar", "the grammar", "a grammar")):
        param = "response_format"
    elif text.startswith("logit_bias"):
        param = "logit_bias"
    return bad(text, param, "context_length_exceeded" if "this model reads at most" in text else None)
