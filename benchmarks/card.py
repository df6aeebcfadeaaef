"""All that is to be measured on a card, within ten minutes: the tables of docs/performance.md, in turn.

    python -m benchmarks.card [--minutes 10]

Each benchmark is a process of its own, with the time that is left; what does not end in it is said. The first
ones are those that the project misses most.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence

import torch

from benchmarks.report import card

#: the most useful first; sizes and rounds so that a fast card has time for all of them
RUNS: tuple[tuple[str, ...], ...] = (
    ("gpu", "--rounds", "3"),
    ("vram", "--cards", "8", "16", "--steps", "4", "--only", "mmgp", "stream"),
    ("vram", "--cards", "8", "--steps", "4", "--only", "diffusers"),
    ("bus",),
    ("gpu", "--size", "512", "--rounds", "3"),
)


def run(arguments: Sequence[str], seconds: float) -> str:
    """Why there is no whole table of it; "" when there is. Its lines are printed as they come."""
    command = [sys.executable, "-m", f"benchmarks.{arguments[0]}", *arguments[1:]]
    print(f"\n## python -m benchmarks.{' '.join(arguments)}\n", flush=True)
    try:
        done = subprocess.run(command, timeout=max(1.0, seconds), check=False)
    except subprocess.TimeoutExpired:
        return "out of time"
    return f"exit code {done.returncode}" if done.returncode else ""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=10.0, help="for all of them together")
    args = parser.parse_args()
    print(card(torch.device("cuda")))
    end = time.monotonic() + args.minutes * 60
    for arguments in RUNS:
        if problem := run(arguments, end - time.monotonic()):
            print(f"\n(not whole: {problem})", flush=True)


if __name__ == "__main__":
    main()
