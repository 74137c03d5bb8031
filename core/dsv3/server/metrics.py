"""Figures for /metrics, in a registry of its own."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from dsv3.engine.request import Request

if TYPE_CHECKING:
    from dsv3.engine.engine import Engine
    from dsv3.server.service import Flight

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """Names begin with dsv3_; times in seconds."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"dsv3_{name}", text, labels, registry=self.registry)

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(f"dsv3_{name}", text, registry=self.registry)

        self.answers = counter("http_requests", "answers by route and status", "route", "status")
        self.refused = counter("refused_requests", "requests that were told to come later")
        self.prompt_tokens = counter("prompt_tokens", "tokens of prompts")
        self.cached_tokens = counter("cached_tokens", "of these, found in the cache")
        self.new_tokens = counter("generated_tokens", "tokens generated")
        self.drafted = counter("drafted_tokens", "tokens guessed by the MTP module")
        self.accepted = counter("accepted_tokens", "of these, accepted")
        self.preemptions = counter("preemptions", "requests that lost their place in the cache for a while")
        self.finished = counter("finished_requests", "requests by how they ended", "reason")
        self.running = gauge("running_requests", "requests in the batch")
        self.waiting = gauge("waiting_requests", "requests that wait for a place")
        self.free_blocks = gauge("free_cache_blocks", "blocks of the cache that nobody holds")
        self.blocks = gauge("cache_blocks", "blocks of the cache")
        self.ttft = Histogram("dsv3_time_to_first_token_seconds", "from submission", buckets=_SECONDS, registry=self.registry)
        self.itl = Histogram("dsv3_inter_token_seconds", "between tokens", buckets=_SECONDS, registry=self.registry)

    def progress(self, request: Request, flight: Flight, tokens: int) -> None:
        """New tokens of a request, or its end."""
        now = time.perf_counter()
        if tokens and request not in flight.begun:
            flight.begun.add(request)
            self.ttft.observe(request.first_token - request.started)
        elif tokens:
            for _ in range(tokens):
                self.itl.observe((now - flight.last) / tokens)
        flight.last = now
        if request.done:
            self.ended(request)

    def ended(self, request: Request) -> None:
        """Whoever ended it."""
        self.finished.labels(request.finish_reason or "aborted").inc()
        self.prompt_tokens.inc(len(request.prompt))
        self.cached_tokens.inc(request.cached)
        self.new_tokens.inc(request.new)
        self.drafted.inc(request.drafted)
        self.accepted.inc(request.accepted)
        self.preemptions.inc(request.preempted)

    def text(self, engine: Engine) -> bytes:
        """The exposition, with the engine's state of this moment."""
        waiting = engine.backlog()
        self.running.set(engine.running)
        self.waiting.set(waiting.requests)
        self.free_blocks.set(engine.pool.free)
        self.blocks.set(engine.pool.total)
        return bytes(generate_latest(self.registry))
