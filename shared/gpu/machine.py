"""What there is to compute on, by what the system says: no torch. The worker asks device.py, which has it."""

from __future__ import annotations

import functools
import logging
import platform
import subprocess
from pathlib import Path

import psutil

from shared.gpu import kernel_packages
from shared.gpu.offload_engines import has_mmgp
from shared.gpu.planner import Machine

log = logging.getLogger(__name__)

QUERY = (
    "nvidia-smi",
    "--query-gpu=name,memory.total,memory.free,compute_cap",
    "--format=csv,noheader,nounits",
)
BF16_FLAGS = ({"avx512bw", "avx512vl", "avx512dq"}, {"avx_ne_convert"}, {"bf16"})  # any one of these sets
CGROUP = Path("/sys/fs/cgroup")
AMD = Path("/dev/kfd")


def survey(gpu: str = "") -> Machine:
    """As `device.read`, from what the system says; of kernels it expects what the installed packages have for
    such a card.

    gpu: "", "cpu" or "cuda:N".
    """
    number = int(gpu.removeprefix("cuda:")) if gpu.startswith("cuda:") else 0
    rows = [] if gpu == "cpu" else nvidia_smi()
    if number >= len(rows):
        return on_cpu(cpu_has_bf16())
    name, total, free, text = (cell.strip() for cell in rows[number].split(","))
    major, _, minor = text.partition(".")
    capability = int(major), int(minor)
    ram_total, ram_free = ram()
    return Machine(
        name,
        ram_total,
        ram_free,
        vram_total=int(total) << 20,
        vram_free=int(free) << 20,
        capability=capability,
        kernels=kernel_packages.expected(capability, kernel_packages.installed()),
        mmgp=has_mmgp(),
    )


@functools.cache
def has_card(gpu: str = "") -> bool:
    """Whether there is a graphics card that torch could use; looked for once. gpu: as for `survey`."""
    return survey(gpu).capability is not None or (gpu != "cpu" and AMD.exists())


def nvidia_smi() -> list[str]:
    """One line per card; none without NVIDIA's driver."""
    try:
        done = subprocess.run(QUERY, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        log.debug("No card was found by nvidia-smi: %s", error)
        return []
    return [line for line in done.stdout.splitlines() if line.count(",") == 3]


def on_cpu(fast_bf16: bool) -> Machine:
    ram_total, ram_free = ram()
    return Machine(platform.processor() or "CPU", ram_total, ram_free, fast_bf16=fast_bf16)


def ram() -> tuple[int, int]:
    """(total, free) bytes of RAM, as far as a container allows. What this process holds itself counts as
    free, so that a plan does not change because its own weights are loaded.
    """
    memory, mine = psutil.virtual_memory(), psutil.Process().memory_info()
    own = mine.rss - getattr(mine, "shared", 0)  # mapped files are available anyway
    total, free = memory.total, memory.available
    try:
        limit = int((CGROUP / "memory.max").read_text())
        used = int((CGROUP / "memory.current").read_text()) - _cached()
    except (OSError, ValueError):  # no container, or "max"
        return total, min(total, free + own)
    total = min(total, limit)
    return total, min(total, free + own, max(0, limit - used) + own)


def _cached() -> int:
    """Bytes that a container counts as used although they only cache files."""
    rows = (line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
    return sum(int(count) for name, count in rows if name in ("active_file", "inactive_file"))


def cpu_has_bf16() -> bool:
    """Whether torch would multiply bf16 here in one of the processor's own instructions (Linux only)."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
    lines = [line for line in text.splitlines() if line.startswith(("flags", "Features"))]
    flags = set(lines[0].split()) if lines else set()
    return any(needed <= flags for needed in BF16_FLAGS)
