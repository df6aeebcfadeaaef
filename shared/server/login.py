"""The login: one page, which is a form without any script, and one cookie; programs show a token instead."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import math
import secrets
import time
from collections import OrderedDict
from collections.abc import Mapping
from html import escape
from typing import Any
from urllib.parse import parse_qs, quote

from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response

from shared.server.credentials import Credentials, digest
from shared.server.errors import ApiError
from shared.server.throttle import LoginThrottle
from shared.ui import static_files

SESSION_SECONDS = 7 * 24 * 3600
MOST_SESSIONS = 1000
LARGEST_FORM = 8192  # bytes
WRONG = "That name and password do not belong together."
ICON = static_files.read("icon.svg")
STYLE = static_files.read("login.css")
STYLE_HASH = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
POLICY = (
    f"default-src 'none'; style-src 'sha256-{STYLE_HASH}'; img-src data:; form-action 'self'; "
    "base-uri 'none'; frame-ancestors 'none'"
)
PAGE = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>ZGP: log in</title>
<link rel="icon" href="data:image/svg+xml,{quote(ICON)}">
<style>{STYLE}</style>
</head>
<body>
<main>
<h1>ZGP</h1>
<p>Z-Image for the GPU poor</p>
<form method="post" action="login">
%s
<label for="username">Name</label>
<input id="username" name="username" autocomplete="username" autocapitalize="none" required autofocus>
<label for="password">Password</label>
<input id="password" name="password" type="password" autocomplete="current-password" required>
<button>Log in</button>
</form>
</main>
</body>
</html>
"""


class LoginSessions:
    """Knows who is in. `cookie`: its name, another one for each port, since cookies know no ports."""

    def __init__(
        self, credentials: Credentials, cookie: str = "zgp_session", throttle: LoginThrottle | None = None
    ) -> None:
        self.credentials = credentials
        self._cookie = cookie
        self._throttle = throttle or LoginThrottle()
        self._sessions: OrderedDict[bytes, float] = OrderedDict()  # digest of the cookie -> its end

    def is_authenticated(self, request: Request) -> bool:
        """Whether the request comes from somebody who logged in, or has a token.

        ApiError for a wrong token, which counts as a try to guess.
        """
        if not self.credentials.needed or self._is_session(request.cookies.get(self._cookie, "")):
            return True
        kind, _, token = request.headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer":
            return False
        if self.credentials.knows_token(token.strip()):  # whatever others behind the same address have tried
            return True
        address = _address(request)
        self._refuse_hasty(address)
        self._throttle.record_failure(address)
        raise ApiError(401, "This token is not known here; take the one that the server was started with.")

    async def login(self, request: Request) -> Response:
        """Show the form, or read it."""
        if not self.credentials.needed or (request.method == "GET" and self.is_authenticated(request)):
            return RedirectResponse("./", 303)
        if request.method != "POST":
            return login_page()
        wants_page = "text/html" in request.headers.get("accept", "")
        try:
            await self._check(request)
        except ApiError as error:
            if not wants_page:
                raise
            retry = {"Retry-After": str(math.ceil(error.retry))} if error.retry else {}
            return login_page(error.detail, error.status, retry)
        response: Response = RedirectResponse("./", 303) if wants_page else JSONResponse({"success": True})
        self._start_session(request, response)
        return response

    def logout(self, request: Request) -> Response:
        """End the session that asks."""
        self._sessions.pop(digest(request.cookies.get(self._cookie, "")), None)
        response = RedirectResponse("login", 303)
        response.delete_cookie(self._cookie, httponly=True, samesite="lax")
        return response

    async def _check(self, request: Request) -> None:
        """ApiError unless the form has a user's name and password."""
        name, password = await _form(request)
        address = _address(request)
        self._refuse_hasty(address)
        self._throttle.record_failure(address)  # before the pause: tries at the same time must not share one
        await asyncio.sleep(self._throttle.delay())
        if not self.credentials.knows_user(name, password):
            raise ApiError(401, WRONG)
        self._throttle.reset(address)

    def _refuse_hasty(self, address: str) -> None:
        wait = self._throttle.retry_after(address)
        if wait:
            sentence = f"Too many wrong tries: wait {math.ceil(wait)} s, then try again."
            raise ApiError(429, sentence, retry=wait)

    def _start_session(self, request: Request, response: Response) -> None:
        """A new session under a new number: one that somebody else put into the browser stays worthless."""
        number = secrets.token_urlsafe(32)
        self._sessions[digest(number)] = time.time() + SESSION_SECONDS
        if len(self._sessions) > MOST_SESSIONS:
            self._sessions.popitem(last=False)
        response.set_cookie(
            self._cookie,
            number,
            max_age=SESSION_SECONDS,
            httponly=True,
            samesite="lax",
            secure=request.url.scheme == "https",
        )

    def _is_session(self, number: str) -> bool:
        return bool(number) and self._sessions.get(digest(number), 0.0) > time.time()


async def _form(request: Request) -> tuple[str, str]:
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > LARGEST_FORM:
            raise ApiError(413, "This is too long for a name and a password; shorten it.")
    try:
        fields: dict[str, list[Any]] = parse_qs(
            body.decode("utf-8"), keep_blank_values=True, max_num_fields=8
        )
    except ValueError:
        raise ApiError(400, "This is no login form; send the fields username and password.") from None
    return fields.get("username", [""])[0].strip(), fields.get("password", [""])[0]


def _address(request: Request) -> str:
    return request.client.host if request.client else ""


def login_page(
    problem: str = "", status: int = 200, headers: Mapping[str, str] | None = None
) -> HTMLResponse:
    """The form, with what went wrong the last time."""
    told = f'<p class="problem" role="alert">{escape(problem)}</p>' if problem else ""
    return HTMLResponse(
        PAGE.replace("%s", told), status, {"Content-Security-Policy": POLICY, **(headers or {})}
    )
