"""A small HTTP/1.1 client over asyncio's streams: one request a connection, the body as it arrives."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from dsv3.errors import UsageError

_PIECE = 1 << 16
_MOST_HEADERS = 100


class Failure(Exception):
    """A request that came to nothing. kind: "connect", "disconnect", "malformed", "timeout", "server", such as "http 500"."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True)
class Target:
    """Where the server is. path: what its paths begin with, without a slash at the end. key: sent as a bearer token."""

    host: str
    port: int
    path: str = ""
    tls: bool = False
    key: str | None = None

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http{'s' if self.tls else ''}://{host}:{self.port}{self.path}"


def target(url: str, key: str | None = None) -> Target:
    """From a URL such as http://127.0.0.1:8000. UsageError for anything else, or a key that no header can hold."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise UsageError(f"--url {url!r}: {error}") from error
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UsageError(f"--url {url!r} is not http://HOST:PORT")
    if parts.query or parts.fragment or parts.username or not url.isascii() or any(c.isspace() for c in url):
        raise UsageError(f"--url {url!r}: only a host, a port and a path are expected")
    if key is not None and not (key and key.isascii() and key.isprintable() and " " not in key):
        raise UsageError("the key is empty, or has characters that an HTTP header cannot hold; write it on a line of its own")
    tls = parts.scheme == "https"
    return Target(parts.hostname, port or (443 if tls else 80), parts.path.rstrip("/").removesuffix("/v1"), tls, key)


class Response:
    """Status, headers with lower-case names, and a body still to come."""

    def __init__(self, status: int, headers: Mapping[str, str], reader: asyncio.StreamReader) -> None:
        self.status = status
        self.headers = headers
        self._reader = reader

    async def pieces(self) -> AsyncIterator[bytes]:
        """The body as it arrives. Failure "disconnect" if it ends too early, "malformed" if it is framed wrongly."""
        if "chunked" in self.headers.get("transfer-encoding", "").lower():
            async for piece in self._chunked():
                yield piece
        elif (length := self.headers.get("content-length")) is not None:
            if not length.isdecimal():
                raise Failure("malformed", f"Content-Length {length!r}")
            async for piece in self._exactly(int(length)):
                yield piece
        else:
            while piece := await self._reader.read(_PIECE):
                yield piece

    async def read(self, most: int) -> bytes:
        """The body, cut after so many bytes."""
        found = b""
        async for piece in self.pieces():
            found += piece
            if len(found) >= most:
                break
        return found[:most]

    async def _chunked(self) -> AsyncIterator[bytes]:
        while size := _size(await _line(self._reader)):
            async for piece in self._exactly(size):
                yield piece
            if await _line(self._reader):
                raise Failure("malformed", "a chunk is longer than it says")
        while await _line(self._reader):  # trailers
            pass

    async def _exactly(self, size: int) -> AsyncIterator[bytes]:
        while size:
            piece = await self._reader.read(min(size, _PIECE))
            if not piece:
                raise Failure("disconnect", f"the connection was closed {size} bytes before the end")
            size -= len(piece)
            yield piece


def _size(line: bytes) -> int:
    digits = line.partition(b";")[0].strip()
    if not digits or len(digits) > 8 or digits.strip(b"0123456789abcdefABCDEF"):
        raise Failure("malformed", f"chunk size {digits[:20]!r}")
    return int(digits, 16)


async def _line(reader: asyncio.StreamReader) -> bytes:
    """Without its end. asyncio limits it to 64 KiB."""
    try:
        line = await reader.readuntil(b"\n")
    except asyncio.IncompleteReadError as error:
        raise Failure("disconnect", "the connection was closed in the middle of an answer") from error
    except asyncio.LimitOverrunError as error:
        raise Failure("malformed", "a line of more than 64 KiB") from error
    return line.rstrip(b"\r\n")


@contextlib.asynccontextmanager
async def request(where: Target, method: str, path: str, body: bytes = b"") -> AsyncIterator[Response]:
    """Send a request; the connection is closed afterwards, whatever was read of it.

    path: below the target's, such as "/v1/models". Failure says what went wrong on the way.
    """
    context = ssl.create_default_context() if where.tls else None
    try:
        reader, writer = await asyncio.open_connection(where.host, where.port, ssl=context)
    except OSError as error:
        raise Failure("connect", str(error)) from error
    try:
        writer.write(_head(where, method, path, len(body)) + body)
        await writer.drain()
        yield await _response(reader)
    except (ConnectionError, ssl.SSLError) as error:
        raise Failure("disconnect", str(error)) from error
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


def _head(where: Target, method: str, path: str, length: int) -> bytes:
    host = f"[{where.host}]" if ":" in where.host else where.host
    lines = [f"{method} {where.path}{path} HTTP/1.1", f"Host: {host}:{where.port}", "Connection: close", "Accept: */*"]
    if length:
        lines += ["Content-Type: application/json", f"Content-Length: {length}"]
    if where.key is not None:
        lines.append(f"Authorization: Bearer {where.key}")
    return "\r\n".join([*lines, "", ""]).encode("ascii")


async def _response(reader: asyncio.StreamReader) -> Response:
    status = 100
    while 100 <= status < 200:  # such as 100 Continue: the answer proper follows
        version, _, rest = (await _line(reader)).partition(b" ")
        if not version.startswith(b"HTTP/1.") or not rest[:3].isdigit():
            raise Failure("malformed", "the answer is not HTTP/1.1")
        status, headers = int(rest[:3]), await _headers(reader)
    return Response(status, headers, reader)


async def _headers(reader: asyncio.StreamReader) -> dict[str, str]:
    headers: dict[str, str] = {}
    for _ in range(_MOST_HEADERS):
        if not (line := await _line(reader)):
            return headers
        name, colon, value = line.decode("latin-1").partition(":")
        if not colon:
            raise Failure("malformed", f"header {name[:40]!r}")
        headers[name.lower()] = value.strip()
    raise Failure("malformed", f"more than {_MOST_HEADERS} headers")
