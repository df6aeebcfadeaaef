"""Who a request says it is for, and which page it comes from.

A foreign web page can make a browser send requests to this computer, under its own name when that name's
address changes meanwhile (DNS rebinding). It can neither choose the Host nor hide its Origin: both are
checked on every request. An address as Host needs no list, since rebinding takes a name.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Iterable
from typing import Any

from shared.errors import UserError
from shared.server.errors import ApiError

LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")
AUTHORITY = re.compile(r"(?P<name>\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::(?P<port>\d{1,5}))?", re.IGNORECASE)
HOST_NAME = re.compile(r"[a-z0-9]([a-z0-9._-]{0,251}[a-z0-9])?", re.IGNORECASE)
DEFAULT_PORTS = {"http": "80", "https": "443"}
SINGLE = (b"host", b"origin", b"content-length", b"transfer-encoding", b"x-forwarded-host")


def is_loopback(host: str) -> bool:
    """Whether a server that listens there is reached from this computer alone."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def host_name(text: str) -> str:
    """A name that may follow --allowed-host; UserError for anything but a bare name."""
    if not HOST_NAME.fullmatch(text):
        raise UserError(f"--allowed-host came as '{text}'; expected a name such as studio.example.org.")
    return text.lower()


class HostOriginCheck:
    """The names that this server answers to. `listens`: other computers may ask; `allowed`: further names."""

    def __init__(self, listens: bool = False, allowed: Iterable[str] = ()) -> None:
        own = {socket.gethostname(), socket.getfqdn(), f"{socket.gethostname()}.local"} if listens else set()
        self._listens = listens
        self._allowed = {name.lower() for name in allowed}
        self._own = {name.lower() for name in own}

    def allow(self, name: str) -> None:
        """Answer to one more name from now on."""
        self._allowed.add(name.lower())

    def checked(self, scope: Any) -> dict[str, Any]:
        """The ASGI scope with the name that the browser used as its Host. ApiError for foreign requests."""
        headers = _single_headers(scope["headers"])
        host = headers.get(b"x-forwarded-host") or headers.get(b"host", "")
        name = _name(host)
        if not self._knows(name):
            raise ApiError(
                403,
                f"This server does not answer to the name '{name or host[:100]}': open it by its address, or "
                "start it with --allowed-host NAME.",
            )
        self._check_origin(headers.get(b"origin"), host)
        _check_site(headers)
        kept = [(key, value) for key, value in scope["headers"] if key not in _REPLACED]
        return {**scope, "headers": [*kept, (b"host", host.encode("latin-1"))]}

    def _knows(self, name: str) -> bool:
        if name in LOOPBACK_NAMES or name in self._allowed or name in self._own:
            return True
        try:
            address = ipaddress.ip_address(name.strip("[]"))
        except ValueError:
            return False
        return self._listens or address.is_loopback

    def _check_origin(self, origin: str | None, host: str) -> None:
        if origin is None:
            return
        scheme, _, authority = origin.partition("://")
        if scheme not in DEFAULT_PORTS or _with_port(authority, scheme) != _with_port(host, scheme):
            raise ApiError(403, "This request comes from another web page; use this server's own page.")


#: Gradio would build addresses from these; the Host that was checked takes their place
_REPLACED = (b"host", b"x-forwarded-host", b"x-gradio-server", b"x-forwarded-prefix")


def _single_headers(headers: Iterable[tuple[bytes, bytes]]) -> dict[bytes, str]:
    """The headers by name. ApiError for a request that two servers could read in two ways."""
    found: dict[bytes, str] = {}
    for key, value in headers:
        if key in SINGLE and key in found:
            raise ApiError(400, f"The header {key.decode('latin-1')} came twice; send it once.")
        found[key] = value.decode("latin-1").strip()
    if b"content-length" in found and b"transfer-encoding" in found:
        raise ApiError(400, "The request has a Content-Length and a Transfer-Encoding; send one of them.")
    return found


def _check_site(headers: dict[bytes, str]) -> None:
    """A page of another origin may link here, but not embed what is here."""
    site, mode = headers.get(b"sec-fetch-site", "none"), headers.get(b"sec-fetch-mode")
    framed = headers.get(b"sec-fetch-dest") in ("iframe", "frame", "embed", "object")
    if site in ("cross-site", "same-site") and (mode != "navigate" or framed):
        raise ApiError(403, "This request comes from another web page; use this server's own page.")


def _name(authority: str) -> str:
    match = AUTHORITY.fullmatch(authority)
    return match["name"].lower().rstrip(".") if match else ""


def _with_port(authority: str, scheme: str) -> tuple[str, str] | None:
    match = AUTHORITY.fullmatch(authority)
    return (match["name"].lower(), match["port"] or DEFAULT_PORTS[scheme]) if match else None
