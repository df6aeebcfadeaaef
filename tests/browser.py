"""What the browser tests stand on: a Chromium, if this computer has one, and a ZGP server of its own."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome", "msedge")
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
START_SECONDS = 120.0

# The page as `python wgp.py` shows it, but with pictures and jobs in a folder of the test.
_SERVE = """
import sys
from pathlib import Path
from shared.cli import main
folder = Path(sys.argv[1])
sys.exit(main(["--server-port", sys.argv[2]], output_dir=folder, database=folder / ".zgp" / "zgp.sqlite3"))
"""


@dataclass(frozen=True)
class Server:
    """A running page; `folder` has its pictures and its database."""

    url: str
    folder: Path

    def pictures(self) -> list[Path]:
        return sorted(path for path in self.folder.glob("*/*.*") if path.suffix in (".png", ".jpeg", ".webp"))


def find_chromium() -> str | None:
    """The path of a Chromium on this computer: the system's, else the one that Playwright downloaded."""
    installed = [found for found in map(shutil.which, NAMES) if found]
    if installed:
        return installed[0]
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        bundled = playwright.chromium.executable_path
    return bundled if os.path.exists(bundled) else None


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def serve(folder: Path) -> Iterator[Server]:
    """Start ZGP with its outputs in `folder`; ended with the signal that Ctrl-C sends."""
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    with open(folder / "server.log", "wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", _SERVE, str(folder), str(port)],
            cwd=ROOT,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            url = f"http://127.0.0.1:{port}/"
            _wait_for(url, process, folder / "server.log")
            yield Server(url, folder)
        finally:
            process.send_signal(signal.SIGINT if os.name != "nt" else signal.SIGTERM)
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait_for(url: str, process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            said = log.read_text(errors="replace")
            raise RuntimeError(f"The server ended with code {process.returncode}: {said}")
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    raise RuntimeError(f"The server did not answer at {url}: {log.read_text(errors='replace')}")
