"""The chat page's files."""

from __future__ import annotations

from pathlib import Path

from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route

_CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
_FILES = sorted(path for path in Path(__file__).with_name("page").iterdir() if path.suffix in _TYPES)
PATHS = {"/" if path.name == "index.html" else f"/{path.name}": path for path in _FILES}


async def _page(http: HttpRequest) -> Response:
    path = PATHS[http.url.path]
    headers = {"Content-Security-Policy": _CSP, "Referrer-Policy": "no-referrer", "Cache-Control": "no-cache"}
    return Response(path.read_bytes(), media_type=_TYPES[path.suffix], headers=headers)


def routes() -> list[Route]:
    return [Route(path, _page) for path in PATHS]
