"""What is looked at before a request reaches its route: size, headers, key, host."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from collections.abc import Sequence
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dsv3.server.errors import ApiError
from dsv3.server.limits import HEADER_BYTES, HEADER_LINES, Limits
from dsv3.server.metrics import Metrics
from dsv3.server.pages import PATHS

OPEN = frozenset({*PATHS, "/health/live", "/health/ready"})  # without a key
_LOCAL = frozenset({"localhost", "127.0.0.1", "::1"})


class Guard:
    """keys: who has one of them may ask; none: everybody who reaches a local address. Sets scope["salt"], which keeps the
    cached beginnings of one key's prompts from others."""

    def __init__(self, app: ASGIApp, keys: Sequence[str], limits: Limits, metrics: Metrics, any_host: bool = False) -> None:
        self.app, self.limits, self.metrics, self.any_host = app, limits, metrics, any_host
        self.keys = [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status = 500

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message.setdefault("headers", []).append((b"x-content-type-options", b"nosniff"))
            await send(message)

        try:
            length = self._check(scope)
            await self.app(scope, _limited(receive, self.limits.body, length), watched)
        except ApiError as error:
            await error.response()(scope, receive, watched)
        finally:
            route = scope.get("route")
            self.metrics.answers.labels(getattr(route, "path", "other"), str(status)).inc()

    def _check(self, scope: Scope) -> int | None:
        """Raises ApiError; returns the length that the request says it has."""
        headers = scope["headers"]
        if len(headers) > HEADER_LINES:
            raise ApiError(431, f"{len(headers)} header lines; at most {HEADER_LINES} are taken")
        size = sum(len(name) + len(value) for name, value in headers)
        if size > HEADER_BYTES:  # the parser's own limit holds for headers that come in parts
            raise ApiError(431, f"{size} bytes of headers; at most {HEADER_BYTES} are taken")
        found: dict[bytes, bytes] = dict(headers)
        if b"host" in found:  # HTTP/1.0 knows none; browsers send it always
            self._host(found[b"host"].decode("latin-1"))
        scope["salt"] = self._key(found.get(b"authorization", b"")) if scope["path"] not in OPEN else b""
        length = found.get(b"content-length", b"")
        if not length.isdigit():
            return None
        if int(length) > self.limits.body:
            raise _too_large(self.limits.body)
        return int(length)

    def _key(self, authorization: bytes) -> bytes:
        if not self.keys:
            return b""
        scheme, _, given = authorization.partition(b" ")
        matches = [key for key in self.keys if hmac.compare_digest(key, given.strip())]
        if scheme.lower() != b"bearer" or not matches:
            missing = "no API key was given; send the header Authorization: Bearer KEY"
            text = "this API key is not known" if given else missing
            raise ApiError(401, text, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        return hashlib.sha256(matches[0]).digest()

    def _host(self, host: str) -> None:
        """Without keys, only names that stand for this machine: a page elsewhere could have its own name lead here."""
        if self.keys or self.any_host:
            return
        name = host[1:].partition("]")[0] if host.startswith("[") else host.rpartition(":")[0] or host
        if name.lower() in _LOCAL or _is_address(name):
            return
        raise ApiError(403, f"the host {name[:80]!r} is not known to this server, which has no API keys; use 127.0.0.1")


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _too_large(most: int) -> ApiError:
    return ApiError(413, f"the body is larger than {most} bytes", code="body_too_large")


def _limited(receive: Receive, most: int, length: int | None) -> Receive:
    if length is not None:
        return receive
    seen = 0

    async def counted() -> Message:
        nonlocal seen
        message: Any = await receive()
        seen += len(message.get("body", b""))
        if seen > most:
            raise _too_large(most)
        return message

    return counted
