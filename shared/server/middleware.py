"""What every request passes before anything else sees it. Plain ASGI, so that streams stay streams."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from shared.server.errors import ApiError, error_response
from shared.server.file_access import FILE, FileAccess, check_address
from shared.server.limits import limit_body
from shared.server.login import LoginSessions
from shared.server.origin import HostOriginCheck

#: Gradio starts itself with scripts in its page, and components' scripts are text that it compiles
PAGE_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' "
    "'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data: blob:; "
    "media-src 'self' data: blob:; worker-src 'self' blob:; object-src 'none'; base-uri 'self'; "
    "form-action 'self'; frame-ancestors 'self'"
)
FILE_POLICY = "default-src 'none'; img-src 'self' data:; style-src 'unsafe-inline'; sandbox allow-same-origin"
FILES = (FILE, "/api/v1/images/")
#: how long a browser keeps what it got; pictures are never written over
KEPT = {FILES: b"private, max-age=86400", ("/static/", "/assets/", "/svelte/"): b"no-cache"}
HEADERS = {
    b"x-content-type-options": b"nosniff",
    b"referrer-policy": b"same-origin",
    b"x-frame-options": b"SAMEORIGIN",
    b"cross-origin-resource-policy": b"same-origin",
}


class SecurityMiddleware:
    """Stands before `app`: for whom, from where, who, what and how much, in this order."""

    def __init__(
        self, app: Any, origins: HostOriginCheck, sessions: LoginSessions, files: FileAccess
    ) -> None:
        self._app, self._origins, self._sessions, self._files = app, origins, sessions, files

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            return await self._app(scope, receive, send)
        if scope["type"] != "http":  # nothing here speaks through websockets
            return await send({"type": "websocket.close", "code": 1008})
        send = _with_headers(scope["path"], send)
        try:
            scope = self._origins.checked(scope)
            response = await self._authenticate(Request(scope, receive))
            if response is None:
                check_address(scope["method"], scope["path"])
                if scope["path"].startswith(FILE):
                    self._files.check(scope["path"])
                receive = await limit_body(scope, receive)
        except ApiError as error:
            response = error_response(error, scope["path"])
        await (response or self._app)(scope, receive, send)

    async def _authenticate(self, request: Request) -> Response | None:
        """The login's own answers, and one for who has not logged in; None for who is in."""
        path = request.scope["path"]
        if path == "/login":
            return await self._sessions.login(request)
        if not self._sessions.is_authenticated(request):
            if request.method == "GET" and "text/html" in request.headers.get("accept", ""):
                return RedirectResponse("/login", 303)
            raise ApiError(
                401, "Log in first: on the page, or with the header Authorization: Bearer and an API token."
            )
        if path == "/logout" and request.method == "POST":
            return self._sessions.logout(request)
        return None


def _with_headers(path: str, send: Any) -> Any:
    """Sends what `send` sends, with the headers that tell browsers to be careful."""
    policy = FILE_POLICY if path.startswith(FILES) else PAGE_POLICY
    kept = next((value for below, value in KEPT.items() if path.startswith(below)), b"no-store")

    async def careful(message: Any) -> None:
        if message["type"] == "http.response.start":
            headers = [pair for pair in message.get("headers", ()) if pair[0].lower() not in HEADERS]
            headers += HEADERS.items()
            if not any(name.lower() == b"content-security-policy" for name, _ in headers):
                headers.append((b"content-security-policy", policy.encode()))
            if not any(name.lower() == b"cache-control" for name, _ in headers):
                headers.append((b"cache-control", kept if message["status"] == 200 else b"no-store"))
            message = {**message, "headers": headers}
        await send(message)

    return careful
