"""An assistant's turn as it comes: reasoning, content, calls of tools."""

from __future__ import annotations

import secrets
from typing import Any

from dsv3.engine.chat import ChatFormat, Prompt


class Turn:
    """Deltas for streams, and the whole message. tools: whether calls are looked for; forced: whether there is nothing else, so
    that what looks like text is the beginning of a call that was cut off."""

    def __init__(self, format: ChatFormat, prompt: Prompt, tools: bool, forced: bool = False) -> None:
        self._forced = forced
        self.splitter = format.splitter(prompt, tools)
        self._reasoning: list[str] = []
        self._content: list[str] = []
        self._calls: list[dict[str, Any]] = []

    def take(self, events: list[tuple[int, str]], done: bool, reason: str | None = None) -> list[dict[str, Any]]:
        """New tokens with their texts -> deltas. reason: why it is done."""
        found = [event for token, text in events for event in self.splitter.push(token, text)]
        if done:
            found += self.splitter.finish(cut=reason == "length")
        return [delta for event in found if (delta := self._delta(event)) is not None]

    def _delta(self, event: Any) -> dict[str, Any] | None:
        if event.kind == "reasoning":
            self._reasoning.append(event.text)
            return {"reasoning_content": event.text}
        if event.kind == "content" and not self._forced:
            self._content.append(event.text)
            return {"content": event.text}
        if event.kind == "call":
            function = {"name": event.text, "arguments": ""}
            call = {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}
            self._calls.append(call)
            return {"tool_calls": [{**call, "index": len(self._calls) - 1, "function": dict(function)}]}
        if event.kind == "arguments" and self._calls:
            self._calls[-1]["function"]["arguments"] += event.text
            return {"tool_calls": [{"index": len(self._calls) - 1, "function": {"arguments": event.text}}]}
        return None

    def message(self) -> dict[str, Any]:
        """What was said, whole."""
        content: str | None = "".join(self._content)
        said = content if content or not self._calls else None
        found: dict[str, Any] = {"role": "assistant", "content": said, "refusal": None}
        if self._reasoning:
            found["reasoning_content"] = "".join(self._reasoning)
        if self._calls:
            found["tool_calls"] = self._calls
        return found

    def reason(self, finished: str | None) -> str | None:
        return "tool_calls" if self._calls and finished == "stop" else finished
