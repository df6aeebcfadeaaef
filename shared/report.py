"""What a bug report needs to know of this program and computer, and nothing that is private."""

from __future__ import annotations

import getpass
import importlib.metadata
import os
import platform
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shared.version import VERSION

PACKAGES = ("torch", "gradio", "diffusers", "transformers", "mmgp", "optimum-quanto")
LOG_LINES, LOG_BYTES = 60, 64_000

#: what a secret looks like -> what stands in its place
_SECRETS = (
    (r"\bhf_\w{8,}", "hf_…"),
    (r"(?i)\b(bearer|basic)\s+[\w.~+/=-]{6,}", r"\1 …"),
    (r"(?i)([\w-]*(?:token|secret|passw(?:or)?d|api[_-]?key|signature|auth)[\w-]*[\"']?\s*[=:]\s*)[\"']?[^\s\"'&,;)]+",
     r"\1…"),
    (r"(\w+://)[^\s/@]+@", r"\1…@"),
)  # fmt: skip


def report(machine: str, config: Mapping[str, Any], log_file: Path) -> str:
    """The versions, the machine, what the configuration changes, and the end of the log."""
    lines = [
        f"ZGP {VERSION}, Python {platform.python_version()}, {platform.platform()}",
        ", ".join(f"{name} {version(name)}" for name in PACKAGES),
        machine,
        *(f"{name} = {value}" for name, value in config.items()),
        "",
        *(tail(log_file) or ["(the log is empty)"]),
    ]
    return scrubbed("\n".join(lines))


def version(package: str) -> str:
    """Of an installed package, which is not imported for it."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "is not installed"


def tail(path: Path) -> list[str]:
    """The last lines of a log; none when there is no log."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - LOG_BYTES))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return []
    return text.splitlines()[-LOG_LINES:]


def scrubbed(text: str) -> str:
    """Without tokens and passwords, and without the user's name in paths."""
    for value in filter(None, (os.environ.get(name) for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"))):
        text = text.replace(value, "…")
    for pattern, instead in _SECRETS:
        text = re.sub(pattern, instead, text)
    home = str(Path.home())
    if len(home) > 1:
        text = text.replace(home, "~")
    return re.sub(rf"(?<=[/\\]){re.escape(_user())}(?=[/\\]|$)", "USER", text, flags=re.MULTILINE)


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container without an entry for this user
        return "nobody"
