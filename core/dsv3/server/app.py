"""The routes, and what they are wrapped in."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from dsv3.server import pages
from dsv3.server.bodies import read_body
from dsv3.server.chat import chat_completions, prompt_of
from dsv3.server.completions import completions
from dsv3.server.errors import ApiError, bad
from dsv3.server.experts import ExpertLoad
from dsv3.server.guard import Guard
from dsv3.server.openapi import document
from dsv3.server.schema import DetokenizeRequest, TokenizeRequest
from dsv3.server.service import Service
from dsv3.server.streaming import ClientGone


def build(service: Service, keys: Sequence[str] = (), any_host: bool = False) -> Starlette:
    """The application over a service, whose engine runs while the application does. keys and any_host: see `Guard`."""

    @contextlib.asynccontextmanager
    async def running(_: Starlette) -> AsyncIterator[None]:
        service.engine.start()
        yield
        service.draining = True
        service.engine.close()

    guard = Middleware(Guard, keys=keys, limits=service.limits, metrics=service.metrics, any_host=any_host)
    handlers: dict[Any, Any] = {
        ApiError: _api_error, HTTPException: _http_error, Exception: _unexpected, ClientGone: _gone, ClientDisconnect: _gone,
    }  # fmt: skip
    app = Starlette(routes=_routes(), middleware=[guard], exception_handlers=handlers, lifespan=running)
    app.state.service = service
    app.state.experts = ExpertLoad(service)
    app.state.document = document()
    return app


def _routes() -> list[Route]:
    return [
        Route("/v1/chat/completions", chat_completions, methods=["POST"]),
        Route("/v1/completions", completions, methods=["POST"]),
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", model),
        *(Route(f"{root}/tokenize", tokenize, methods=["POST"]) for root in ("/v1", "")),
        *(Route(f"{root}/detokenize", detokenize, methods=["POST"]) for root in ("/v1", "")),
        Route("/v1/experts", experts),
        Route("/health/live", live),
        Route("/health/ready", ready),
        Route("/metrics", metrics),
        Route("/openapi.json", openapi),
        *pages.routes(),
    ]


def _service(http: HttpRequest) -> Service:
    found: Service = http.app.state.service
    return found


def _about(service: Service) -> dict[str, Any]:
    return {
        "id": service.name, "object": "model", "created": service.created, "owned_by": "dsv3",
        "max_model_len": service.context, "thinking": service.thinks, "draft_tokens": service.drafts,
    }  # fmt: skip


async def models(http: HttpRequest) -> Response:
    return JSONResponse({"object": "list", "data": [_about(_service(http))]})


async def model(http: HttpRequest) -> Response:
    service = _service(http)
    if not http.path_params["name"]:
        raise HTTPException(404)
    service.check_model(http.path_params["name"])
    return JSONResponse(_about(service))


async def tokenize(http: HttpRequest) -> Response:
    service, body = _service(http), await read_body(http, TokenizeRequest)
    service.check_model(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise bad("give either prompt or messages", "prompt")
    if body.prompt is not None:
        ids = await asyncio.to_thread(service.tokenizer.encode, body.prompt)
    else:
        ids = (await prompt_of(service, body.messages)).ids
    return JSONResponse({"tokens": ids, "count": len(ids), "max_model_len": service.context})


async def detokenize(http: HttpRequest) -> Response:
    service, body = _service(http), await read_body(http, DetokenizeRequest)
    service.check_model(body.model)
    wrong = next((t for t in body.tokens if t >= service.model.config.vocab_size), None)
    if wrong is not None:
        raise bad(f"token id {wrong} is outside the vocabulary of {service.model.config.vocab_size}", "tokens")
    return JSONResponse({"prompt": await asyncio.to_thread(service.tokenizer.decode, body.tokens)})


async def experts(http: HttpRequest) -> Response:
    load: ExpertLoad = http.app.state.experts
    return JSONResponse(load.seen())


async def live(_: HttpRequest) -> Response:
    return JSONResponse({"status": "live"})


async def ready(http: HttpRequest) -> Response:
    service = _service(http)
    state = "draining" if service.draining else "ready" if service.engine.alive else "failed"
    return JSONResponse({"status": state, "streams": service.streams}, 200 if state == "ready" else 503)


async def metrics(http: HttpRequest) -> Response:
    service = _service(http)
    return PlainTextResponse(service.metrics.text(service.engine), media_type="text/plain; version=0.0.4; charset=utf-8")


async def openapi(http: HttpRequest) -> Response:
    return JSONResponse(http.app.state.document)


async def _api_error(_: HttpRequest, error: ApiError) -> Response:
    return error.response()


async def _http_error(http: HttpRequest, error: HTTPException) -> Response:
    text = {404: f"there is no {http.url.path}", 405: f"{http.method} is not offered at {http.url.path}"}
    return ApiError(error.status_code, text.get(error.status_code, error.detail), headers=dict(error.headers or {})).response()


async def _unexpected(_: HttpRequest, error: Exception) -> Response:
    return ApiError(500, "the server failed to answer; its log says why").response()


async def _gone(_: HttpRequest, error: Exception) -> Response:
    return Response(status_code=499)
