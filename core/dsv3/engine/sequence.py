"""One request on its way: its tokens, its text, and when it is done."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from dsv3.engine.options import Sampling, is_integer
from dsv3.engine.text import Detokenizer, StopFinder, Tokenizer
from dsv3.errors import UsageError

FinishReason = Literal["stop", "length"]


@dataclass
class Generation:
    """What came of a prompt. ids: new tokens without eos. stats: prompt_tokens, new_tokens, ttft_s (seconds to the
    first token), prefill_tok_s, decode_tok_s, steps, graph_steps (those of them that replayed a graph), drafted, accepted."""

    text: str
    ids: list[int]
    finish_reason: FinishReason
    stats: dict[str, float]


@dataclass
class Sequence:
    """A prompt and what follows it. `row` is its place in the batch; `draft` the token guessed to come next but one."""

    prompt: list[int]
    sampling: Sampling
    seed: int
    limit: int
    eos: frozenset[int]
    tokenizer: Tokenizer | None
    row: int = 0
    ids: list[int] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    draft: int | None = None
    started: float = field(default_factory=time.perf_counter)
    first_token: float = 0.0
    prefilled: float = 0.0
    ended: float = 0.0
    steps: int = 0
    graph_steps: int = 0
    drafted: int = 0
    accepted: int = 0

    def __post_init__(self) -> None:
        self._detokenizer = Detokenizer(self.tokenizer) if self.tokenizer else None
        self._stops = StopFinder(self.sampling.stop)
        if self.limit <= 0:
            self._end("length")

    @property
    def length(self) -> int:
        """Tokens known so far, the prompt's included."""
        return len(self.prompt) + len(self.ids)

    @property
    def done(self) -> bool:
        return self.finish_reason is not None

    @property
    def last(self) -> int:
        return self.ids[-1] if self.ids else self.prompt[-1]

    def token(self, position: int) -> int:
        """The token at a position of the whole sequence."""
        known = len(self.prompt)
        return self.prompt[position] if position < known else self.ids[position - known]

    def append(self, token: int) -> str:
        """Take a new token; returns the text that may be shown. Ends the sequence at eos, a stop string, or the limit."""
        if not self.ids and not self.first_token:
            self.first_token = time.perf_counter()
        if token in self.eos and not self.sampling.ignore_eos:
            return self._end("stop")
        self.ids.append(token)
        shown = self._show(self._stops.push(self._detokenizer.push(token)) if self._detokenizer else "")
        if self._stops.stopped:
            self._trim()
            return shown + self._end("stop")
        if len(self.ids) >= self.limit:
            return shown + self._end("length")
        return shown

    def _show(self, piece: str) -> str:
        if piece:
            self.pieces.append(piece)
        return piece

    def _end(self, reason: FinishReason) -> str:
        self.finish_reason = reason
        self.ended = time.perf_counter()
        self.draft = None
        if self._detokenizer is None or self._stops.stopped:
            return ""
        tail = self._show(self._stops.push(self._detokenizer.finish()))
        if self._stops.stopped:
            self.finish_reason = "stop"
            self._trim()
            return tail
        return tail + self._show(self._stops.finish())

    def _trim(self) -> None:
        """Drop the ids that only the stop string needed, so that text and ids say the same."""
        assert self.tokenizer is not None
        text = "".join(self.pieces)
        while self.ids and self.tokenizer.decode(self.ids[:-1]).startswith(text):
            self.ids.pop()

    def result(self) -> Generation:
        text, count = "".join(self.pieces), len(self.ids)
        first = self.first_token or self.ended
        prefill, decode = first - (self.prefilled or first), self.ended - first
        stats = {
            "prompt_tokens": len(self.prompt),
            "new_tokens": count,
            "ttft_s": first - self.started,
            "prefill_tok_s": len(self.prompt) / prefill if prefill > 0 else 0.0,
            "decode_tok_s": (count - 1) / decode if decode > 0 and count > 1 else 0.0,
            "steps": self.steps,
            "graph_steps": self.graph_steps,
            "drafted": self.drafted,
            "accepted": self.accepted,
        }
        return Generation(text, list(self.ids), self.finish_reason or "length", stats)


def as_ids(prompt: Any) -> list[int]:
    """Token ids as plain integers, from a sequence of integers or a one-dimensional integer tensor; UsageError otherwise."""
    if isinstance(prompt, Tensor):
        if prompt.is_floating_point() or prompt.dtype == torch.bool or prompt.numel() != (prompt.shape or (0,))[-1]:
            raise UsageError(f"a tensor of {prompt.dtype} {list(prompt.shape)} is no list of token ids")
        return [int(i) for i in prompt.flatten().tolist()]
    if isinstance(prompt, str | bytes) or not isinstance(prompt, Iterable):
        raise UsageError(f"{prompt!r} is no list of token ids")
    found = list(prompt)
    wrong = next((i for i in found if not is_integer(i)), None)
    if wrong is not None:
        raise UsageError(f"{wrong!r} is no token id; expected integers")
    return [int(i) for i in found]
