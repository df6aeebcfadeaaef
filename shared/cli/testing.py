"""What `start.py --test` does: sets up with the tools for tests, then checks and tests everything.

Standard library only: it runs before anything is installed.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from shared import installing
from shared.installing import StartError

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
CI_SECONDS = 45 * 60  # several times what they take: there a hang would block others, elsewhere one sees it
NO_TESTS_RAN = 5  # pytest's exit code
MAX_PROCESSES = 4  # each holds torch, models and at times a browser
COUNT = re.compile(r"(\d+) (failed|passed|skipped|xfailed|xpassed|error)")


@dataclass(frozen=True)
class Check:
    """One command of --test. `tests`: it is a run of pytest, whose last line counts what passed."""

    name: str
    command: list[str]
    tests: bool = False


@dataclass(frozen=True)
class Outcome:
    """How a check ended. `verdict`: "passed", "FAILED" or "out of time"; `closing`: its last line."""

    check: Check
    verdict: str
    seconds: float
    closing: str


def test(flags: Sequence[str]) -> int:
    """Set up, then run every check even if an earlier one fails. Returns 0 when all passed."""
    end = end_of_time(os.environ, time.monotonic())
    installing.set_up([installing.REQUIREMENTS, installing.TEST_REQUIREMENTS])
    browser = find_browser()
    planned = checks(installing.venv_python(), flags)
    outcomes = []
    for number, check in enumerate(planned, 1):
        print(f"\n--- {number} of {len(planned)}: {check.name}", flush=True)
        outcomes.append(run_check(check, end, flags))
    print(summary(outcomes, browser), flush=True)
    return int(any(outcome.verdict != "passed" for outcome in outcomes))


def end_of_time(environment: Mapping[str, str], now: float) -> float | None:
    """When the checks are interrupted, on the clock of `now`: never, but under CI."""
    return now + CI_SECONDS if environment.get("CI") else None


def checks(python: Path, flags: Sequence[str]) -> list[Check]:
    """Quick ones first, so that a slip is told early. Files of tests run side by side, one to a processor."""
    tool = [str(python), "-m"]
    colour = ["--color=yes"] if sys.stdout.isatty() else []
    progress = ["-p", "tests.support.progress", "-o", "console_output_style=classic"]
    processes = min(os.cpu_count() or 1, MAX_PROCESSES)
    together = ["-n", str(processes), "--dist", "loadfile"] if processes > 1 else []
    pytest = [*tool, "pytest", *progress, *together, *colour, *flags]
    return [
        Check("ruff", [*tool, "ruff", "check", "."]),
        Check("mypy", [*tool, "mypy"]),
        Check("layers", [str(python.with_name("lint-imports")), "--no-logo", "--no-cache"]),
        Check("fast tests", [*pytest, "-m", "not slow and not browser"], tests=True),
        Check("slow tests", [*pytest, "-m", "slow or browser"], tests=True),
    ]


def find_browser() -> str:
    """The path of a browser for the tests, installed if this is root on a system with apt; else ""."""
    found = next(filter(None, map(shutil.which, BROWSERS)), "")
    if found or not shutil.which("apt-get") or not is_root():
        return found
    print("Installing Chromium for the browser tests.")
    try:
        installing.install(["apt-get", "update"])
        installing.install(["apt-get", "install", "-y", "--no-install-recommends", "chromium"])
    except StartError as error:
        print(f"Chromium was not installed: {error}", file=sys.stderr)
    return next(filter(None, map(shutil.which, BROWSERS)), "")


def is_root() -> bool:
    return hasattr(os, "geteuid") and os.geteuid() == 0


def run_check(check: Check, end: float | None, flags: Sequence[str]) -> Outcome:
    """Run one check, passing its output on, and interrupt it when time.monotonic() reaches `end`."""
    began = time.monotonic()
    with subprocess.Popen(
        check.command, cwd=installing.ROOT, stdout=subprocess.PIPE, start_new_session=True
    ) as child:
        try:
            with alarms(child, end):
                closing = pass_on(child.stdout)
        except KeyboardInterrupt:
            stop(child)
            raise
    good = {0, NO_TESTS_RAN} if check.tests and flags else {0}
    late = end is not None and time.monotonic() > end
    verdict = "passed" if child.returncode in good else "out of time" if late else "FAILED"
    return Outcome(check, verdict, time.monotonic() - began, closing)


@contextlib.contextmanager
def alarms(child: subprocess.Popen[bytes], end: float | None) -> Iterator[None]:
    """Interrupt a check when time.monotonic() reaches `end`, and kill it 20 s later."""
    if end is None:
        yield
        return
    left = max(0.0, end - time.monotonic())
    timers = [threading.Timer(left, stop, [child]), threading.Timer(left + 20, stop, [child, True])]
    try:
        for timer in timers:
            timer.start()
        yield
    finally:
        for timer in timers:
            timer.cancel()


def pass_on(output: IO[bytes] | None) -> str:
    """Print output as it comes, unfinished lines too, and return its last line that is not empty."""
    assert isinstance(output, io.BufferedReader)
    tail = b""
    while piece := output.read1():
        sys.stdout.buffer.write(piece)
        sys.stdout.flush()
        tail = (tail + piece)[-4096:]
    lines = [line.strip() for line in tail.decode(errors="replace").splitlines()]
    return next(filter(None, reversed(lines)), "")


def stop(child: subprocess.Popen[bytes], at_once: bool = False) -> None:
    """Interrupt a check and all that it started, as Ctrl-C would, or kill them."""
    if os.name != "posix":
        child.kill() if at_once else child.terminate()
        return
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL if at_once else signal.SIGINT)


def summary(outcomes: Sequence[Outcome], browser: str) -> str:
    """What --test prints at the end: a line for each check, then one in pytest's form with all its counts."""
    lines = ["", "--- summary"]
    for outcome in outcomes:
        closing = outcome.closing.strip("= ") if outcome.check.tests else ""
        line = f"{outcome.check.name:12}{outcome.verdict:12}{outcome.seconds:7.1f} s   {closing}"
        lines.append(line.rstrip())
    if not browser:
        lines.append(f"The browser tests were skipped: none of {', '.join(BROWSERS)} is installed.")
    return "\n".join([*lines, total([outcome for outcome in outcomes if outcome.check.tests])])


def total(outcomes: Sequence[Outcome]) -> str:
    """The closing lines of several pytest runs as one: "===== 1 failed, 300 passed in 83.10s ====="."""
    counts: Counter[str] = Counter()
    for outcome in outcomes:
        for number, word in COUNT.findall(outcome.closing):
            counts[word] += int(number)
    told = ", ".join(f"{number} {word}" for word, number in sorted(counts.items())) or "no tests ran"
    return f"===== {told} in {sum(outcome.seconds for outcome in outcomes):.2f}s ====="
