"""Errors as OpenAI's clients know them: {"error": {message, type, param, code}}."""

from __future__ import annotations

import json
from typing import Any

from starlette.responses import JSONResponse

_TYPES = {
    400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error",
    405: "invalid_request_error", 413: "invalid_request_error", 429: "rate_limit_error", 431: "invalid_request_error",
    503: "service_unavailable_error",
}  # fmt: skip


class ApiError(Exception):
    """An answer that is an error. param: the field that is wrong; headers: of the answer."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, headers

    def body(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status, "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status, self.headers)

    def encoded(self) -> bytes:
        return json.dumps(self.body(), ensure_ascii=False).encode()


def bad(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    return ApiError(400, message, param, code)
