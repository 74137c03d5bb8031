"""The chat page: static files that need nothing but the server they come from."""

from __future__ import annotations

from pathlib import Path

# What a browser is to allow the page, as the value of Content-Security-Policy.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
}


def files() -> dict[str, tuple[str, bytes]]:
    """Path of a URL -> (content type, content). `/` is the page; its scripts and its style lie beside it."""
    here = Path(__file__).parent
    found = {}
    for path in sorted(here.iterdir()):
        if path.suffix in _TYPES:
            name = "" if path.name == "index.html" else path.name
            found[f"/{name}"] = (_TYPES[path.suffix], path.read_bytes())
    return found
