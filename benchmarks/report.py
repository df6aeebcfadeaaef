"""What every benchmark prints first: where and on what it ran."""

from __future__ import annotations

import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

PACKAGES = ("torch", "diffusers", "transformers", "gradio", "mmgp", "comfy-kitchen")


def commit() -> str:
    root = Path(__file__).resolve().parents[1]
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=root, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found.stdout.strip()


def processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {len(names)} cores" if names else platform.processor()


def installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def card(device: torch.device) -> str:
    """What the benchmark computes on. Ends the program with 2 where that is a CUDA card and there is none."""
    if device.type != "cuda":
        return f"{device.type} (a rehearsal: its numbers mean nothing)"
    if not torch.cuda.is_available():
        print("This benchmark needs a CUDA device, and there is none.", file=sys.stderr)
        raise SystemExit(2)
    properties = torch.cuda.get_device_properties(device)
    capability = f"{properties.major}.{properties.minor}"
    memory = f"{properties.total_memory / 2**30:.1f} GiB"
    return f"{properties.name}, {memory}, compute capability {capability}, CUDA {torch.version.cuda}"


def header() -> str:
    packages = ", ".join(f"{name} {installed(name)}" for name in PACKAGES)
    return f"{processor()}\nPython {platform.python_version()}, {packages}\ncommit {commit()}"
