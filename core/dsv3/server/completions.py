"""POST /v1/completions."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from dsv3.engine.request import Request, TokenLogprobs
from dsv3.server.answers import Answer, respond
from dsv3.server.errors import bad
from dsv3.server.limits import MAX_N, MAX_PROMPTS
from dsv3.server.options import grammar_of, options_of, seeds
from dsv3.server.schema import CompletionRequest
from dsv3.server.service import Flight, Service

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

    async def requests(self, salt: bytes) -> list[Request]:
        body, service = self.body, self.service
        n = body.n or 1
        if body.suffix:
            raise bad("suffix is not supported: these models do not fill in", "suffix")
        if body.best_of not in (None, n):
            raise bad("best_of other than n is not supported", "best_of")
        if body.echo and body.logprobs is not None:
            raise bad("echo together with logprobs is not supported", "echo")
        prompts = _prompts(body.prompt)
        if len(prompts) > MAX_PROMPTS or len(prompts) * n > MAX_PROMPTS * MAX_N // 4:
            raise bad(f"{len(prompts)} prompts with {n} answers each are too many", "prompt")
        options = options_of(body, body.max_tokens, body.logprobs, _TOKENS, service.drafts)
        if (grammar := grammar_of(body.response_format)) is not None:
            options["grammar"] = grammar
        found: list[Request] = []
        for prompt in prompts:
            ids = await service.prompt_ids(prompt)
            for seed in seeds(body.seed, n):
                found += await service.requests([ids], {**options, "seed": seed}, salt)
            self.echoed += [self._shown(prompt)] * n
        return found

    def _shown(self, prompt: Any) -> str:
        if not self.body.echo:
            return ""
        return prompt if isinstance(prompt, str) else self.service.tokenizer.decode(prompt)

    async def whole(self, flight: Flight) -> dict[str, Any]:
        try:
            async for _ in self.service.pieces(flight):
                pass
        finally:
            self.service.end(flight)
        choices = []
        for n, (r, echoed) in enumerate(zip(flight.requests, self.echoed, strict=True)):
            found = r.result()
            logprobs = None if found.logprobs is None else self._logprobs(found.ids, found.logprobs, 0)
            choices.append(
                {"index": n, "text": echoed + found.text, "finish_reason": found.finish_reason, "logprobs": logprobs}
            )
        return {**self.head, "choices": choices, "usage": self.usage(flight)}

    async def chunks(self, flight: Flight) -> AsyncIterator[dict[str, Any]]:
        usage = {"usage": None} if self.shows_usage else {}
        sent, offset = [0] * len(flight.requests), [0] * len(flight.requests)
        async for piece in self.service.pieces(flight):
            n, r = piece.index, flight.requests[piece.index]
            text = "".join(text for _, text in piece.events)
            logprobs = None
            if self.body.logprobs is not None:
                new = [token for token, _ in piece.events if token >= 0]
                logprobs = self._logprobs(new, r.logprobs[sent[n] : sent[n] + len(new)], offset[n])
                sent[n] += len(new)
            if not offset[n] and self.echoed[n]:
                text = self.echoed[n] + text
                self.echoed[n] = ""
            offset[n] += len(text)
            reason = r.finish_reason if piece.done else None
            if text or logprobs or piece.done:
                choice = {"index": n, "text": text, "logprobs": logprobs, "finish_reason": reason}
                yield {**self.head, "choices": [choice], **usage}
        if usage:
            yield {**self.head, "choices": [], "usage": self.usage(flight)}

    def _logprobs(self, ids: list[int], found: list[TokenLogprobs], offset: int) -> dict[str, Any]:
        name = self.service.tokenizer.piece_text
        offsets = []
        for token in ids:
            offsets.append(offset)
            offset += len(name(token))
        return {
            "tokens": [name(token) for token in ids],
            "token_logprobs": [value for value, _ in found],
            "top_logprobs": [{name(i): v for i, v in most} for _, most in found],
            "text_offset": offsets,
        }


def _prompts(prompt: Any) -> list[Any]:
    """A string, a list of them, a list of ids, or a list of such lists."""
    if isinstance(prompt, str):
        return [prompt]
    if all(isinstance(part, str) for part in prompt):
        return list(prompt)
    if all(_is_id(part) for part in prompt):
        return [prompt]
    if all(isinstance(part, list) and part and all(_is_id(i) for i in part) for part in prompt):
        return list(prompt)
    raise bad("prompt is neither a string, nor a list of strings, of token ids, or of lists of token ids", "prompt")


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
