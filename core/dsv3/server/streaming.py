"""Server-sent events, and answers that end when nobody listens any more."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

import msgspec
from starlette.requests import Request as HttpRequest
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from dsv3.server.errors import ApiError

T = TypeVar("T")
_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


class ClientGone(Exception):
    """The client has closed its connection."""


def frame(data: Any) -> bytes:
    """One event."""
    return b"data: " + msgspec.json.encode(data) + b"\n\n"


class EventStream(StreamingResponse):
    """Chunks as events, and [DONE]; after one that fails an event with the error, and the end. ended: called at the end,
    whoever brings it about, also before the first chunk."""

    def __init__(self, chunks: AsyncIterator[Any], ended: Callable[[], None]) -> None:
        super().__init__(_frames(chunks), media_type="text/event-stream", headers=_HEADERS)
        self._ended = ended

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._ended()


async def _frames(chunks: AsyncIterator[Any]) -> AsyncIterator[bytes]:
    try:
        async for chunk in chunks:
            yield frame(chunk)
    except ApiError as error:
        yield frame(error.body())
        return
    yield b"data: [DONE]\n\n"


async def unless_gone(request: HttpRequest, answer: Awaitable[T]) -> T:
    """The answer; ClientGone, with the answer's work cancelled, once the client has closed the connection: a handler that is
    not streaming would otherwise run to its end for nobody."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, watching = asyncio.ensure_future(answer), asyncio.ensure_future(gone())
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGone
        return working.result()
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)
