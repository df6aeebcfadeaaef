"""Requests as an attacker writes them, given to an ASGI application without a network in between."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

HOST = (("Host", "localhost:7860"),)
Headers = Iterable[tuple[str, str]]


@dataclass(frozen=True)
class Answer:
    status: int
    headers: tuple[tuple[str, str], ...]
    body: bytes

    def header(self, name: str) -> str:
        return next((value for key, value in self.headers if key.lower() == name.lower()), "")

    @property
    def everything(self) -> bytes:
        return self.body + repr(self.headers).encode()

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def ask(
    app: Any,
    method: str,
    target: str,
    headers: Headers = HOST,
    body: bytes | list[bytes] = b"",
    client: str = "127.0.0.1",
    scheme: str = "http",
) -> Answer:
    """One request. `target` is sent as it stands; a list as `body` comes in chunks, without a length."""
    return asyncio.run(send(app, method, target, headers, body, client, scheme))


async def send(
    app: Any,
    method: str,
    target: str,
    headers: Headers = HOST,
    body: bytes | list[bytes] = b"",
    client: str = "127.0.0.1",
    scheme: str = "http",
) -> Answer:
    """As `ask`, for applications whose requests have to share an event loop."""
    chunks = [body] if isinstance(body, bytes) else body
    sent = [(name.lower().encode(), value.encode("latin-1")) for name, value in headers]
    if isinstance(body, list):
        sent.append((b"transfer-encoding", b"chunked"))
    elif body and not any(name == b"content-length" for name, _ in sent):
        sent.append((b"content-length", str(len(body)).encode()))
    path, _, query = target.partition("?")
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "scheme": scheme,
        "path": unquote(path), "raw_path": path.encode("latin-1"), "query_string": query.encode("latin-1"),
        "root_path": "", "headers": sent, "client": (client, 50000), "server": ("127.0.0.1", 7860),
    }  # fmt: skip
    return await _run(app, scope, chunks)


async def _run(app: Any, scope: dict[str, Any], chunks: list[bytes]) -> Answer:
    waiting = list(chunks)
    got: list[Any] = []

    async def receive() -> Any:
        if waiting:
            chunk = waiting.pop(0)
            return {"type": "http.request", "body": chunk, "more_body": bool(waiting)}
        await asyncio.sleep(5)
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        got.append(message)

    await asyncio.wait_for(app(scope, receive, send), 20)
    headers = tuple((key.decode("latin-1"), value.decode("latin-1")) for key, value in got[0]["headers"])
    return Answer(got[0]["status"], headers, b"".join(message.get("body", b"") for message in got[1:]))
