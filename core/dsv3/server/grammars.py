"""Grammars (Lark, as llguidance reads it) for answers that are calls of tools, and for answers after reasoning."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from dsv3.engine.markup import DSML
from dsv3.server.call_markup import markup_grammar
from dsv3.server.errors import bad
from dsv3.server.json_schemas import check_parameters, json_rule

if TYPE_CHECKING:
    from dsv3.engine.chat import ChatFormat
    from dsv3.engine.text import Tokenizer

_MARKERS = ("calls▁begin", "call▁begin", "sep", "call▁end", "calls▁end")
_RULE = "dsv3_answer"  # a name that a client's grammar will not have
_ANYTHING = r"/(?s:.*)/"


def call_grammar(format: ChatFormat, tokenizer: Tokenizer, tools: list[dict[str, Any]]) -> tuple[str, str]:
    """One call of one of the tools, its arguments as its parameters say. ApiError for parameters that cannot be followed."""
    check_parameters(tools)
    if format.syntax == "dsml":
        return "lark", markup_grammar(f"<[{tokenizer.token_id(DSML)}]>", tools)
    ids = [tokenizer.token_id(f"<｜tool▁{name}｜>") for name in _MARKERS]
    if format.syntax is None or None in ids:
        raise bad("dsv3 knows no tool calls of this model; leave tool_choice out", "tool_choice")
    begin, call, sep, end, last = (f"<[{i}]>" for i in ids)
    rules, names = [], []
    for n, tool in enumerate(tools):
        function = tool["function"]
        name = json.dumps(function["name"])
        if format.syntax == "v3":
            head = json.dumps(f"{function['name']}\n```json\n")
            rules.append(f'call{n}: "function" {sep} {head} args{n} "\\n```"')
        else:
            rules.append(f"call{n}: {name} {sep} args{n}")
        rules.append(f"args{n}: {json_rule({**(function.get('parameters') or {}), 'type': 'object'})}")
        names.append(f"call{n}")
    return "lark", "\n".join([f"start: {begin} {call} ({' | '.join(names)}) {end} {last}", *rules])


def _in_lark(regex: str) -> str:
    """A regular expression between slashes, on one line; what is escaped already stays."""
    return re.sub(r"(\\[^\n])|(/)|\\?\n", lambda m: m[1] or ("\\/" if m[2] else "\\n"), regex)


def after_reasoning(grammar: tuple[str, str], tokenizer: Tokenizer) -> tuple[str, str]:
    """The grammar for what follows `</think>`, before which anything may be said."""
    kind, text = grammar
    think = f"{_ANYTHING} <[{tokenizer.token_id('</think>')}]>"
    if kind == "lark":
        if not text.startswith("start:"):
            raise bad("a grammar of one's own cannot follow reasoning; ask with thinking: false", "response_format")
        return "lark", f"start: {think} {_RULE}\n{_RULE}:{text.removeprefix('start:')}"
    if kind == "regex":
        return "lark", f"start: {think} {_RULE}\n{_RULE}: /{_in_lark(text)}/"
    schema = json.loads(text) if kind == "json_schema" else {"type": "object"}
    return "lark", f"start: {think} /[ \\n]{{0,4}}/ {_RULE}\n{_RULE}: {json_rule(schema)}"
