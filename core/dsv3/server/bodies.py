"""Bodies of requests, read and checked."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator
from typing import Any, TypeVar

import msgspec
from starlette.requests import Request as HttpRequest

from dsv3.server.errors import ApiError, bad

Body = TypeVar("Body", bound=msgspec.Struct)
_UNKNOWN = re.compile(r"Object contains unknown field `(.*?)`")
_SHORT = 1 << 14  # bytes of a body in which a wrong value is looked for once more
_PARTS = re.compile(r"\[.*?\]|[^.\[]+")
_PATH = re.compile(r" - at `\$\.?(.*?)`$")


async def read_body(request: HttpRequest, kind: type[Body]) -> Body:
    """The body as `kind`; ApiError names the field that is wrong."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        # Other types may be sent by any web page that the user of a browser opens.
        raise bad("the body must be JSON, with the header Content-Type: application/json", code="content_type")
    data = await request.body()
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.ValidationError as error:
        raise _explained(str(error), kind, data) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise bad(f"the body is not JSON: {error}", code="invalid_json") from error


def _explained(text: str, kind: type[msgspec.Struct], data: bytes) -> ApiError:
    place = _PATH.search(text)
    param = place.group(1) if place else None
    if unknown := _UNKNOWN.search(text):
        name = unknown.group(1)
        near = difflib.get_close_matches(name, [f.encode_name for f in msgspec.structs.fields(kind)], 1) if not param else []
        hint = f"; did you mean {near[0]!r}?" if near else ""
        return bad(f"unknown field {name[:80]!r}{hint}", f"{param}.{name}" if param else name, "unknown_field")
    said = _PATH.sub("", text)
    if said.startswith("Invalid") and param and (allowed := _allowed(kind, param)):
        said += f"; expected one of {', '.join(allowed)}"
    elif param and said.startswith("Expected") and (value := _given(data, param)) is not None:
        said += f"; found {value}"
    return bad(said + (f" (at {param})" if param else ""), param)


def _allowed(kind: type[msgspec.Struct], path: str) -> list[str]:
    """The values that a field may have, of those that are listed; empty where there is no such list."""
    level: list[Any] = [msgspec.inspect.type_info(kind)]
    for part in _PARTS.findall(path):
        level = [inner for one in _alternatives(level) for inner in _inside(one, part)]
    found = [one for one in _alternatives(level) if isinstance(one, msgspec.inspect.LiteralType)]
    return [repr(value) for one in found for value in one.values]


def _alternatives(level: list[Any]) -> Iterator[Any]:
    for one in level:
        if isinstance(one, msgspec.inspect.UnionType):
            yield from _alternatives(list(one.types))
        elif isinstance(one, msgspec.inspect.Metadata):
            yield from _alternatives([one.type])
        else:
            yield one


def _inside(one: Any, part: str) -> list[Any]:
    if isinstance(one, msgspec.inspect.StructType):
        if part == one.tag_field:
            return [msgspec.inspect.LiteralType((one.tag,))]
        return [field.type for field in one.fields if field.encode_name == part]
    return [one.item_type] if isinstance(one, msgspec.inspect.ListType) and part.startswith("[") else []


def _given(data: bytes, path: str) -> str | None:
    """The wrong value, as JSON; None where it is not easily had."""
    if len(data) > _SHORT:
        return None
    try:
        found: Any = json.loads(data)
        for part in _PARTS.findall(path):
            found = found[int(part[1:-1]) if part.startswith("[") else part]
    except (KeyError, IndexError, TypeError, ValueError, RecursionError):
        return None
    text = json.dumps(found, ensure_ascii=False).encode("utf-8", "backslashreplace").decode()  # surrogates by themselves
    return text if len(text) <= 80 else f"{text[:77]}..."
