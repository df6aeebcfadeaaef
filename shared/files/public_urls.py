"""Addresses that other people wrote lead to the internet, never to what only this computer can reach."""

from __future__ import annotations

import ipaddress
import socket

import httpx

from shared.errors import UserError


def check_public(url: str, resolve: bool = True) -> None:
    """UserError for an address on this computer or in its network. resolve: look its name up.

    Looking up is enough, since only https is followed: a name that has moved to a private address by the time
    of the connection finds no certificate there.
    """
    parts = httpx.URL(url)
    if parts.scheme != "https":
        raise UserError(f"{url} leads to an address without https: download it yourself and use the file.")
    if any(not _is_public(address) for address in _addresses(parts.host, resolve)):
        raise UserError(
            f"{parts.host} is not an address on the internet: nothing is fetched from this computer or its "
            "network, put the file into the folder yourself."
        )


def check_request(request: httpx.Request) -> None:
    """`check_public` as a hook of httpx, which calls it for redirects as well."""
    check_public(str(request.url))


def _addresses(host: str, resolve: bool) -> list[str]:
    if host.rstrip(".").lower() == "localhost":
        return ["127.0.0.1"]
    flags = 0 if resolve else socket.AI_NUMERICHOST
    try:
        return [
            str(found[4][0]) for found in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=flags)
        ]
    except (socket.gaierror, UnicodeError):
        return []  # a name that is unknown here: a proxy may know it, or the connection fails with its reason


def _is_public(text: str) -> bool:
    address = ipaddress.ip_address(text.partition("%")[0])
    inner = getattr(address, "ipv4_mapped", None) or getattr(address, "sixtofour", None) or address
    return inner.is_global and not inner.is_multicast
