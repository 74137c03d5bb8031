"""JSON schemas that clients send: their size, and whether llguidance can follow them."""

from __future__ import annotations

import json
from typing import Any

from dsv3.engine.grammar import SPACE
from dsv3.server.errors import bad
from dsv3.server.limits import MAX_SCHEMA_BYTES, MAX_SCHEMA_DEPTH


def check_schema(schema: Any, param: str) -> None:
    """ApiError for a JSON schema that is too large or too deep."""
    if len(json.dumps(schema)) > MAX_SCHEMA_BYTES:
        raise bad(f"{param}: a schema of more than {MAX_SCHEMA_BYTES} bytes", param)
    level = [schema]
    for _ in range(MAX_SCHEMA_DEPTH):
        level = [
            inner
            for value in level
            for inner in (value.values() if isinstance(value, dict) else value if isinstance(value, list) else ())
        ]
        if not level:
            return
    raise bad(f"{param}: a schema nested deeper than {MAX_SCHEMA_DEPTH}", param)


def check_parameters(tools: list[dict[str, Any]]) -> None:
    """ApiError for parameters of functions that no JSON object satisfies, or in which something cannot be followed."""
    import llguidance

    for tool in tools:
        name, schema = tool["function"]["name"], tool["function"].get("parameters")
        if not schema:
            continue
        kind = schema.get("type", "object")
        if kind != "object" and not (isinstance(kind, list) and "object" in kind):
            raise bad(f"tools: parameters of {name!r} are of type {kind!r}; arguments are always an object", "tools")
        wrong = llguidance.LLMatcher.validate_grammar(f"start: {json_rule({**schema, 'type': 'object'})}")
        if wrong:
            raise bad(f"tools: parameters of {name!r}: {plain_reason(wrong)}", "tools")


def json_rule(schema: dict[str, Any]) -> str:
    """The body of a rule in Lark: JSON as a schema has it, with an end to the white space between its parts."""
    return f"%json {json.dumps({**schema, 'x-guidance': {'whitespace_pattern': SPACE}})}"


def plain_reason(error: str) -> str:
    """What llguidance says of a schema, without the grammar that it stands in."""
    text = error.partition("failed to compile JSON schema: ")[2] or error
    return " ".join(line.strip() for line in text.split("\n   1 |")[0].splitlines() if line.strip())[:300]
