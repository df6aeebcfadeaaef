"""Serve the page and REST until the process is told to stop."""

from __future__ import annotations

import logging
import os
import secrets
import socket
import sys
import tempfile
import webbrowser
from collections.abc import Iterable
from pathlib import Path
from types import FrameType
from urllib.parse import urlsplit

import uvicorn
from gradio.networking import setup_tunnel

from shared.engine.engine import Engine
from shared.errors import UserError
from shared.server.app import make_app
from shared.server.credentials import OWN_USER, Credentials
from shared.server.login import LoginSessions
from shared.server.origin import HostOriginCheck, is_loopback
from shared.ui.app import build

ANY_ADDRESS = ("0.0.0.0", "::")
MOST_CONNECTIONS = 1000  # at once, streams and slow senders among them; more are answered 503


def launch(
    engine: Engine,
    *,
    host: str = "127.0.0.1",
    port: int = 7860,
    share: bool = False,
    open_browser: bool = False,
    theme: str = "",
    access: Credentials | None = None,
    generated_password: str = "",
    allowed_hosts: Iterable[str] = (),
) -> None:
    """Returns or raises KeyboardInterrupt when the process is told to stop. UserError when the port is taken.

    access: who may come in (nobody named: everybody). generated_password: to be told at the start.
    allowed_hosts: names that this server answers to beside its own.
    """
    access = access or Credentials()
    engine.config.output_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="zgp-uploads-", ignore_cleanup_errors=True) as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder  # ours alone: Gradio's usual one is that of all its programs
        page = build(engine, login=access.needed)
        origins = HostOriginCheck(listens=not is_loopback(host), allowed=allowed_hosts)
        sessions = LoginSessions(access, f"zgp_session_{port}")
        app = make_app(engine, page, Path(folder), origins, sessions, theme)
        config = uvicorn.Config(
            app, log_level="warning", access_log=False, server_header=False, ws="none",
            timeout_graceful_shutdown=1, limit_concurrency=MOST_CONNECTIONS,
        )  # fmt: skip
        with listening(host, port) as opened:
            print(greeting(host, port, generated_password), flush=True)
            if share:
                _share(host, port, origins)
            if open_browser:
                webbrowser.open(local_url(host, port))
            _Server(config).run(sockets=[opened])


class _Server(uvicorn.Server):
    """Is silent about the streams that it cuts off when it is told to stop: every open page has some."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        super().handle_exit(sig, frame)


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens. UserError when it cannot."""
    opened = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        if sys.platform != "win32":  # there the option would let two servers share a port
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        opened.bind((host.strip("[]"), port))
        opened.listen(128)
    except OSError as error:
        opened.close()
        raise UserError(
            f"Port {port} on {host} cannot be used ({error.strerror or 'it is taken'}): "
            "close the other program or choose another port with --server-port."
        ) from error
    return opened


def greeting(host: str, port: int, generated_password: str = "") -> str:
    """Where the page is, and how to come in when that is not known yet."""
    lines = [f"ZGP is at {local_url(host, port)}"]
    if host in ANY_ADDRESS and (address := own_address()):
        lines.append(f"Other computers of this network find it at http://{address}:{port}/")
    if generated_password:
        lines.append(
            f"Log in as {OWN_USER} with the password {generated_password} (made up for this start; --auth "
            "user:password sets your own)."
        )
    return "\n".join(lines)


def local_url(host: str, port: int) -> str:
    name = "127.0.0.1" if host in ANY_ADDRESS else f"[{host}]" if ":" in host else host
    return f"http://{name}:{port}/"


def own_address() -> str:
    """The address of this computer on its way to others; "" when it has none. Sends nothing."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
            return str(probe.getsockname()[0])
        except OSError:
            return ""


def _share(host: str, port: int, origins: HostOriginCheck) -> None:
    """Make the page public. Without the tunnel it stays where it is, which is said."""
    near = "127.0.0.1" if host in ANY_ADDRESS else host
    try:
        url = setup_tunnel(near, port, secrets.token_urlsafe(32), None, None)
    except Exception as error:  # Gradio raises anything: of its own, of httpx, of the program that it starts
        print(f"--share found no tunnel ({error}): the page is not public.", file=sys.stderr, flush=True)
        return
    name = urlsplit(url).hostname or ""
    origins.allow(name)
    print(f"Everybody who can log in finds it at https://{name}/", flush=True)
