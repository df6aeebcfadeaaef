"""How fast the page answers while 200 jobs of 20 clients run on the Mini model, and while nothing runs.

    python -m benchmarks.load [--jobs 200] [--clients 20]

Measured: the page itself, and an act on the queue (a job is moved) until another program sees it.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.report import header
from shared.engine.configuration import EngineConfig
from shared.engine.engine import Engine
from shared.errors import UserError
from tests.support.browser import ROOT, serve

SETTINGS = {"model_type": "z_image_mini", "prompt": "a red circle", "num_inference_steps": 8}
PAUSE_SECONDS = 0.2  # between two questions, as a person would ask


def timed(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def line(name: str, times: list[float]) -> str:
    median, largest = statistics.median(times), max(times)
    return f"{name:40} median {1000 * median:7.1f} ms, max {1000 * largest:7.1f} ms ({len(times)} answers)"


def submit(config: EngineConfig, count: int) -> list[float]:
    engine = Engine(config)
    return [timed(lambda: engine.submit(SETTINGS, source="benchmark")) for _ in range(count)]


def measure(engine: Engine, url: str, goes_on: Callable[[], bool]) -> tuple[list[float], list[float]]:
    """(answers of the page, moves of a waiting job)."""

    def move() -> None:
        waiting = [job for job in engine.store.queue(limit=3) if job.status == "queued"]
        try:
            if waiting:
                engine.store.move(waiting[-1].id, place=0)
        except UserError:
            pass  # it has begun meanwhile

    pages, moves = list[float](), list[float]()
    while goes_on():
        pages.append(timed(lambda: urllib.request.urlopen(url, timeout=120).read()))
        moves.append(timed(move))
        time.sleep(PAUSE_SECONDS)
    return pages, moves


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--jobs", type=int, default=200, help="how many are submitted in all")
    parser.add_argument("--clients", type=int, default=20, help="how many submit them, at the same time")
    options = parser.parse_args()
    print(f"{header()}\n{options.jobs} jobs of {options.clients} clients\n")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "outputs"
        config = EngineConfig.at(ROOT, output_dir=folder, database=folder / ".zgp" / "zgp.sqlite3")
        engine = Engine(config)
        with serve(folder) as server:
            engine.submit(SETTINGS)
            while engine.store.queue(limit=1):
                time.sleep(0.1)
            rounds = iter(range(30))
            idle, _ = measure(engine, server.url, lambda: next(rounds, None) is not None)
            print(line("the page, nothing runs", idle))
            started = time.perf_counter()
            with ThreadPoolExecutor(options.clients) as pool:
                shares = [options.jobs // options.clients] * options.clients
                waits = [time for times in pool.map(lambda n: submit(config, n), shares) for time in times]
            print(line("a job is submitted", waits))
            pages, moves = measure(engine, server.url, lambda: bool(engine.store.queue(limit=1)))
            seconds = time.perf_counter() - started
            print(line("the page, jobs run", pages))
            print(line("a waiting job is moved", moves))
            ratio = statistics.median(pages) / statistics.median(idle)
            print(f"the page under load / idle: {ratio:.2f}x")
            counts = engine.store.counts()
            print(f"{counts.done - 1} of {sum(shares)} jobs done, {counts.failed} failed, in {seconds:.1f} s")


if __name__ == "__main__":
    main()
