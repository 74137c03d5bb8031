"""Routes of the chat page's files."""

from __future__ import annotations

from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route

from dsv3.server.page import POLICY, files

_FILES = files()
PATHS = frozenset(_FILES)
_HEADERS = {"Content-Security-Policy": POLICY, "Referrer-Policy": "no-referrer", "Cache-Control": "no-cache"}


async def _page(http: HttpRequest) -> Response:
    kind, content = _FILES[http.url.path]
    return Response(content, media_type=kind, headers=_HEADERS)


def routes() -> list[Route]:
    return [Route(path, _page) for path in sorted(PATHS)]
