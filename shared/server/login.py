"""The login: one page, one cookie; programs show a token instead."""

from __future__ import annotations

import asyncio
import math
import secrets
import time
from collections import OrderedDict
from typing import Any
from urllib.parse import parse_qs

from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response

from shared.server.credentials import Access, digest
from shared.server.login_page import login_page
from shared.server.refused import Refused
from shared.server.throttle import SlowDown

SESSION_SECONDS = 7 * 24 * 3600
MOST_SESSIONS = 1000
LARGEST_FORM = 8192  # bytes
WRONG = "That name and password do not belong together."


class Doors:
    """Knows who is in. `cookie`: its name, another one for each port, since cookies know no ports."""

    def __init__(self, access: Access, cookie: str = "zgp_session", slow: SlowDown | None = None) -> None:
        self.access = access
        self._cookie = cookie
        self._slow = slow or SlowDown()
        self._sessions: OrderedDict[bytes, float] = OrderedDict()  # digest of the cookie -> its end

    def admits(self, request: Request) -> bool:
        """Whether the request comes from somebody who logged in, or has a token.

        Refused for a wrong token, which counts as a try to guess.
        """
        if not self.access.needed or self._is_session(request.cookies.get(self._cookie, "")):
            return True
        kind, _, token = request.headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer":
            return False
        if self.access.knows_token(token.strip()):  # whatever others behind the same address have tried
            return True
        address = _address(request)
        self._refuse_hasty(address)
        self._slow.failed(address)
        raise Refused(401, "This token is not known here; take the one that the server was started with.")

    async def login(self, request: Request) -> Response:
        """Show the form, or read it."""
        if not self.access.needed or (request.method == "GET" and self.admits(request)):
            return RedirectResponse("./", 303)
        if request.method != "POST":
            return login_page()
        wants_page = "text/html" in request.headers.get("accept", "")
        try:
            await self._check(request)
        except Refused as refused:
            if not wants_page:
                raise
            retry = {"Retry-After": str(math.ceil(refused.retry))} if refused.retry else {}
            return login_page(refused.sentence, refused.status, retry)
        response: Response = RedirectResponse("./", 303) if wants_page else JSONResponse({"success": True})
        self._begin(request, response)
        return response

    def logout(self, request: Request) -> Response:
        """End the session that asks."""
        self._sessions.pop(digest(request.cookies.get(self._cookie, "")), None)
        response = RedirectResponse("login", 303)
        response.delete_cookie(self._cookie, httponly=True, samesite="lax")
        return response

    async def _check(self, request: Request) -> None:
        """Refused unless the form has a user's name and password."""
        name, password = await _form(request)
        address = _address(request)
        self._refuse_hasty(address)
        self._slow.failed(address)  # before the pause: tries at the same time must not share one
        await asyncio.sleep(self._slow.pause())
        if not self.access.knows_user(name, password):
            raise Refused(401, WRONG)
        self._slow.passed(address)

    def _refuse_hasty(self, address: str) -> None:
        wait = self._slow.wait(address)
        if wait:
            raise Refused(429, f"Too many wrong tries: wait {math.ceil(wait)} s, then try again.", retry=wait)

    def _begin(self, request: Request, response: Response) -> None:
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
            raise Refused(413, "This is too long for a name and a password; shorten it.")
    try:
        fields: dict[str, list[Any]] = parse_qs(
            body.decode("utf-8"), keep_blank_values=True, max_num_fields=8
        )
    except ValueError:
        raise Refused(400, "This is no login form; send the fields username and password.") from None
    return fields.get("username", [""])[0].strip(), fields.get("password", [""])[0]


def _address(request: Request) -> str:
    return request.client.host if request.client else ""
