"""How long a user waits: for the page, for the first picture after a cold start, for every later one.

    python -m benchmarks.page [--rounds 5]

The page is compared with an empty Gradio page on the same machine, in alternating rounds.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

from benchmarks.report import header
from shared.engine.configuration import EngineConfig
from shared.engine.engine import Engine
from tests.support.browser import FLAGS, ROOT, find_chromium, free_port

EMPTY = """
import sys
import gradio as gr
with gr.Blocks(analytics_enabled=False) as page:
    gr.Textbox(label="Prompt")
page.launch(server_port=int(sys.argv[1]), quiet=True)
"""
OURS = """
import sys
from pathlib import Path
from shared.cli.main import main
folder = Path(sys.argv[2])
main(["--server-port", sys.argv[1]], output_dir=folder, database=folder / ".zgp" / "zgp.sqlite3")
"""
SETTINGS = {
    "model_type": "z_image_mini",
    "prompt": "a red circle above a blue square on a yellow background",
}


def until_it_answers(code: str, folder: str) -> tuple[float, subprocess.Popen[bytes], str]:
    """(seconds from starting the process to its first answer, the process, its address)."""
    port = free_port()
    url, started = f"http://127.0.0.1:{port}/", time.perf_counter()
    command = [sys.executable, "-c", code, str(port), folder]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None:
        try:
            urllib.request.urlopen(url, timeout=5).read()
            return time.perf_counter() - started, process, url
        except OSError:
            time.sleep(0.02)
    raise SystemExit("The server ended before it answered.")


def stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    process.wait(20)


def browser_loads(url: str, rounds: int) -> float:
    """Median seconds from navigation to a visible text box, in a fresh browser profile each time."""
    from playwright.sync_api import sync_playwright

    times = []
    with sync_playwright() as playwright:
        for _ in range(rounds):
            browser = playwright.chromium.launch(executable_path=find_chromium(), args=FLAGS)
            page = browser.new_page()
            started = time.perf_counter()
            page.goto(url, wait_until="commit")
            page.locator("textarea").first.wait_for(state="visible")
            times.append(time.perf_counter() - started)
            browser.close()
    return statistics.median(times)


def parts(url: str) -> str:
    """What the browser has to fetch and to build before the text box is there."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_chromium(), args=FLAGS)
        page = browser.new_page()
        metrics = page.context.new_cdp_session(page)
        metrics.send("Performance.enable")
        page.goto(url, wait_until="commit")
        page.locator("textarea").first.wait_for(state="visible")
        told = {one["name"]: one["value"] for one in metrics.send("Performance.getMetrics")["metrics"]}
        config = page.evaluate(
            "[gradio_config.components.length, gradio_config.dependencies.length, "
            "performance.getEntriesByType('resource').length]"
        )
        browser.close()
    components, listeners, files = config
    kilobytes = len(urllib.request.urlopen(url, timeout=5).read()) // 1000
    return (
        f"{components} components, {listeners} listeners, {kilobytes} kB of page, {files} files, "
        f"{told['ScriptDuration']:.2f} s of script, {told['TaskDuration']:.2f} s of work in all"
    )


def timed(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def pictures(folder: Path, rounds: int) -> tuple[float, float]:
    """(cold start to first file, median of later jobs from submit to file), 8 steps at 128x128."""
    started = time.perf_counter()
    engine = Engine(EngineConfig.at(ROOT, output_dir=folder, database=folder / ".zgp" / "zgp.sqlite3"))
    engine.start()
    try:

        def make() -> None:
            job, _ = engine.submit(SETTINGS, source="benchmark")
            last = [event.kind for event in engine.follow(job, poll=0.005)][-1]
            if last != "done":
                raise SystemExit(f"The job ended as {last}: {engine.store.job(job).error}")

        make()
        first = time.perf_counter() - started
        return first, statistics.median(timed(make) for _ in range(rounds))
    finally:
        engine.stop()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each kind")
    rounds = parser.parse_args().rounds
    print(f"{header()}\nmedians of {rounds}\n")
    with tempfile.TemporaryDirectory() as folder:
        first, later = pictures(Path(folder), rounds)
        print(f"first picture after a cold start   {first:6.2f} s")
        print(f"later pictures, submit to file     {later:6.2f} s")
        starts: dict[str, list[float]] = {EMPTY: [], OURS: []}
        loads: dict[str, list[float]] = {EMPTY: [], OURS: []}
        for number in range(1, rounds + 1):
            for code in (EMPTY, OURS):
                seconds, process, url = until_it_answers(code, folder)
                starts[code].append(seconds)
                if find_chromium():
                    time.sleep(8)  # our worker loads its model beside the first answer
                    loads[code].append(browser_loads(url, 1))
                if find_chromium() and number == rounds:
                    print(f"{'ours' if code is OURS else 'empty':6} {parts(url)}")
                stop(process)
        for label, times in (("process start to first answer", starts), ("page in the browser", loads)):
            if times[OURS]:
                ours, empty = statistics.median(times[OURS]), statistics.median(times[EMPTY])
                print(f"{label:34} {ours:6.2f} s, empty Gradio page {empty:.2f} s: {ours / empty:.2f}x")


if __name__ == "__main__":
    main()
