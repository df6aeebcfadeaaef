"""What the browser tests stand on: a Chromium, if this computer has one, and a ZGP server of its own."""

from __future__ import annotations

import functools
import os
import shutil
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import pytest

from tests.support.waiting import LIMIT, until

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome", "msedge")
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip

# The page as `python wgp.py` shows it, but with pictures and jobs in a folder of the test.
_SERVE = """
import sys
from pathlib import Path
from shared.cli.main import main
folder = Path(sys.argv[1])
sys.exit(main(["--server-port", sys.argv[2]], output_dir=folder, database=folder / ".zgp" / "zgp.sqlite3"))
"""


@dataclass(frozen=True)
class Server:
    """A running page; `folder` has its pictures and its database, `pid` is its process."""

    url: str
    folder: Path
    pid: int

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
def chromium() -> Iterator:
    """A browser for a module's tests; they are skipped where there is none."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    found = find_chromium()
    if found is None:
        pytest.skip("there is no Chromium on this computer")
    with sync_api.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=found, args=FLAGS)
        yield running
        running.close()


@contextmanager
def serve(folder: Path, script: str = _SERVE, port: int = 0) -> Iterator[Server]:
    """Start ZGP with its outputs in `folder`; ended with the signal that Ctrl-C sends.

    script: Python code that gets the folder and the port as its arguments. port: 0 takes a free one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    port = port or free_port()
    with open(folder / "server.log", "wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", script, str(folder), str(port)],
            cwd=ROOT,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            url = f"http://127.0.0.1:{port}/"
            _wait_for(url, process, folder / "server.log")
            yield Server(url, folder, process.pid)
        finally:
            process.send_signal(signal.SIGINT if os.name != "nt" else signal.SIGTERM)
            try:
                process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait_for(url: str, process: subprocess.Popen, log: Path) -> None:
    def answers() -> bool:
        if process.poll() is not None:
            said = log.read_text(errors="replace")
            raise RuntimeError(f"The server ended with code {process.returncode}: {said}")
        try:
            with urllib.request.urlopen(url, timeout=LIMIT):
                return True
        except urllib.error.HTTPError:
            return True  # one has to log in first
        except (urllib.error.URLError, OSError):
            return False

    until(answers)


class Visit:
    """One tab. Collects what a page must never do: errors in the console, requests to other machines."""

    def __init__(self, browser, url, **options):
        self.context = browser.new_context(**options)
        self.tab = self.context.new_page()
        self.tab.set_default_timeout(1000 * LIMIT)
        self.complaints: list[str] = []
        self.tab.on("console", lambda m: self.complaints.append(m.text) if m.type == "error" else None)
        self.tab.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.tab.on("request", self._check_host)
        self.tab.goto(url)
        self.tab.wait_for_selector("#generate")

    def _check_host(self, request):
        parts = urlsplit(request.url)
        if parts.scheme not in ("data", "blob") and parts.hostname != "127.0.0.1":
            self.complaints.append(f"request to {request.url}")

    def reload(self):
        """Gradio complains of the streams that end with the old page: that is no complaint of ours."""
        before = list(self.complaints)
        self.tab.reload()
        self.tab.wait_for_selector("#generate")
        self.complaints[:] = before

    def until(self, condition, pause=None):
        """The condition's answer, once it is true; the page goes on meanwhile."""
        return until(condition, pause or functools.partial(self.tab.wait_for_timeout, 50))

    def choose_model(self, name):
        self.tab.locator("#model_type input").click()
        self.tab.get_by_role("option", name=name, exact=True).click()

    def set_number(self, setting, value):
        box = self.tab.locator(f"#{setting} input[type=number]")
        box.fill(str(value))
        box.press("Tab")

    def generate(self, prompt="a red circle above a blue square on a yellow background"):
        self.tab.locator("#prompt textarea").fill(prompt)
        self.tab.locator("#generate").click()

    def wait_until_idle(self):
        self.tab.wait_for_function("document.querySelector('#generate')?.innerText.trim() === 'Generate'")
        self.tab.wait_for_selector("#cancel", state="hidden")

    def value(self, setting):
        return self.tab.locator(f"#{setting} input, #{setting} textarea").first.input_value()

    def scrolls_sideways(self):
        return self.tab.evaluate("document.documentElement.scrollWidth > innerWidth")


V = TypeVar("V", bound=Visit)


@contextmanager
def visits(visit: Callable[..., V]) -> Iterator[Callable[..., V]]:
    """A function that opens pages as `visit` does. At the end they are closed; none may complain."""
    opened: list[V] = []

    def open_page(**options: Any) -> V:
        opened.append(visit(**options))
        return opened[-1]

    yield open_page
    for one in opened:
        one.context.close()
    complaints = [complaint for one in opened for complaint in one.complaints]
    assert not complaints, complaints
