"""Grammars (Lark, as llguidance reads it) for answers that are calls of tools, and for answers after reasoning."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from dsv3.engine.markup import DSML
from dsv3.server.errors import bad

if TYPE_CHECKING:
    from dsv3.engine.chat import ChatFormat
    from dsv3.engine.text import Tokenizer

_MARKERS = ("calls▁begin", "call▁begin", "sep", "call▁end", "calls▁end")
_ANYTHING = r"/(?s:.*)/"


def call_grammar(format: ChatFormat, tokenizer: Tokenizer, tools: list[dict[str, Any]]) -> tuple[str, str]:
    """One call of one of the tools, its arguments as its parameters say."""
    if format.syntax == "dsml":
        return "lark", _markup(f"<[{tokenizer.token_id(DSML)}]>", tools)
    ids = [tokenizer.token_id(f"<｜tool▁{name}｜>") for name in _MARKERS]
    if format.syntax is None or None in ids:
        raise bad("dsv3 knows no tool calls of this model; leave tool_choice out", "tool_choice")
    begin, call, sep, end, last = (f"<[{i}]>" for i in ids)
    rules, names = [], []
    for n, tool in enumerate(tools):
        function = tool["function"]
        schema = json.dumps(function.get("parameters") or {"type": "object"})
        name = json.dumps(function["name"])
        if format.syntax == "v3":
            head = json.dumps(f"{function['name']}\n```json\n")
            rules.append(f'call{n}: "function" {sep} {head} args{n} "\\n```"')
        else:
            rules.append(f"call{n}: {name} {sep} args{n}")
        rules.append(f"args{n}: %json {schema}")
        names.append(f"call{n}")
    return "lark", "\n".join([f"start: {begin} {call} ({' | '.join(names)}) {end} {last}", *rules])


def _markup(marker: str, tools: list[dict[str, Any]]) -> str:
    """V3.2's calls. Parameters come in the order in which they are declared; where a tool declares none, they are free."""
    names, rules = [], []
    for n, tool in enumerate(tools):
        function = tool["function"]
        schema = function.get("parameters") or {}
        _check_parameters(function["name"], schema)
        shared = {name: schema[name] for name in ("$defs", "definitions") if name in schema}
        lines, required = [], schema.get("required") or []
        properties = schema.get("properties") or {}
        properties = {**properties, **{name: {} for name in required if name not in properties}}
        for k, (name, one) in enumerate(properties.items()):
            here, value = f"{n}_{k}", one if isinstance(one, dict) else {}
            kinds = [value.get("type", "any")] if not isinstance(value.get("type"), list) else value["type"]
            text = None if {"string", "any"}.isdisjoint(kinds) else _text_of(value)
            forms = [] if text is None else [_parameter(marker, name, True, f"{text} {marker}")]
            if text is None or kinds != ["string"]:
                forms.append(_parameter(marker, name, False, f'v{here} "</" {marker}'))
                rules.append(f"v{here}: %json {json.dumps({**value, **shared})}")
            rules.append(f"p{here}: {' | '.join(forms)}")
            lines.append(f"p{here}" if name in required else f"p{here}?")
        head = json.dumps(f'invoke name="{function["name"]}">\n')
        ends = f'"</" {marker} "invoke>\\n</" {marker} "function_calls>"'
        rules.append(f'c{n}: {head} "\\n"? {" ".join(lines) or "free*"} {ends}')
        names.append(f"c{n}")
    free = f'"<" {marker} /parameter name="[^"\\n<>]+" string="true">/ {_text_of({})} {marker} "parameter>\\n"'
    start = f'"<" {marker} "function_calls>\\n<" {marker} ({" | ".join(names)})'
    return "\n".join([f"start: {start}", *rules, f"free: {free}"])


def _check_parameters(name: str, schema: dict[str, Any]) -> None:
    """ApiError for what is no schema of an object's properties, as far as V3.2's markup is made from it."""

    def need(good: bool, what: str) -> None:
        if not good:
            raise bad(f"tools: parameters of {name!r}: {what}", "tools")

    properties, required = schema.get("properties") or {}, schema.get("required") or []
    need(isinstance(properties, dict), "properties must be an object")
    need(isinstance(required, list) and all(isinstance(r, str) for r in required), "required must be a list of names")
    for key, value in properties.items():
        if isinstance(value, dict):
            kinds = value.get("type", "any")
            kinds = kinds if isinstance(kinds, list) else [kinds]
            need(all(isinstance(kind, str) for kind in kinds), f"type of {key!r} must be a name, or a list of names")
            need(isinstance(value.get("enum", []), list), f"enum of {key!r} must be a list")
            for bound in ("minLength", "maxLength"):
                good = type(value.get(bound, 0)) is int and value.get(bound, 0) >= 0
                need(good, f"{bound} of {key!r} must be a whole number of at least 0")


def _parameter(marker: str, name: str, string: bool, value: str) -> str:
    head = json.dumps(f'parameter name="{name}" string="{str(string).lower()}">')
    return f'"<" {marker} {head} {value} "parameter>\\n"'


def _text_of(schema: dict[str, Any]) -> str | None:
    """A string as V3.2 writes it, up to the marker, which no text can be; None where that cannot say all that the schema does:
    such a string is written as JSON."""
    if not schema.keys() <= {"type", "title", "description", "default", "examples", "enum", "const", "minLength", "maxLength"}:
        return None
    choices = schema.get("enum") or ([schema["const"]] if "const" in schema else [])
    if choices:
        said = [json.dumps(f"{one}</", ensure_ascii=False) for one in choices if isinstance(one, str)]
        return f"({' | '.join(said)})" if said else None
    least, most = schema.get("minLength", 0), schema.get("maxLength", "")
    return rf"/(?s:.{{{least},{most}}})<\//"


def _in_lark(regex: str) -> str:
    """A regular expression between slashes, on one line; what is escaped already stays."""
    return re.sub(r"(\\.)|(/)|\n", lambda m: m[1] or ("\\/" if m[2] else "\\n"), regex, flags=re.DOTALL)


def after_reasoning(grammar: tuple[str, str], tokenizer: Tokenizer) -> tuple[str, str]:
    """The grammar for what follows `</think>`, before which anything may be said."""
    kind, text = grammar
    think = f"{_ANYTHING} <[{tokenizer.token_id('</think>')}]>"
    if kind == "lark":
        if not text.startswith("start:"):
            raise bad("a grammar of one's own cannot follow reasoning; ask with thinking: false", "response_format")
        return "lark", f"start: {think} answer\nanswer:{text.removeprefix('start:')}"
    if kind == "regex":
        return "lark", f"start: {think} answer\nanswer: /{_in_lark(text)}/"
    schema = text if kind == "json_schema" else json.dumps({"type": "object"})
    return "lark", f"start: {think} /[ \\n]{{0,4}}/ answer\nanswer: %json {schema}"
