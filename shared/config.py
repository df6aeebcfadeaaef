"""The program's own settings file, `wgp_config.json`: where things lie on this computer.

Wan2GP's file of the same name can be used as it is; its other keys are left alone. The file is replaced whole
or not at all, and the one before it stays as `wgp_config.json.bak`. A file that cannot be read is set aside
under another name, never overwritten.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from shared.errors import UserError

log = logging.getLogger(__name__)

FILE = "wgp_config.json"


@dataclass(frozen=True)
class Config:
    """checkpoints_paths: folders with model files, searched in this order; downloads go into the first.
    loras_root: the folder of all LoRA folders. Relative paths start from the project's root.
    """

    checkpoints_paths: tuple[str, ...] = ("ckpts", ".")
    loras_root: str = "loras"

    def folders(self, root: Path) -> list[Path]:
        """`checkpoints_paths` as absolute paths."""
        return [root / path for path in self.checkpoints_paths]


def _is_paths(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(x, str) and x.strip() for x in value)


#: key -> (what its value must be, in words, the same as a test, how the value is kept)
KEYS: dict[str, tuple[str, Callable[[Any], bool], Callable[[Any], Any]]] = {
    "checkpoints_paths": ("a list of folders", _is_paths, tuple),
    "loras_root": ("a folder", lambda value: isinstance(value, str) and bool(value.strip()), str),
}


def read(folder: Path) -> tuple[Config, list[str]]:
    """The configuration in `folder`, and what the user must be told of it.

    A damaged file is renamed and the backup takes its place; a wrong value is replaced by the default.
    """
    path = folder / FILE
    if not path.exists():
        return Config(), []
    try:
        return _checked(_parse(path), path)
    except ValueError as error:
        aside = path.with_name(f"{FILE}.damaged-{time.strftime('%Y%m%d-%H%M%S')}")
        os.replace(path, aside)
        notice = f"{path} cannot be read ({error}); it is now {aside.name}"
    backup = path.with_name(f"{FILE}.bak")
    try:
        config, notices = _checked(_parse(backup), backup)
    except (OSError, ValueError):
        return Config(), [f"{notice}, and the defaults apply."]
    shutil.copyfile(backup, path)
    return config, [f"{notice}, and the version before it applies.", *notices]


def write(folder: Path, changes: Mapping[str, Any]) -> None:
    """Change these keys of the file and keep the rest. Raises UserError for a wrong value or a full disk."""
    path = folder / FILE
    for key, value in changes.items():
        if problem := _problem(key, value):
            raise UserError(f"{problem}.")
    read(folder)  # sets a damaged file aside
    old = _parse(path) if path.exists() else {}
    temporary = path.with_name(f"{FILE}.{os.getpid()}.tmp")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump({**old, **changes}, file, indent=2, ensure_ascii=False)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            shutil.copyfile(path, path.with_name(f"{FILE}.bak"))
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(
            f"{path} could not be written ({error.strerror}): check the folder and its space."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def _parse(path: Path) -> dict[str, Any]:
    """The file's object. Raises ValueError, saying what is wrong with it."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(content, dict):
        raise ValueError("it is not a JSON object")
    return content


def _problem(key: str, value: Any) -> str | None:
    if key not in KEYS:
        return f"{FILE} has no key '{key}'; it has: {', '.join(KEYS)}"
    words, fits, _ = KEYS[key]
    return None if fits(value) else f"'{key}' in {FILE} came as {json.dumps(value)[:80]}; expected {words}"


def _checked(content: Mapping[str, Any], path: Path) -> tuple[Config, list[str]]:
    config, notices = Config(), []
    for key, value in content.items():
        if key not in KEYS:
            log.debug("%s: the key %s means nothing here.", path, key)
        elif problem := _problem(key, value):
            notices.append(f"{problem}; the default applies.")
        else:
            config = replace(config, **{key: KEYS[key][2](value)})
    return config, notices
