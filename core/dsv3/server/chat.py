"""POST /v1/chat/completions."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

import msgspec
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from dsv3.engine.chat import Prompt
from dsv3.engine.request import Request, TokenLogprobs
from dsv3.errors import UsageError
from dsv3.server.answers import Answer, respond
from dsv3.server.errors import bad
from dsv3.server.grammars import after_reasoning, call_grammar
from dsv3.server.json_schemas import check_schema
from dsv3.server.options import grammar_of, options_of, seeds
from dsv3.server.schema import ChatRequest, Message, NamedTool, Tool
from dsv3.server.service import Flight, Service
from dsv3.server.turns import Turn


async def chat_completions(http: HttpRequest) -> Response:
    return await respond(http, ChatRequest, _Answer)


async def prompt_of(
    service: Service, messages: Sequence[Message] | None, tools: Sequence[Tool] = (), thinking: bool | None = None
) -> Prompt:
    """A conversation, ready for the assistant's turn."""
    plain: list[dict[str, Any]] = msgspec.to_builtins(list(messages or []))
    found = [_said({name: value for name, value in message.items() if value is not None}) for message in plain]
    offered = [{k: v for k, v in msgspec.to_builtins(tool).items() if v is not None} for tool in tools] or None
    try:
        return await asyncio.to_thread(service.chat.prompt, found, tools=offered, thinking=thinking)
    except UsageError as error:
        raise bad(str(error), "messages") from error
    except RecursionError as error:  # arguments of a call, as JSON
        raise bad("messages: something is nested too deeply", "messages") from error


def _said(message: dict[str, Any]) -> dict[str, Any]:
    """What an assistant refused with is what it said, to these models."""
    if message["role"] != "assistant":
        return message
    content = message.get("content", message.pop("refusal", None))
    if isinstance(content, list):
        content = [{"type": "text", "text": part.get("refusal", part.get("text"))} for part in content]
    return message if content is None else {**message, "content": content}


class _Answer(Answer[ChatRequest]):
    def __init__(self, service: Service, body: ChatRequest) -> None:
        super().__init__(service, body)
        self.tools = [] if body.tool_choice == "none" else body.tools or []
        self.head = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "object": "chat.completion.chunk" if body.stream else "chat.completion",
            "created": int(time.time()), "model": service.name, "system_fingerprint": service.fingerprint,
        }  # fmt: skip
        self.turns: list[Turn] = []

    async def requests(self, salt: bytes) -> list[Request]:
        body, service = self.body, self.service
        for tool in self.tools:
            check_schema(tool.function.parameters or {}, "tools")
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        if body.top_logprobs and not body.logprobs:
            raise bad("top_logprobs needs logprobs: true", "top_logprobs")
        prompt = await prompt_of(service, body.messages, self.tools, body.thinks)
        room = max(1, service.context - len(prompt.ids) - 2 * max(service.drafts, body.draft_tokens or 0) - 1)
        limit = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
        options = options_of(body, limit, logprobs, room, service.drafts)
        grammar = grammar_of(body.response_format)
        if (forced := self._forced()) is not None:
            options["stop"] = []  # all of it is a call
            if grammar is not None:
                raise bad("response_format cannot be combined with a tool_choice that asks for a call", "response_format")
            tools = [msgspec.to_builtins(tool) for tool in forced]
            grammar = await asyncio.to_thread(call_grammar, service.chat, service.tokenizer, tools)
        if grammar is not None:
            options["grammar"] = after_reasoning(grammar, service.tokenizer) if prompt.starts_in_reasoning else grammar
        found = await service.requests([prompt.ids], options, salt, "messages", seeds(body.seed, body.n or 1))
        self.turns = [Turn(service.chat, prompt, bool(self.tools), forced is not None) for _ in found]
        for request, turn in zip(found, self.turns, strict=True):
            request.stopless, request.unsearched = turn.splitter.opening, turn.splitter.thinking
        return found

    def _forced(self) -> list[Tool] | None:
        """The tools of which one must be called."""
        choice = self.body.tool_choice
        if choice is None or isinstance(choice, str):
            if choice == "required" and not self.tools:
                raise bad("tool_choice 'required' needs tools", "tool_choice")
            return self.tools if choice == "required" else None
        assert isinstance(choice, NamedTool)
        named = [tool for tool in self.tools if tool.function.name == choice.function.name]
        if not named:
            raise bad(f"tool_choice: there is no tool {choice.function.name!r}", "tool_choice")
        return named

    async def whole(self, flight: Flight) -> dict[str, Any]:
        try:
            async for piece in self.service.pieces(flight):
                self.turns[piece.index].take(piece.events, piece.done, flight.requests[piece.index].finish_reason)
        finally:
            self.service.end(flight)
        choices = []
        for n, (turn, r) in enumerate(zip(self.turns, flight.requests, strict=True)):
            found = r.result()
            logprobs = None if found.logprobs is None else {"content": self._logprobs(found.ids, found.logprobs)}
            choices.append(
                {"index": n, "message": turn.message(), "finish_reason": turn.reason(found.finish_reason), "logprobs": logprobs}
            )
        return {**self.head, "choices": choices, "usage": self.usage(flight)}

    async def chunks(self, flight: Flight) -> AsyncIterator[dict[str, Any]]:
        usage = {"usage": None} if self.shows_usage else {}
        sent = [0] * len(flight.requests)

        def chunk(n: int, delta: dict[str, Any], reason: str | None = None, logprobs: Any = None) -> dict[str, Any]:
            return {
                **self.head, "choices": [{"index": n, "delta": delta, "logprobs": logprobs, "finish_reason": reason}], **usage,
            }  # fmt: skip

        for n in range(len(flight.requests)):
            yield chunk(n, {"role": "assistant", "content": ""})
        async for piece in self.service.pieces(flight):
            n, r = piece.index, flight.requests[piece.index]
            logprobs = None
            if self.body.logprobs:
                new = [token for token, _ in piece.events if token >= 0]
                logprobs = {"content": self._logprobs(new, r.logprobs[sent[n] : sent[n] + len(new)])}
                sent[n] += len(new)
            for delta in self.turns[n].take(piece.events, piece.done, r.finish_reason):
                yield chunk(n, delta, None, logprobs)
                logprobs = None
            if logprobs and logprobs["content"]:
                yield chunk(n, {}, None, logprobs)
            if piece.done:
                yield chunk(n, {}, self.turns[n].reason(r.finish_reason))
        if usage:
            yield {**self.head, "choices": [], "usage": self.usage(flight)}

    def _logprobs(self, ids: list[int], found: list[TokenLogprobs]) -> list[dict[str, Any]]:
        tokenizer = self.service.tokenizer

        def entry(token: int, value: float) -> dict[str, Any]:
            return {
                "token": tokenizer.piece_text(token), "logprob": max(value, -9999.0),
                "bytes": list(tokenizer.piece_bytes(token)),
            }  # fmt: skip

        return [
            {**entry(token, value), "top_logprobs": [entry(i, v) for i, v in most]}
            for token, (value, most) in zip(ids, found, strict=False)
        ]
