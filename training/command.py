"""What the training commands have in common: their usual arguments, and how a run begins."""

from __future__ import annotations

import argparse
import logging

import torch


def usual_parser(about: str | None) -> argparse.ArgumentParser:
    """A parser with --threads; `about` is the docstring of the command's module."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    return parser


def begin(args: argparse.Namespace) -> str:
    """Set the log and the threads up, make the folder of the run; returns the device, "cuda" or "cpu"."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    return "cuda" if torch.cuda.is_available() else "cpu"
