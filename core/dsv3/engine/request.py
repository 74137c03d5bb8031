"""One request on its way: its tokens, its text, where its cache lies, and when it is done. No torch."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Literal

from dsv3.engine.options import Sampling
from dsv3.engine.text import Detokenizer, StopFinder, Tokenizer

_SAME = -1
FinishReason = Literal["stop", "length"]
TokenLogprobs = tuple[float, list[tuple[int, float]]]


@dataclass
class Generation:
    """What came of a prompt. ids: new tokens without eos. stats: prompt_tokens, cached_tokens (of the prompt, found in the
    cache), new_tokens, ttft_s (seconds to the first token), prefill_tok_s, decode_tok_s, steps, graph_steps (those of them that
    replayed a graph), drafted, accepted, tokens_per_step (what drafts gain where a step with them takes as long as one without;
    compare decode_tok_s for what they gain here). logprobs: for every id its log probability and the likeliest [(id, log
    probability)], where asked for; prompt_logprobs: the same of the prompt's ids, None for the first."""

    text: str
    ids: list[int]
    finish_reason: FinishReason
    stats: dict[str, float]
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None


class Status(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    PREEMPTED = "preempted"
    FINISHED = "finished"
    ABORTED = "aborted"


@dataclass(eq=False)
class Request:
    """A prompt and what follows it.

    tokens: the prompt and all accepted tokens; computed: how many of them the cache holds, written: how many it held already
    when they are computed again (see `Scheduler`); filled: positions below which the MTP module's entries hold; blocks: where
    the cache of this request lies; drafts: tokens guessed to come next; k: how many are guessed. events: (token, its text),
    for who takes them away, no earlier than stop strings let the text be shown; pending: those that are held back. stopless:
    tokens from which on stop strings mean nothing, for calls of tools follow and not text; unsearched: tokens that are no text.
    """

    prompt: list[int]
    sampling: Sampling
    seed: int
    limit: int
    eos: frozenset[int]
    tokenizer: Tokenizer | None
    salt: bytes = b""
    stopless: frozenset[int] = frozenset()
    unsearched: frozenset[int] = frozenset()
    row: int = -1
    status: Status = Status.WAITING
    computed: int = 0
    written: int = 0
    filled: int = 0
    cached: int = 0
    blocks: list[int] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)
    drafts: list[int] = field(default_factory=list)
    draft_logits: Any = None
    k: int = 0
    pieces: list[str] = field(default_factory=list)
    pending: deque[tuple[int, str]] = field(default_factory=deque)
    events: list[tuple[int, str]] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=lambda: [None])
    finish_reason: FinishReason | None = None
    error: BaseException | None = None
    grammar: Any = None
    started: float = field(default_factory=time.perf_counter)
    first_token: float = 0.0
    prefilled: float = 0.0
    ended: float = 0.0
    steps: int = 0
    graph_steps: int = 0
    drafted: int = 0
    accepted: int = 0
    preempted: int = 0

    def __post_init__(self) -> None:
        self.tokens = list(self.prompt)
        self.k = self.sampling.draft_tokens if self.sampling.draft else 0
        self._detokenizer = Detokenizer(self.tokenizer) if self.tokenizer else None
        self._stops = StopFinder(self.sampling.stop)
        self._credit = 0  # characters that were shown of tokens that are still pending
        if self.limit <= 0 and not self.rates_prompt:
            self._end("length")

    @property
    def ids(self) -> list[int]:
        return self.tokens[len(self.prompt) :]

    @property
    def new(self) -> int:
        """Tokens after the prompt."""
        return len(self.tokens) - len(self.prompt)

    @property
    def done(self) -> bool:
        return self.status in (Status.FINISHED, Status.ABORTED)

    @property
    def drafting(self) -> bool:
        return self.sampling.draft is not None

    @property
    def rates_prompt(self) -> bool:
        """Whether log probabilities of its prompt are to come."""
        return self.sampling.prompt_logprobs is not None and len(self.prompt_logprobs) < len(self.prompt)

    @property
    def longest(self) -> int:
        """Tokens at its longest, with drafts that are written behind the last."""
        return len(self.prompt) + self.limit + self.spare

    @property
    def spare(self) -> int:
        """Positions behind the last token that a step may write to."""
        return 2 * self.sampling.draft_tokens + 1 if self.drafting else 1

    def append(self, token: int, logprobs: TokenLogprobs | None = None) -> str:
        """Take a new token; returns the text that may be shown. Ends the request at eos, a stop string, or the limit."""
        if not self.first_token:
            self.first_token = time.perf_counter()
        if self.limit <= 0:  # only its prompt was of interest
            return self._end("length")
        if token in self.eos and not self.sampling.ignore_eos:
            return self._end("stop")
        self.tokens.append(token)
        if self.grammar is not None:
            self.grammar.accept(token)
        if logprobs is not None:
            self.logprobs.append(logprobs)
        piece = self._detokenizer.push(token) if self._detokenizer else ""
        if token in self.stopless or token in self.unsearched:
            shown = self._show(self._stops.finish())
            self._stops = StopFinder(() if token in self.stopless else self._stops.stops)
            self.pending.append((token, piece))
            shown += self._show(piece)
        else:
            self.pending.append((token, piece))
            shown = self._show(self._stops.push(piece))
        if self._stops.stopped:
            self._trim()
            return shown + self._end("stop")
        if self.grammar is not None and self.grammar.finished:
            return shown + self._end("stop")
        if self.new >= self.limit:
            return shown + self._end("length")
        return shown

    def _show(self, text: str) -> str:
        """Text that may be shown, and with it the tokens whose text has been shown to its end. Tokens that had none wait for
        one that has where a stop string may take them back."""
        if text:
            self.pieces.append(text)
        self._credit += len(text)
        waits = self._stops.stopped or (self._stops.looks and not self.done)
        while self.pending and len(self.pending[0][1]) <= self._credit and (self._credit or not waits):
            self._credit -= len(self.pending[0][1])
            self.events.append(self.pending.popleft())
        if self._stops.stopped and self._credit:  # the stop string begins within a token
            token, piece = self.pending.popleft()
            self.events.append((token, piece[: self._credit]))
            self._credit = 0
        return text

    def take_events(self) -> list[tuple[int, str]]:
        """What came since the last time; token -1 is text that no token completed."""
        found, self.events = self.events, []
        return found

    def _end(self, reason: FinishReason) -> str:
        self.status, self.finish_reason = Status.FINISHED, reason
        self.ended = time.perf_counter()
        self.drafts = []
        if self._detokenizer is None or self._stops.stopped:
            return ""
        rest = self._detokenizer.finish()
        if rest:
            self.pending.append((_SAME, rest))
        tail = self._show(self._stops.push(rest))
        if self._stops.stopped:
            self.finish_reason = "stop"
            self._trim()
            return tail
        return tail + self._show(self._stops.finish())

    def _trim(self) -> None:
        """Drop the ids that only the stop string needed, so that text, ids and log probabilities say the same."""
        assert self.tokenizer is not None
        text = "".join(self.pieces)
        while self.new and self.tokenizer.decode(self.ids[:-1]).startswith(text):
            self.tokens.pop()
        del self.logprobs[self.new :]

    def result(self) -> Generation:
        first = self.first_token or self.ended
        prefill, decode = first - (self.prefilled or first), self.ended - first
        stats = {
            "prompt_tokens": len(self.prompt),
            "cached_tokens": self.cached,
            "new_tokens": self.new,
            "ttft_s": first - self.started,
            "prefill_tok_s": (len(self.prompt) - self.cached) / prefill if prefill > 0 else 0.0,
            "decode_tok_s": (self.new - 1) / decode if decode > 0 and self.new > 1 else 0.0,
            "steps": self.steps,
            "graph_steps": self.graph_steps,
            "drafted": self.drafted,
            "accepted": self.accepted,
            "tokens_per_step": self.new / self.steps if self.steps else 0.0,
        }
        logprobs = None if self.sampling.logprobs is None else list(self.logprobs)
        rated = None if self.sampling.prompt_logprobs is None else list(self.prompt_logprobs)
        return Generation("".join(self.pieces), self.ids, self.finish_reason or "length", stats, logprobs, rated)
