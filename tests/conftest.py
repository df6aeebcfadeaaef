"""The fixtures of the tests that open the page: a browser, a server and a function that opens tabs."""

from __future__ import annotations

import functools
import gc
import os
import signal

# One thread computes, here and in the processes that tests start. Threads of one computation wait for each
# other spinning: where something else keeps the processor busy, two took ten times as long as one.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Ctrl-C is what ends servers, and who runs tests in the background of a shell has it ignored.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest

from shared.library.catalog import catalog
from tests.support.browser import ROOT, Visit, chromium, serve, visits
from tests.support.cards import card  # noqa: F401  (a fixture)


def pytest_collection_finish(session: pytest.Session) -> None:
    """What is imported by now stays: no garbage collection looks at it again, and many tests ask for one."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def models():
    """The catalog of the project; skips where the built-in models' cards or weights are not."""
    found = catalog(ROOT, ROOT / "ckpts")
    if "z_image_mini" not in found.models or not found.models["z_image_mini"].available:
        pytest.skip("the Mini models are not here")
    return found


@pytest.fixture(scope="module")
def browser():
    """A Chromium. Not for the whole run: while Playwright drives one, no test can call asyncio.run."""
    with chromium() as running:
        yield running


@pytest.fixture(scope="session")
def shared_server(tmp_path_factory, models):
    """A page for the tests that do not mind each other's pictures, and leave the queue empty."""
    with serve(tmp_path_factory.mktemp("shared") / "outputs") as running:
        yield running


@pytest.fixture(scope="module")
def server(tmp_path_factory, models):
    """A page of the module's own, without a picture at first."""
    with serve(tmp_path_factory.mktemp("page") / "outputs") as running:
        yield running


@pytest.fixture
def visit(request, browser, server):
    """Opens tabs of the page: of the class that the module names as its VISIT. None may complain."""
    kind = getattr(request.module, "VISIT", Visit)
    with visits(functools.partial(kind, browser, server.url)) as open_page:
        yield open_page
