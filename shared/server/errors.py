"""Answers to requests that are not served: one sentence, in the shape that the caller reads."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from starlette.responses import JSONResponse, Response

from shared.server.refused import Refused

OPENAI = "/v1/"
OPENAI_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


def answer(refused: Refused, path: str) -> Response:
    """As RFC 9457 has it; under /v1/ as OpenAI's clients expect it."""
    headers = {"Retry-After": f"{max(1, round(refused.retry))}"} if refused.retry else {}
    if refused.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if path.startswith(OPENAI):
        return JSONResponse(_openai(refused), refused.status, headers)
    content = {
        "title": HTTPStatus(refused.status).phrase,
        "status": refused.status,
        "detail": refused.sentence,
        "problems": refused.problems,
    }
    return JSONResponse(content, refused.status, headers, media_type="application/problem+json")


def _openai(refused: Refused) -> dict[str, Any]:
    kind = OPENAI_TYPES.get(refused.status, "invalid_request_error" if refused.status < 500 else "api_error")
    code = "model_not_found" if refused.status == 404 else None
    return {"error": {"message": refused.sentence, "type": kind, "param": None, "code": code}}
