"""What a job costs beside its picture, once its model is loaded: `python -m benchmarks.warm_job`.

Looking up one card and keeping what was read of files, against reading every card and header for each job, as
it was before. Both alternate in one process, so that the ratio holds on a busy machine.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

from benchmarks.report import header
from shared.files import unchanged
from shared.library.catalog import catalog
from shared.weights.files import Folders
from shared.worker.model_manager import ModelHost, Silent

ROOT = Path(__file__).resolve().parents[1]
MODELS = ("z_image_mini", "z_image_mini_twinflow")


def seconds(model: str, host: ModelHost, folders: Folders, cold: bool) -> tuple[float, float]:
    """(looking up and planning, painting) of one job."""
    settings = host.info(model).defaults | {"prompt": "a red circle", "seed": 1}
    if cold:
        unchanged.forget()
    began = time.perf_counter()
    if cold:
        catalog(folders.root, folders.ckpts)
    loaded = host.get(model, Silent(), settings)
    there = time.perf_counter()
    loaded.processor.generate(
        settings,
        seeds=[1],
        on_phase=lambda phase: None,
        on_step=lambda step, steps, previews: None,
        interrupt=lambda: False,
    )
    return there - began, time.perf_counter() - there


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=15)
    jobs = parser.parse_args().jobs
    folders = Folders(ROOT, ROOT / "ckpts")
    host = ModelHost(folders)
    print(header())
    print("| model | looked up | ms before the picture | ms of the picture | share |\n|---|---|---|---|---|")
    for model in MODELS:
        runs: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
        for _ in range(jobs + 1):
            for cold, times in runs.items():
                times.append(seconds(model, host, folders, cold))
        for cold, times in runs.items():
            before, painting = (statistics.median(column) * 1000 for column in zip(*times[1:], strict=True))
            name = "everything, anew" if cold else "one card, remembered"
            share = before / (before + painting)
            print(f"| {model} | {name} | {before:.1f} | {painting:.1f} | {share:.0%} |")


if __name__ == "__main__":
    main()
