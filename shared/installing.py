"""Makes the environment in .venv on the first run, and runs wgp.py in it.

Standard library only: it runs before anything is installed.
"""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv"
LOG = VENV / "zgp-install.log"
UNFINISHED = VENV / ".zgp-unfinished"  # there while a set-up is going on, so one that was cut off is known
REQUIREMENTS = ROOT / "requirements.txt"
TEST_REQUIREMENTS = ROOT / "requirements-dev.txt"

WITHOUT_PAGE = {"--process", "--list-models", "--help", "-h", "--version", "--open-browser"}

SHOWN = re.compile(
    r"\s*(Collecting|Downloading|Downloaded|Using cached|Building|Installing|Resolved|Prepared|Installed)\b"
)
KERNELS = "comfy-kitchen>=0.2.40,<0.3"  # fused kernels for NVIDIA cards; 68 MB that a CPU has no use for
INSTALLED_GB = {False: 3, True: 6}  # by whether torch is the build for cards: on Linux it always is
FRACTION = re.compile(r"Progress (\d+) of (\d+)")
HINTS = (
    (r"No space left|not enough space", "the disk is full: make room"),
    (
        r"getaddrinfo|timed out|unreachable|NewConnectionError|dns error|name resolution|Connection refused"
        r"|Name or service not known|Failed to establish a new connection",
        "check the internet connection",
    ),
    (r"CERTIFICATE_VERIFY_FAILED", "check this computer's date and its certificates"),
    (r"Permission denied|Access is denied", f"allow writing to {VENV}, and stop ZGP if it runs"),
)


class StartError(Exception):
    """What went wrong and what to do about it, in one sentence."""


@dataclass(frozen=True)
class Machine:
    """What decides which torch is installed. system: "Linux", "Windows" or "Darwin"."""

    system: str
    nvidia: bool = False
    amd: bool = False

    @staticmethod
    def here() -> Machine:
        nvidia = bool(shutil.which("nvidia-smi")) or Path("/proc/driver/nvidia/version").exists()
        return Machine(platform.system(), nvidia, Path("/dev/kfd").exists())


def refused(error: OSError) -> str:
    """The sentence for a folder that is read-only and the like."""
    where, reason = error.filename or VENV, error.strerror or str(error)
    if error.errno == errno.ENOSPC:
        return f"{where} could not be written: the disk is full: make room, then start again."
    return f"{where} cannot be used ({reason}): move ZGP to a folder that you may write to, then start again."


def check_space(machine: Machine) -> None:
    """StartError when the packages will not fit on the disk."""
    needed = INSTALLED_GB[machine.nvidia or machine.system == "Linux"]
    free = shutil.disk_usage(ROOT).free / 1e9
    if free < needed:
        raise StartError(
            f"the disk of {ROOT} has {free:.1f} GB free, and the installation needs about {needed} GB: make "
            "room, then start again."
        )


def opens_page(arguments: Iterable[str], environment: Mapping[str, str] = os.environ) -> bool:
    """Whether the first start should open a browser: there is a page, and somebody in front of a display."""
    if WITHOUT_PAGE & {argument.partition("=")[0] for argument in arguments}:
        return False
    if environment.get("CI") or environment.get("SSH_CONNECTION"):
        return False
    has_display = environment.get("DISPLAY") or environment.get("WAYLAND_DISPLAY")
    return bool(has_display) or platform.system() in ("Windows", "Darwin")


def run_zgp(arguments: Sequence[str]) -> int:
    """Run wgp.py in the environment: in this very process where the system can, so that signals reach it."""
    python = venv_python()
    command = [str(python), str(ROOT / "wgp.py"), *arguments]
    sys.stdout.flush()
    if os.name == "posix":
        os.execv(python, command)
    child = subprocess.Popen(command)
    while True:
        try:
            return child.wait()
        except KeyboardInterrupt:
            continue  # the child got the Ctrl-C too; its exit code is the answer


# Setting up


def set_up(files: Sequence[Path]) -> bool:
    """Install the requirements files that are not installed as they stand now. Returns whether any was."""
    if all(map(is_set_up, files)):
        return False
    if needs_new_venv():
        check_space(Machine.here())
        make_venv()
    UNFINISHED.touch()
    waiting = [file for file in files if not is_set_up(file)]
    for file in waiting:
        stamp(file).unlink(missing_ok=True)
    print(f"Installing ZGP into {VENV}. This takes some minutes, once.")
    began = time.monotonic()
    for command in install_commands(Machine.here(), venv_python(), waiting, pip_version()):
        install(command)
    for file in waiting:
        stamp(file).write_text(stamp_text(file), encoding="utf-8")
    UNFINISHED.unlink()
    print(f"Installed in {time.monotonic() - began:.0f} s.")
    return True


def venv_python() -> Path:
    return VENV / "Scripts" / "python.exe" if os.name == "nt" else VENV / "bin" / "python"


def stamp(file: Path) -> Path:
    """The file in the environment that tells which text of a requirements file it has, for which Python."""
    return VENV / f".zgp-{file.stem}"


def stamp_text(file: Path) -> str:
    return f"{hashlib.sha256(file.read_bytes()).hexdigest()} {sys.version_info[0]}.{sys.version_info[1]}\n"


def read_stamp(file: Path) -> str:
    """The stamp's text, or "" when there is none."""
    try:
        return stamp(file).read_text(encoding="utf-8")
    except FileNotFoundError:
        return ""


def is_set_up(file: Path) -> bool:
    return read_stamp(file) == stamp_text(file) and venv_python().exists()


def needs_new_venv() -> bool:
    """Whether .venv is missing, half made or made for another Python. Never so while running from it."""
    if Path(sys.prefix).resolve() == VENV.resolve():
        return False
    old, new = read_stamp(REQUIREMENTS).split(), stamp_text(REQUIREMENTS).split()
    return not venv_python().exists() or UNFINISHED.exists() or bool(old and old[1:] != new[1:])


def make_venv() -> None:
    """An empty environment in .venv, in the place of any earlier one."""
    if not (importlib.util.find_spec("venv") and importlib.util.find_spec("ensurepip")):
        name = f"python3.{sys.version_info[1]}-venv"
        raise StartError(
            "This Python cannot make an environment (venv or ensurepip is missing): install the package "
            f"python3-venv (on Debian and Ubuntu: sudo apt install python3-venv {name}) and start again."
        )
    shutil.rmtree(VENV, ignore_errors=True)
    VENV.mkdir(exist_ok=True)
    UNFINISHED.touch()
    install([sys.executable, "-m", "venv", str(VENV)])


def pip_version() -> tuple[int, ...]:
    """The version of pip in the environment; (0,) when it does not tell."""
    command = [str(venv_python()), "-m", "pip", "--version"]
    told = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    found = re.match(r"pip (\d+)\.(\d+)", told)
    return (int(found[1]), int(found[2])) if found else (0,)


def install_commands(
    machine: Machine, python: Path, files: Sequence[Path], pip: tuple[int, ...]
) -> list[list[str]]:
    """The commands that install requirements files into the environment of `python`.

    The package index has the right torch for NVIDIA on Linux, for CPUs and for macOS. For Windows and for AMD
    it has not; uv knows the other builds and picks by the driver (--torch-backend=auto).
    """
    wanted = [part for file in files for part in ("-r", str(file))]
    wanted += [KERNELS] if machine.nvidia else []
    pip_install = [str(python), "-m", "pip", "install", "--no-input", "--disable-pip-version-check"]
    if pip >= (24, 1):
        pip_install += ["--progress-bar", "raw"]
    if machine.system == "Windows" or (machine.system == "Linux" and machine.amd and not machine.nvidia):
        uv_install = [str(python), "-m", "uv", "pip", "install", "--python", str(python)]
        return [[*pip_install, "uv"], [*uv_install, "--torch-backend=auto", *wanted]]
    return [[*pip_install, *wanted]]


def install(command: Sequence[str]) -> None:
    """Run a command that installs: a live line of what it does, all in the log. StartError if it fails."""
    live, last = LiveLine(sys.stdout), ""
    with LOG.open("a", encoding="utf-8") as log:
        log.write(f"$ {' '.join(command)}\n")
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                              errors="replace", env=os.environ | {"PIP_USER": "0"}) as child:  # fmt: skip
            for line in child.stdout or ():
                fraction = FRACTION.match(line)
                if fraction:
                    live.show(f"{last} {100 * int(fraction[1]) // max(1, int(fraction[2]))}%")
                    continue
                log.write(line)
                if SHOWN.match(line):
                    last = line.partition(" (from ")[0].strip()
                    live.show(last)
    live.clear()
    if child.returncode:
        said = LOG.read_text(encoding="utf-8", errors="replace").rpartition("\n$ ")[2]
        print("\n".join(said.splitlines()[-12:]), file=sys.stderr)
        raise StartError(failure(child.returncode, said))


def failure(code: int, said: str) -> str:
    """The sentence for a failed installation, with advice if the reason is a common one."""
    advice = next((advice for pattern, advice in HINTS if re.search(pattern, said, re.I)), "mend the cause")
    return f"the installation failed (exit code {code}, see {LOG}): {advice}, then start again."


class LiveLine:
    """One line of a terminal that is written over; elsewhere (a log of CI) a line every few seconds."""

    def __init__(self, stream: IO[str], every: float = 10.0) -> None:
        self.stream, self.every, self.live = stream, every, stream.isatty()
        self.shown = time.monotonic()

    def show(self, text: str) -> None:
        now = time.monotonic()
        if self.live:
            width = shutil.get_terminal_size().columns - 1
            self.stream.write("\r" + text[:width].ljust(width))
        elif now - self.shown >= self.every:
            self.shown = now
            self.stream.write(f"  {text[:100]}\n")
        self.stream.flush()

    def clear(self) -> None:
        if self.live:
            self.show("")
            self.stream.write("\r")
            self.stream.flush()
