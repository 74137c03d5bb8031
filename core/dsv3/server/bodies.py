"""Bodies of requests, read and checked."""

from __future__ import annotations

import difflib
import re
from typing import TypeVar

import msgspec
from starlette.requests import Request as HttpRequest

from dsv3.server.errors import ApiError, bad

Body = TypeVar("Body", bound=msgspec.Struct)
_UNKNOWN = re.compile(r"Object contains unknown field `(.*?)`")
_PATH = re.compile(r" - at `\$\.?(.*?)`$")


async def read_body(request: HttpRequest, kind: type[Body]) -> Body:
    """The body as `kind`; ApiError names the field that is wrong."""
    data = await request.body()
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.ValidationError as error:
        raise _explained(str(error), kind) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise bad(f"the body is not JSON: {error}", code="invalid_json") from error


def _explained(text: str, kind: type[msgspec.Struct]) -> ApiError:
    place = _PATH.search(text)
    param = place.group(1) if place else None
    if unknown := _UNKNOWN.search(text):
        name = unknown.group(1)
        near = difflib.get_close_matches(name, [f.encode_name for f in msgspec.structs.fields(kind)], 1) if not param else []
        hint = f"; did you mean {near[0]!r}?" if near else ""
        return bad(f"unknown field {name[:80]!r}{hint}", f"{param}.{name}" if param else name, "unknown_field")
    return bad(_PATH.sub("", text) + (f" (at {param})" if param else ""), param)
