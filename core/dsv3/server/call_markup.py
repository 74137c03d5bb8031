"""The grammar of calls of tools as DeepSeek-V3.2 writes them: in tags, a parameter at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from dsv3.server.errors import bad
from dsv3.server.json_schemas import json_rule

_KNOWN = {
    "type", "properties", "required", "additionalProperties", "$defs", "definitions", "title", "description", "$schema", "$id",
    "$comment", "default", "examples", "deprecated", "strict",
}  # fmt: skip
_PLAIN = {"type", "title", "description", "default", "examples", "enum", "const", "minLength", "maxLength"}
_SHARED = ("$defs", "definitions")
_LONGEST = 200  # characters of a parameter's name
_HOLDS_NOT = set('"<>\n\r')


def markup_grammar(marker: str, tools: list[dict[str, Any]]) -> str:
    """In Lark, one call of one of the tools, whose parameters llguidance can follow; marker: the special token. Parameters come
    in the order in which they are declared; where a tool declares none, they are free. ApiError for parameters that cannot be
    written so."""
    names, rules = [], []
    for n, tool in enumerate(tools):
        function = tool["function"]
        lines = []
        for rule, text, needed in _parameters(marker, str(n), function["name"], function.get("parameters") or {}):
            rules += text
            lines.append(rule + needed)
        head = json.dumps(f'invoke name="{function["name"]}">\n')
        ends = f'"</" {marker} "invoke>\\n</" {marker} "function_calls>"'
        rules.append(f'c{n}: {head} "\\n"? {" ".join(lines)} {ends}')
        names.append(f"c{n}")
    start = f'"<" {marker} "function_calls>\\n<" {marker} ({" | ".join(names)})'
    return "\n".join([f"start: {start}", *rules])


def _parameters(marker: str, n: str, tool: str, schema: dict[str, Any]) -> Iterator[tuple[str, list[str], str]]:
    """The name of each parameter's rule, its rules, and how often it comes ("" once, or "?" or "*")."""

    def refuse(what: str) -> None:
        raise bad(f"tools: parameters of {tool!r}: {what}; ask with tool_choice: auto, or write the schema without it", "tools")

    schema = _resolved(schema)
    if unknown := sorted(schema.keys() - _KNOWN):
        refuse(f"dsv3 cannot ask this model for a call of {unknown[0]!r} beside or instead of properties")
    shared = {name: schema[name] for name in _SHARED if name in schema}
    if any(not ref.startswith(("#/$defs/", "#/definitions/")) for ref in _references(schema)):
        refuse("a $ref must lead into $defs")
    properties, required = schema.get("properties") or {}, schema.get("required") or []
    more = schema.get("additionalProperties", True)
    properties = {**properties, **{name: more for name in required if name not in properties}}
    for k, (name, one) in enumerate(properties.items()):
        if one is False:
            continue
        if not 0 < len(name) <= _LONGEST or not _HOLDS_NOT.isdisjoint(name):
            what = f"it is empty, longer than {_LONGEST} characters, or holds quotes, angle brackets or line breaks"
            refuse(f"this model's calls cannot name {name[:80]!r}: {what}")
        rule, text = _parameter(marker, f"{n}_{k}", json.dumps(f'parameter name="{name}"'), _schema(one), shared)
        yield rule, text, "" if name in required else "?"
    if not properties and more is not False:
        named = f'"parameter name=" /"[^"\\n<>]{{1,{_LONGEST}}}"/'
        rule, text = _parameter(marker, f"{n}_x", named, _schema(more), shared)
        yield rule, text, "*"


def _schema(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _resolved(schema: dict[str, Any]) -> dict[str, Any]:
    """What a schema that is a reference, as some generators write it, refers to."""
    seen: set[str] = set()
    while isinstance(ref := schema.get("$ref"), str) and ref not in seen and not schema.keys() & {"properties", "required"}:
        seen.add(ref)
        found: Any = schema
        for part in ref.removeprefix("#/").split("/"):
            found = found.get(part.replace("~1", "/").replace("~0", "~")) if isinstance(found, dict) else None
        if not isinstance(found, dict):
            break
        rest = {name: value for name, value in schema.items() if name != "$ref"}
        schema = {**rest, **found}
    return schema


def _references(value: Any) -> Iterator[str]:
    if isinstance(value, list):
        for one in value:
            yield from _references(one)
    if isinstance(value, dict):
        for name, one in value.items():
            if name == "$ref" and isinstance(one, str):
                yield one
            yield from _references(one)


def _parameter(marker: str, here: str, head: str, value: dict[str, Any], shared: dict[str, Any]) -> tuple[str, list[str]]:
    """The name of a rule, and the rules; head: the tag up to the end of the name, in Lark."""

    def form(string: bool, said: str) -> str:
        said_so = json.dumps(f' string="{str(string).lower()}">')
        return f'"<" {marker} {head} {said_so} {said} "parameter>\\n"'

    kinds = value.get("type", "any")
    kinds = kinds if isinstance(kinds, list) else [kinds]
    text = None if {"string", "any"}.isdisjoint(kinds) else _text_of(value)
    forms, rules = [], []
    if text is not None:
        forms.append(form(True, f"{text} {marker}"))
    if text is None or kinds != ["string"]:
        forms.append(form(False, f'v{here} "</" {marker}'))
        rules.append(f"v{here}: {json_rule({**value, **shared})}")
    return f"p{here}", [*rules, f"p{here}: {' | '.join(forms)}"]


def _text_of(schema: dict[str, Any]) -> str | None:
    """A string as V3.2 writes it, up to the marker, which no text can be; None where that cannot say all that the schema does:
    such a string is written as JSON."""
    if not schema.keys() <= _PLAIN:
        return None
    choices = schema.get("enum") or ([schema["const"]] if "const" in schema else [])
    if choices:
        said = [json.dumps(f"{one}</", ensure_ascii=False) for one in choices if isinstance(one, str)]
        return f"({' | '.join(said)})" if said else None
    least, most = schema.get("minLength", 0), schema.get("maxLength", "")
    return rf"/(?s:.{{{least},{most}}})<\//"
