"""POST /v1/completions."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from dsv3.engine.request import Request, TokenLogprobs
from dsv3.engine.text import Detokenizer
from dsv3.server.answers import Answer, respond
from dsv3.server.errors import bad
from dsv3.server.limits import MAX_N, MAX_PROMPTS, MAX_RATED
from dsv3.server.options import grammar_of, options_of, seeds
from dsv3.server.schema import CompletionRequest
from dsv3.server.service import Flight, Service

_LEAST = -9999.0  # JSON has no infinity
_TOKENS = 16  # where no number is asked for, as OpenAI's API has it


async def completions(http: HttpRequest) -> Response:
    return await respond(http, CompletionRequest, _Answer)


class _Answer(Answer[CompletionRequest]):
    def __init__(self, service: Service, body: CompletionRequest) -> None:
        super().__init__(service, body)
        self.head = {
            "id": f"cmpl-{secrets.token_hex(12)}", "object": "text_completion", "created": int(time.time()),
            "model": service.name, "system_fingerprint": service.fingerprint,
        }  # fmt: skip
        self.echoed: list[str] = []
        self.told: list[int] = []  # new tokens whose log probabilities were sent; -1 before anything was
        self.length: list[int] = []  # of the text before what comes next, in characters

    async def requests(self, salt: bytes) -> list[Request]:
        body, service = self.body, self.service
        n = body.n or 1
        if body.suffix:
            raise bad("suffix is not supported: these models do not fill in", "suffix")
        if body.best_of not in (None, n):
            raise bad("best_of other than n is not supported", "best_of")
        prompts = _prompts(body.prompt)
        if len(prompts) > MAX_PROMPTS or len(prompts) * n > MAX_PROMPTS * MAX_N // 4:
            raise bad(f"{len(prompts)} prompts with {n} answers each are too many", "prompt")
        options = options_of(body, body.max_tokens, body.logprobs, _TOKENS, service.drafts)
        if body.echo:
            options["prompt_logprobs"] = body.logprobs
        if (grammar := grammar_of(body.response_format)) is not None:
            options["grammar"] = grammar
        ids = [await service.prompt_ids(prompt) for prompt in prompts]
        count = sum(map(len, ids)) * n
        if body.echo and body.logprobs is not None and count * (1 + body.logprobs) > MAX_RATED:
            raise bad(f"logprobs of {count} tokens of prompts are too many; ask for fewer of the likeliest", "logprobs")
        found = await service.requests(ids, options, salt, "prompt", seeds(body.seed, n))
        shown = [await asyncio.to_thread(self._shown, prompt) for prompt in prompts] if body.echo else [""] * len(prompts)
        self.echoed = [text for text in shown for _ in range(n)]
        self.told, self.length = [-1] * len(found), [0] * len(found)
        return found

    def _shown(self, prompt: Any) -> str:
        return prompt if isinstance(prompt, str) else self.service.tokenizer.decode(prompt)

    async def whole(self, flight: Flight) -> dict[str, Any]:
        events: list[list[tuple[int, str]]] = [[] for _ in flight.requests]
        try:
            async for piece in self.service.pieces(flight):
                events[piece.index] += piece.events
        finally:
            self.service.end(flight)
        choices = []
        for n, (r, echoed) in enumerate(zip(flight.requests, self.echoed, strict=True)):
            text, reason = echoed + r.result().text, r.finish_reason
            choices.append({"index": n, "text": text, "finish_reason": reason, "logprobs": self._logprobs(n, r, events[n])})
        return {**self.head, "choices": choices, "usage": self.usage(flight)}

    async def chunks(self, flight: Flight) -> AsyncIterator[dict[str, Any]]:
        usage = {"usage": None} if self.shows_usage else {}
        begun = [False] * len(flight.requests)
        async for piece in self.service.pieces(flight):
            n, r = piece.index, flight.requests[piece.index]
            text = ("" if begun[n] else self.echoed[n]) + "".join(text for _, text in piece.events)
            begun[n] = True
            logprobs = self._logprobs(n, r, piece.events)
            reason = r.finish_reason if piece.done else None
            if text or self.body.logprobs is not None or piece.done:
                choice = {"index": n, "text": text, "logprobs": logprobs, "finish_reason": reason}
                yield {**self.head, "choices": [choice], **usage}
        if usage:
            yield {**self.head, "choices": [], "usage": self.usage(flight)}

    def _logprobs(self, n: int, r: Request, events: list[tuple[int, str]]) -> dict[str, Any] | None:
        """Of new tokens with their texts, and before the first of the prompt's where it is echoed: how each is written, and
        where in the text it begins."""
        if self.body.logprobs is None:
            return None
        found: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        if self.told[n] < 0:
            self.told[n] = 0
            if self.body.echo:
                growing = Detokenizer(self.service.tokenizer)
                for token, rated in zip(r.prompt, r.prompt_logprobs, strict=True):
                    self._add(found, n, token, rated)
                    self.length[n] += len(growing.push(token))
                self.length[n] = len(self.echoed[n])
        for token, text in events:
            if token >= 0:
                self._add(found, n, token, r.logprobs[self.told[n]])
                self.told[n] += 1
            self.length[n] += len(text)
        return found

    def _add(self, found: dict[str, Any], n: int, token: int, rated: TokenLogprobs | None) -> None:
        name = self.service.tokenizer.piece_name
        found["tokens"].append(name(token))
        found["token_logprobs"].append(None if rated is None else max(rated[0], _LEAST))
        found["top_logprobs"].append(None if rated is None else _by_name([(name(i), i, max(v, _LEAST)) for i, v in rated[1]]))
        found["text_offset"].append(self.length[n])


def _by_name(most: list[tuple[str, int, float]]) -> dict[str, float]:
    """Two tokens may be written alike: the less likely one goes by its id then."""
    found: dict[str, float] = {}
    for name, token, value in most:
        found[f"token_id:{token}" if name in found else name] = value
    return found


def _prompts(prompt: Any) -> list[Any]:
    """A string, a list of them, a list of ids, or a list of such lists; none is the beginning of a text."""
    if prompt is None or isinstance(prompt, str):
        return [prompt or ""]
    if all(isinstance(part, str) for part in prompt):
        return list(prompt)
    if all(_is_id(part) for part in prompt):
        return [prompt]
    if all(isinstance(part, list) and part and all(_is_id(i) for i in part) for part in prompt):
        return list(prompt)
    raise bad("prompt is neither a string, nor a list of strings, of token ids, or of lists of token ids", "prompt")


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
