"""The OpenAPI document, made of the structs that bodies are read into."""

from __future__ import annotations

from typing import Any

import msgspec

from dsv3.server.schema import BODIES

_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"}, "type": {"type": "string"},
                "param": {"type": ["string", "null"]}, "code": {"type": ["string", "null"]},
            },
        }
    },
}  # fmt: skip
_GETS = {
    "/v1/models": "the model that is served", "/v1/models/{name}": "the model, by its name",
    "/v1/experts": "how evenly tokens go to experts", "/health/live": "whether the process answers",
    "/health/ready": "whether it takes requests", "/metrics": "figures for Prometheus", "/openapi.json": "this document",
}  # fmt: skip
_ANSWERS = {
    "400": "the request is wrong", "401": "no key, or one that is not known", "403": "a host that is not known",
    "404": "no such model or path", "413": "the body is too large", "429": "too much to do", "431": "too many headers",
    "500": "the generation failed", "503": "the server is stopping",
}  # fmt: skip


def document() -> dict[str, Any]:
    """OpenAPI 3.1."""
    structs = list(BODIES.values())
    _, components = msgspec.json.schema_components(structs, ref_template="#/components/schemas/{name}")
    errors = {
        status: {"description": text, "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}}
        for status, text in _ANSWERS.items()
    }
    paths: dict[str, Any] = {}
    for path, struct in BODIES.items():
        body = {"application/json": {"schema": {"$ref": f"#/components/schemas/{struct.__name__}"}}}
        answers: dict[str, Any] = {"200": {"description": "the answer, or a stream of events"}, **errors}
        about = (struct.__doc__ or "").strip().splitlines()[0]
        paths[path] = {"post": {"summary": about, "requestBody": {"required": True, "content": body}, "responses": answers}}
    for path, text in _GETS.items():
        get: dict[str, Any] = {"summary": text, "responses": {"200": {"description": text}, **errors}}
        if "{name}" in path:
            get["parameters"] = [{"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}]
        paths[path] = {"get": get}
    return {
        "openapi": "3.1.0",
        "info": {"title": "dsv3", "version": "1", "description": "OpenAI's API over one model"},
        "paths": paths,
        "components": {"schemas": {**components, "Error": _ERROR}},
    }
