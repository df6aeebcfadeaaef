"""Files of tasks for running without a page: JSON settings, or one prompt per line."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.errors import UserError
from shared.prompts.lines import units
from shared.settings import LINES


@dataclass(frozen=True)
class Task:
    """One item of a file, counted from 1. `values` is whatever the file has there, not yet validated."""

    number: int
    values: Any


def read_tasks(path: Path) -> list[Task]:
    """Read a .json (one object or a list of them) or .txt file; UserError when it cannot be read as such."""
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise UserError(f"{path} is not a task file: expected a name that ends in {' or '.join(READERS)}.")
    try:
        items = reader(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}): check the name and its permissions."
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: save it as UTF-8 and start again.") from error
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path} is not JSON ({error.msg} in line {error.lineno}, column {error.colno}): "
            "expected one object of settings or a list of them."
        ) from error
    except RecursionError as error:
        raise UserError(f"{path} is nested too deeply: expected settings or a list of them.") from error
    if not items:
        raise UserError(f"{path} holds no tasks: expected at least one.")
    return [Task(number, values) for number, values in enumerate(items, start=1)]


def _read_json(text: str) -> list[Any]:
    content = json.loads(text)
    return content if isinstance(content, list) else [content]


def _read_prompts(text: str) -> list[Any]:
    return [{"prompt": line} for line in units(text, LINES)]


READERS: dict[str, Callable[[str], list[Any]]] = {".json": _read_json, ".txt": _read_prompts}
