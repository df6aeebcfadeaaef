"""A pytest plugin: a line for each file of tests in the place of a dot for each test.

    [12 of 90] tests/ui/test_page.py
    [13 of 90] tests/gpu/test_planner.py
               tests/ui/test_page.py took 34 s

The name is there as soon as the file runs. A test that fails is named when it does, a file that took long
when it ends. Several files may run at once (pytest-xdist's `-n`). Where one asked pytest for more or for less
(-v, -q), it is left as it is.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Generator, Sequence

import pytest

LONG = 10  # seconds


@pytest.hookimpl(trylast=True)  # after the terminal's
def pytest_configure(config: pytest.Config) -> None:
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None and config.get_verbosity() == 0:
        config.pluginmanager.register(Progress(reporter), "progress by file")


class Progress:
    def __init__(self, reporter: pytest.TerminalReporter) -> None:
        self.reporter = reporter
        self.left: Counter[str] = Counter()  # tests of each file that have not ended
        self.began: dict[str, float] = {}
        reporter.showfspath = False

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        if session.items:
            self.left = Counter(item.nodeid.split("::")[0] for item in session.items)

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, node: object, ids: Sequence[str]) -> None:
        self.left = Counter(test.split("::")[0] for test in ids)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        file = nodeid.split("::")[0]
        if file not in self.began:
            self.began[file] = time.monotonic()
            self.reporter.write_line(f"[{len(self.began)} of {len(self.left)}] {file}")

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        file = nodeid.split("::")[0]
        self.left[file] -= 1
        took = time.monotonic() - self.began[file]
        if not self.left[file] and took >= LONG:
            self.reporter.write_line(f"{'':11}{file} took {took:.0f} s")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.reporter.write_line(f"{'':11}FAILED {report.nodeid}", red=True)

    @pytest.hookimpl(wrapper=True)
    def pytest_report_teststatus(
        self, report: pytest.CollectReport | pytest.TestReport
    ) -> Generator[None, tuple[str, str, object], tuple[str, str, object]]:
        category, _, word = yield
        return category, "", word
