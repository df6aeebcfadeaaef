"""Requests that are not served: one sentence, in the shape that the caller reads."""

from __future__ import annotations

from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

from starlette.responses import JSONResponse, Response

OPENAI = "/v1/"
OPENAI_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """A request that is not served. detail: one sentence. problems: every one of several, one sentence each.

    retry: the seconds after which another try makes sense.
    """

    def __init__(self, status: int, detail: str, problems: Sequence[str] = (), retry: float = 0) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail
        self.problems = list(problems) or [detail]
        self.retry = retry


def error_response(error: ApiError, path: str) -> Response:
    """As RFC 9457 has it; under /v1/ as OpenAI's clients expect it."""
    headers = {"Retry-After": f"{max(1, round(error.retry))}"} if error.retry else {}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if path.startswith(OPENAI):
        return JSONResponse(_openai(error), error.status, headers)
    content = {
        "title": HTTPStatus(error.status).phrase,
        "status": error.status,
        "detail": error.detail,
        "problems": error.problems,
    }
    return JSONResponse(content, error.status, headers, media_type="application/problem+json")


def _openai(error: ApiError) -> dict[str, Any]:
    kind = OPENAI_TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
    code = "model_not_found" if error.status == 404 else None
    return {"error": {"message": error.detail, "type": kind, "param": None, "code": code}}
