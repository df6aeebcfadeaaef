"""How much one request may bring."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from anyio import to_thread

from shared.server.errors import ApiError

Receive = Callable[[], Awaitable[Any]]

MEGABYTE = 1 << 20
MAX_BODY = 32 * MEGABYTE  # settings, and the masks that are painted on the page
MAX_UPLOAD = 256 * MEGABYTE
UPLOADS = ("/gradio_api/upload", "/api/v1/uploads")
MAX_DEPTH = 64
_STRINGS = re.compile(rb'"(?:[^"\\]|\\.)*"', re.DOTALL)
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_BRACKETS = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1}


async def limit_body(scope: Any, receive: Receive) -> Receive:
    """What the application is to receive from. ApiError for a body that is too large or too deep."""
    headers = dict(scope["headers"])
    length = _length(headers.get(b"content-length"))
    if scope["path"] in UPLOADS:
        if length is None and scope["method"] == "POST":
            raise ApiError(411, "An upload must say how long it is: send a Content-Length.")
        _check(length or 0, MAX_UPLOAD)  # the server itself cuts off what comes beyond the length
        return receive
    _check(length or 0, MAX_BODY)
    if not length and b"transfer-encoding" not in headers:
        return receive
    body = bytearray()
    async for chunk in _chunks(receive):
        body += chunk
        _check(len(body), MAX_BODY)
    if not await to_thread.run_sync(is_shallow, bytes(body)):
        raise ApiError(400, f"The JSON is nested more than {MAX_DEPTH} levels deep; flatten it.")
    if not await to_thread.run_sync(is_text, bytes(body)):
        raise ApiError(400, "The JSON has half of a character (\\ud800 to \\udfff alone); leave it out.")
    return _replay(bytes(body), receive)


def is_shallow(body: bytes) -> bool:
    """Whether JSON text nests at most MAX_DEPTH brackets. Anything that is no JSON counts as it is."""
    if body.count(b"[") + body.count(b"{") <= MAX_DEPTH:
        return True
    depth = 0
    for character in re.sub(rb"[^][{}]+", b"", _STRINGS.sub(b"", body)):
        depth += _BRACKETS[character]
        if depth > MAX_DEPTH:
            return False
    return True


def is_text(body: bytes) -> bool:
    """Whether the texts of JSON can be written again. Anything that is no JSON counts as if they could."""
    if not _SURROGATE.search(body):
        return True
    try:
        json.dumps(json.loads(body), ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    except ValueError:
        return True
    return True


async def _chunks(receive: Receive) -> AsyncIterator[bytes]:
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ApiError(400, "The connection ended before the request did.")
        more = message.get("more_body", False)
        yield message.get("body", b"")


def _replay(body: bytes, receive: Receive) -> Receive:
    waiting = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Any:
        return waiting.pop() if waiting else await receive()

    return again


def _length(value: bytes | None) -> int | None:
    if value is None:
        return None
    if not re.fullmatch(rb"\d{1,15}", value):
        raise ApiError(400, "The Content-Length is no number; correct it.")
    return int(value)


def _check(length: int, most: int) -> None:
    if length > most:
        raise ApiError(413, f"The request is larger than {most // MEGABYTE} MB; send less at once.")
