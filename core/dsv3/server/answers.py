"""What both ways of asking have in common: a body is read, requests are made of it, and what comes of them is sent whole or in
pieces."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from typing import Any, Generic, TypeVar

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from dsv3.engine.request import Request
from dsv3.server.bodies import read_body
from dsv3.server.schema import Sampled
from dsv3.server.service import Flight, Service
from dsv3.server.streaming import EventStream, unless_gone

Body = TypeVar("Body", bound=Sampled)


class Answer(ABC, Generic[Body]):
    """The answer to one body."""

    def __init__(self, service: Service, body: Body) -> None:
        self.service, self.body = service, body

    @abstractmethod
    async def requests(self, salt: bytes) -> list[Request]:
        """What the engine is asked; ApiError for what it cannot be."""

    @abstractmethod
    async def whole(self, flight: Flight) -> dict[str, Any]:
        """When all is done."""

    @abstractmethod
    def chunks(self, flight: Flight) -> AsyncIterator[dict[str, Any]]:
        """As it comes."""

    @property
    def shows_usage(self) -> bool:
        """Whether a stream ends with its usage."""
        return self.body.stream_options is not None and self.body.stream_options.include_usage

    def usage(self, flight: Flight) -> dict[str, Any]:
        return self.service.usage(flight.requests, self.body.n or 1)


async def respond(http: HttpRequest, kind: type[Body], made: type[Answer[Body]]) -> Response:
    """The response to a request whose body is a `kind`."""
    service: Service = http.app.state.service
    body = await read_body(http, kind)
    service.check_model(body.model)
    answer = made(service, body)
    flight = service.start(await answer.requests(http.scope["salt"]))
    if body.stream:
        return EventStream(answer.chunks(flight), lambda: service.end(flight))
    return JSONResponse(await unless_gone(http, answer.whole(flight)))
