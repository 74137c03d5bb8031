"""From the fields of OpenAI's API to the options of a generation."""

from __future__ import annotations

import json
from typing import Any

from dsv3.engine.model import Model
from dsv3.server.errors import bad
from dsv3.server.json_schemas import check_schema
from dsv3.server.limits import MAX_SCHEMA_BYTES
from dsv3.server.schema import ResponseFormat, Sampled

_LEAST = 1e-9  # top_p 0 is OpenAI's way to say: the likeliest alone
_SPREAD = 0x9E3779B97F4A7C15  # between the seeds of several answers to one prompt


def options_of(s: Sampled, max_tokens: int | None, logprobs: int | None, room: int, drafts: int) -> dict[str, Any]:
    """room: tokens where no number is asked for; drafts: how many are guessed where it is not said."""
    guessed = drafts if s.draft_tokens is None else s.draft_tokens
    options: dict[str, Any] = {
        "max_new_tokens": room if max_tokens is None else max_tokens,
        "temperature": 1.0 if s.temperature is None else s.temperature,
        "top_p": 1.0 if s.top_p is None else max(s.top_p, _LEAST),
        "top_k": max(0, s.top_k or 0),
        "min_p": s.min_p or 0.0,
        "presence_penalty": s.presence_penalty or 0.0,
        "frequency_penalty": s.frequency_penalty or 0.0,
        "repetition_penalty": 1.0 if s.repetition_penalty is None else s.repetition_penalty,
        "logit_bias": _biases(s.logit_bias or {}),
        "stop": [s.stop] if isinstance(s.stop, str) else s.stop or [],
        "ignore_eos": s.ignore_eos,
        "logprobs": logprobs,
    }
    if guessed:
        options |= {"draft": "mtp", "draft_tokens": guessed}
    return options


def drafts_for(model: Model, wanted: int) -> int:
    """Drafts where a request says nothing; none where the model has no module for them."""
    return wanted if model.graph.mtp else 0


def seeds(seed: int | None, n: int) -> list[int | None]:
    """One for each answer to a prompt; None is another each time."""
    if seed is None:
        return [None] * n
    return [seed + i * _SPREAD for i in range(n)]


def _biases(given: dict[str, float]) -> dict[int, float]:
    wrong = next((key for key in given if not key.isascii() or not key.isdigit() or len(key) > 9), None)
    if wrong is not None:
        raise bad(f"logit_bias: {wrong[:40]!r} is no token id", "logit_bias")
    return {int(key): value for key, value in given.items()}


def grammar_of(form: ResponseFormat | None) -> tuple[str, str] | None:
    """(kind, text) of a response_format; "regex" and "grammar" (Lark) are extensions."""
    if form is None or form.type == "text":
        return None
    if form.type == "json_object":
        return "json_object", ""
    if form.type == "json_schema":
        schema = form.json_schema.schema if form.json_schema is not None else None
        if schema is None:
            raise bad("response_format of type json_schema needs json_schema.schema", "response_format")
        check_schema(schema, "response_format")
        return "json_schema", json.dumps(schema)
    text = form.regex if form.type == "regex" else form.grammar
    if not text:
        raise bad(f"response_format of type {form.type} needs the field {form.type!r}", "response_format")
    if len(text.encode("utf-8", "surrogatepass")) > MAX_SCHEMA_BYTES:
        raise bad(f"response_format: more than {MAX_SCHEMA_BYTES} bytes", "response_format")
    return ("regex" if form.type == "regex" else "lark"), text
