"""A pytest plugin: a line for each file of tests in the place of a dot for each test.

    [12 of 90] tests/test_page.py  34 s

The name is there as soon as the file runs, the letters of tests that did not pass follow as they come. Where
one asked pytest for more or for less (-v, -q), it is left as it is. The lines end well only with
`-o console_output_style=classic`, without pytest's own percentages.
"""

from __future__ import annotations

import time
from collections.abc import Generator

import pytest


@pytest.hookimpl(trylast=True)  # after the terminal's
def pytest_configure(config: pytest.Config) -> None:
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None and config.get_verbosity() == 0:
        config.pluginmanager.register(Progress(reporter), "progress by file")


class Progress:
    def __init__(self, reporter: pytest.TerminalReporter) -> None:
        self.reporter = reporter
        self.files: list[str] = []  # in the order in which they run
        self.running, self.began = "", 0.0
        reporter.showfspath = False

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.files = list(dict.fromkeys(item.location[0] for item in session.items))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(
        self, item: pytest.Item, nextitem: pytest.Item | None
    ) -> Generator[None, object, object]:
        file = item.location[0]
        if file != self.running:
            self.running, self.began = file, time.monotonic()
            number = self.files.index(file) + 1
            self.reporter.write(f"[{number} of {len(self.files)}] {file}  ", flush=True)
        result = yield
        if nextitem is None or nextitem.location[0] != file:
            self.reporter.write(f"{time.monotonic() - self.began:.0f} s\n", flush=True)
        return result

    @pytest.hookimpl(wrapper=True)
    def pytest_report_teststatus(
        self, report: pytest.CollectReport | pytest.TestReport
    ) -> Generator[None, tuple[str, str, object], tuple[str, str, object]]:
        category, letter, word = yield
        return (category, "", "") if letter == "." else (category, letter, word)
