"""Conversations to token ids: the family's format, or the template of the model's own folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dsv3.engine.conversation import arguments_of, messages_of, tools_of
from dsv3.engine.guard import Control, Guard
from dsv3.engine.markup import DSML, MarkupSplitter
from dsv3.engine.split import Splitter, Syntax
from dsv3.engine.template import Template
from dsv3.engine.text import Tokenizer
from dsv3.errors import UsageError, nearest
from dsv3.resources import resources

_SYNTAX: dict[str, Syntax] = {
    "deepseek_v3": "v3",
    "deepseek_r1": "v3",
    "deepseek_v31": "v3.1",
    "deepseek_v32": "dsml",
}
_MARKER = {"v3": "<｜tool▁sep｜>", "v3.1": "<｜tool▁sep｜>", "dsml": DSML}  # without this token there are no calls
_CALLS = {
    "v3": (
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>NAME\n```json\nARGUMENTS\n```<｜tool▁call▁end｜>"
        "<｜tool▁calls▁end｜>",
        "with a line break between two calls",
    ),
    "v3.1": (
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>NAME<｜tool▁sep｜>ARGUMENTS<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        "with nothing between two calls",
    ),
    "dsml": (
        f'<{DSML}function_calls>\n<{DSML}invoke name="NAME">\n'
        f'<{DSML}parameter name="KEY" string="true">VALUE</{DSML}parameter>\n'
        f"</{DSML}invoke>\n</{DSML}function_calls>",
        "each from invoke to invoke on lines of its own. There is a parameter line for every argument; a VALUE that is no "
        'string is JSON, and its line says string="false"',
    ),
}


@dataclass(frozen=True)
class Prompt:
    """A conversation ready for the assistant's turn. starts_in_reasoning: it ends with an open `<think>`."""

    text: str
    ids: list[int]
    starts_in_reasoning: bool


class ChatFormat:
    """How a model reads conversations. family: "deepseek_v3", "deepseek_r1", "deepseek_v31", "deepseek_v32", or "own" for the
    folder's template. syntax: how it writes tool calls, None if it writes none that dsv3 reads."""

    def __init__(self, tokenizer: Tokenizer, family: str, source: str, syntax: Syntax | None) -> None:
        self.family = family
        self.syntax: Syntax | None = syntax if syntax and tokenizer.token_id(_MARKER[syntax]) is not None else None
        self._tokenizer = tokenizer
        self._control = Control(tokenizer)
        self._template = Template(source, own=family == "own")

    @classmethod
    def of(cls, tokenizer: Tokenizer, family: str | None = None) -> ChatFormat:
        """The format of a tokenizer's model. family: take this one, whatever the folder holds.

        Else the folder's own template wins; without one, DeepSeek-V3.2's format where the folder holds its encoder, else V3's
        where the tokenizer has its markers (R1's tokenizer is the same: name the family). UsageError where there is none.
        """
        if family is None:
            if tokenizer.template is not None:
                return cls(tokenizer, "own", tokenizer.template, _own_syntax(tokenizer.template))
            family = "deepseek_v32" if tokenizer.encoder else "deepseek_v3"
        if family not in _SYNTAX:
            raise UsageError(f"chat format {family!r}; expected one of {', '.join(_SYNTAX)}{nearest(family, _SYNTAX)}")
        if tokenizer.token_id("<｜User｜>") is None:
            raise UsageError("this model has no chat template; use a plain prompt")
        thinks = family != "deepseek_v3"
        if thinks and tokenizer.token_id("</think>") is None:
            raise UsageError(f"chat format {family}: this model's tokenizer has no token </think>; use another format")
        source = resources("configs", "templates", f"{family}.jinja").read_text(encoding="utf-8")
        return cls(tokenizer, family, source, _SYNTAX[family])

    def prompt(self, messages: Any, *, tools: Any = None, thinking: bool | None = None) -> Prompt:
        """messages: OpenAI's, see `messages_of`; tools: OpenAI's function tools. thinking: ask for reasoning, or for none; None
        leaves it to the format (R1 reasons, the others do not). What is said in messages and tools never becomes a control
        token. UsageError for what the format cannot say."""
        guard = Guard(self._control)
        rendered, reasoning = self._render(guard, messages, tools, thinking)
        return Prompt(guard.plain(rendered), guard.ids(rendered), reasoning)

    def render(self, messages: Any, *, tools: Any = None, thinking: bool | None = None) -> str:
        """The text of `prompt`."""
        guard = Guard(self._control)
        return guard.plain(self._render(guard, messages, tools, thinking)[0])

    def ids(self, messages: Any, *, tools: Any = None, thinking: bool | None = None) -> list[int]:
        """The token ids of `prompt`."""
        return self.prompt(messages, tools=tools, thinking=thinking).ids

    def splitter(self, prompt: Prompt, tools: bool = True) -> Splitter:
        """What takes the answer to a prompt apart; without tools it looks for no calls."""
        if tools and self.syntax == "dsml":
            return MarkupSplitter(self._tokenizer, prompt.starts_in_reasoning)
        return Splitter(self._tokenizer, self.syntax if tools else None, prompt.starts_in_reasoning)

    def _render(self, guard: Guard, messages: Any, tools: Any, thinking: bool | None) -> tuple[str, bool]:
        if thinking is not None and not isinstance(thinking, bool):
            raise UsageError(f"thinking is {thinking!r}; expected true, false or nothing")
        said = [self._said(guard, m) for m in messages_of(messages)]
        offered = guard.said(tools_of(tools))
        if offered or any("tool_calls" in m for m in said):
            self._needs_calls()
        if offered and "tools" not in self._template.names:
            said = _declared(said, self._declaration(offered))
            offered = []
        values = {name: self._tokenizer.token_text(name) for name in ("bos_token", "eos_token")}
        switch = {} if thinking is None else {"thinking": thinking}
        rendered = self._template.render(messages=said, tools=offered or None, **switch, **values)
        reasoning = rendered.rstrip().endswith("<think>") and self._tokenizer.token_id("</think>") is not None
        # After a tool's result the assistant goes on with the turn that it began.
        if thinking is not None and thinking != reasoning and said[-1]["role"] != "tool":
            does = "always reasons" if reasoning else "has no reasoning to ask for"
            raise UsageError(f"thinking={thinking}: this model's chat format {does}; leave thinking out")
        return rendered, reasoning

    def _said(self, guard: Guard, message: dict[str, Any]) -> dict[str, Any]:
        """A message whose text cannot structure the conversation; an assistant's, without the reasoning that led to it."""
        content = message["content"]
        if message["role"] == "assistant" and "</think>" in content:
            content = content.split("</think>", 1)[1] if self.syntax == "v3.1" else content.rpartition("</think>")[2]
        rest = {name: value for name, value in message.items() if name not in ("role", "content")}
        marked = {
            name: _calls(guard, value, self.syntax) if name == "tool_calls" else guard.said(value)
            for name, value in rest.items()
        }
        return {"role": message["role"], "content": guard.said(content), **marked}

    def _needs_calls(self) -> None:
        if self.syntax is None:
            raise UsageError(
                "dsv3 knows no tool calls of this model: it has no markers for them; leave tools and tool calls out"
            )

    def _declaration(self, tools: list[dict[str, Any]]) -> str:
        """What the system message says of tools where the template has no place for them, as V3's published one has none. The
        wording is ours, the form of a call is the model's."""
        assert self.syntax is not None
        form, between = _CALLS[self.syntax]
        listed = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
        what = "NAME being the function and ARGUMENTS a JSON object" if "ARGUMENTS" in form else "NAME being the function"
        return (
            "## Tools\n\nYou can call these functions; each line is one of them, its parameters as a JSON schema:\n\n"
            f"{listed}\n\n"
            f"To call a function, end your answer with exactly this, {what}:\n\n"
            f"{form}\n\n"
            f"Several calls go before the last marker one after the other, {between}."
        )


def _own_syntax(template: str) -> Syntax | None:
    """How a template writes tool calls: V3's puts the arguments into a fence."""
    if "<｜tool▁sep｜>" not in template:
        return None
    return "v3" if "```json" in template else "v3.1"


def _calls(guard: Guard, calls: list[dict[str, Any]], syntax: Syntax | None) -> list[dict[str, Any]]:
    """V3.2's template writes a call's arguments one by one."""
    found = []
    for call in calls:
        function = dict(call["function"])
        if syntax == "dsml":
            function["arguments"] = arguments_of(function)
        found.append({"id": guard.said(call["id"]), "type": call["type"], "function": guard.said(function)})
    return found


def _declared(messages: list[dict[str, Any]], declaration: str) -> list[dict[str, Any]]:
    """The messages, the first being the system's and ending with the declaration."""
    if messages[0]["role"] != "system":
        return [{"role": "system", "content": declaration}, *messages]
    content = messages[0]["content"]
    first: Mapping[str, Any] = {**messages[0], "content": f"{content}\n\n{declaration}" if content else declaration}
    return [dict(first), *messages[1:]]
