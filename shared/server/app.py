"""The one server: guard, REST and the page, put together."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import gradio as gr
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.responses import Response

from shared.engine.engine import Engine
from shared.errors import UserError
from shared.server.errors import ApiError, error_response
from shared.server.file_access import FileAccess
from shared.server.limits import MAX_UPLOAD
from shared.server.login import LoginSessions
from shared.server.middleware import SecurityMiddleware
from shared.server.openai import openai_router
from shared.server.origin import HostOriginCheck
from shared.server.page_rpc import add_page_rpc
from shared.server.rest import rest_router
from shared.server.schemas import PROBLEM, settings_schema
from shared.ui.theme import look
from shared.version import VERSION

log = logging.getLogger(__name__)

OPENAPI = "/api/v1/openapi.json"
#: every tab that follows the queue and every call that waits for its pictures is one of these
EVENTS_AT_ONCE = 1000


def make_app(
    engine: Engine,
    page: gr.Blocks,
    uploads: Path,
    origins: HostOriginCheck,
    sessions: LoginSessions,
    theme: str = "",
) -> SecurityMiddleware:
    """The whole server as one ASGI application. `uploads`: where Gradio puts what is sent to it."""
    files = FileAccess(engine, uploads)
    app = api(engine, uploads, files)
    add_page_rpc(app, page)
    page.max_threads = EVENTS_AT_ONCE
    gr.mount_gradio_app(
        app,
        page.queue(default_concurrency_limit=None),
        "/",
        allowed_paths=[str(folder.resolve()) for folder in engine.config.picture_folders],
        # the queue and the log are nobody's download
        blocked_paths=[str(engine.config.database.resolve().parent)],
        max_file_size=MAX_UPLOAD,
        ssr_mode=False,  # these three could be turned on by a variable
        mcp_server=False,
        enable_monitoring=False,
        pwa=False,
        **look(theme),
    )
    # It would hold a connection of every tab open, of the six that a browser has for a server.
    page.config["connect_heartbeat"] = False
    # or listeners take any file of this computer whose path is sent to them: only launch() sets it
    page.has_launched = True
    page.is_running = True  # or Gradio takes every SVG that is uploaded for one of the page's own
    return SecurityMiddleware(app, origins, sessions, files)


def api(engine: Engine, uploads: Path, files: FileAccess) -> FastAPI:
    """The part for programs. What it does not know is left to what is mounted after it."""
    app = FastAPI(title="ZGP", version=VERSION, openapi_url=OPENAPI, docs_url=None, redoc_url=None)
    app.include_router(rest_router(engine, uploads, files))
    app.include_router(openai_router(engine, uploads, files))
    for below in ("/api", "/v1"):
        app.add_api_route(
            below + "/{rest:path}", _unknown, methods=["GET", "POST", "PUT", "PATCH", "DELETE"],
            include_in_schema=False,
        )  # fmt: skip
    for kind, handler in HANDLERS.items():
        app.add_exception_handler(kind, handler)
    schema: dict[str, Any] = {}

    def openapi() -> dict[str, Any]:
        schema.update(schema or described(app))
        return schema

    app.openapi = openapi  # type: ignore[method-assign]
    return app


def described(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI description, with the settings' schema made from the one list of settings."""
    schema = get_openapi(
        title="ZGP",
        version=VERSION,
        description="Pictures made by the Z-Image models on this computer.",
        routes=app.routes,
    )
    components = schema.setdefault("components", {})
    components.setdefault("schemas", {}).update(Settings=settings_schema(), Problem=PROBLEM)
    components["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
    schema["security"] = [{"token": []}, {}]
    return schema


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error_response(error, request.url.path)


async def _user_error(request: Request, error: Exception) -> Response:
    return error_response(ApiError(400, str(error), getattr(error, "problems", ())), request.url.path)


async def _invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    problems = [f"{one['loc'][-1]}: {one['msg']}" for one in error.errors()]
    return error_response(ApiError(400, "; ".join(problems), problems), request.url.path)


async def _failed(request: Request, error: Exception) -> Response:
    sentence = "Something went wrong here that should not; the terminal of ZGP has the details."
    return error_response(ApiError(500, sentence), request.url.path)


HANDLERS: dict[type[Exception], Any] = {
    ApiError: _refused,
    UserError: _user_error,
    RequestValidationError: _invalid,
    Exception: _failed,
}


async def _unknown(rest: str) -> None:
    raise ApiError(404, "There is nothing here by that name; see /api/v1/openapi.json for what there is.")
