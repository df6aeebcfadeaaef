"""A JSON object in a file of the user's: replaced whole or not at all, set aside when it is damaged.

The version before the last write stays beside it as NAME.bak.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shared.errors import UserError
from shared.files import atomic


def parse(path: Path) -> dict[str, Any]:
    """The file's object. Raises ValueError, saying what is wrong with it, or OSError."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(content, dict):
        raise ValueError("it is not a JSON object")
    return content


def backup_of(path: Path) -> Path:
    """Where the version before the last write is."""
    return path.with_name(f"{path.name}.bak")


def set_aside(path: Path, why: str) -> Path:
    """Rename the file to NAME.WHY-DATE-TIME, which it returns; nothing is overwritten."""
    stem = f"{path.name}.{why}-{time.strftime('%Y%m%d-%H%M%S')}"
    free = (path.with_name(stem + (f"-{number}" if number else "")) for number in range(1000))
    aside = next(name for name in free if not name.exists())
    os.replace(path, aside)
    return aside


def write(path: Path, content: Mapping[str, Any]) -> None:
    """Replace the file, keeping the one before it as its backup. UserError when the disk refuses."""
    try:
        with atomic.replacing(path) as part:
            part.write_text(json.dumps(content, indent=2, ensure_ascii=False), encoding="utf-8")
            atomic.flush(part)
            if path.exists():
                shutil.copyfile(path, backup_of(path))
    except OSError as error:
        raise not_written(path, error) from error


def not_written(path: Path, error: OSError) -> UserError:
    """The sentence for a folder that is read-only, a full disk and the like."""
    reason = error.strerror or str(error)
    return UserError(f"{path} could not be written ({reason}): check the folder and its space.")
