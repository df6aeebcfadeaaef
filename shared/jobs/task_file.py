"""Files of tasks for running without a page: JSON settings, saved queues, or one prompt per line."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.errors import UserError
from shared.imaging.foreign import pasted
from shared.imaging.foreign.comfy_graph import is_graph
from shared.imaging.foreign.reader import from_graph
from shared.jobs.inputs import PICTURES
from shared.jobs.queue_file import read_queue, unwrapped
from shared.prompts.lines import units
from shared.settings.table import LINES


@dataclass(frozen=True)
class Task:
    """One item of a file, counted from 1. `values` is whatever the file has there, not yet validated."""

    number: int
    values: Any


def read_tasks(path: Path, folder: Path) -> list[Task]:
    """Read a .json (one object, a list of them, Wan2GP's list of {"id", "params"}, or what other programs
    write, whose values are a Foreign), .txt (prompts, or such data) or .zip file; UserError when it cannot be
    read as such. The pictures of a .zip file are put into `folder`.
    """
    if path.suffix.lower() == ".zip":
        return _tasks(path, read_queue(path, folder))
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise UserError(
            f"{path} is not a task file: expected a name that ends in .zip, {' or '.join(READERS)}."
        )
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
    return _tasks(path, [_beside(item, path.parent) for item in items])


def _tasks(path: Path, items: list[Any]) -> list[Task]:
    if not items:
        raise UserError(f"{path} holds no tasks: expected at least one.")
    return [Task(number, values) for number, values in enumerate(items, start=1)]


def _beside(values: Any, folder: Path) -> Any:
    """The settings with the paths of pictures that lie beside their file."""
    if not isinstance(values, dict):
        return values
    named = {name: values[name] for name in PICTURES if isinstance(values.get(name), str) and values[name]}
    return values | {name: str(folder / file) for name, file in named.items() if (folder / file).is_file()}


def _read_json(text: str) -> list[Any]:
    content = json.loads(text)
    if is_graph(content):
        found = from_graph(content)
        if found is None:
            raise UserError("This ComfyUI workflow has no sampler that makes a picture: name another file.")
        return [found]
    items = [unwrapped(item) for item in (content if isinstance(content, list) else [content])]
    return [pasted.from_json(item) or item for item in items]


def _read_prompts(text: str) -> list[Any]:
    """Data of pictures, as other programs write it beside them; else a prompt for each line."""
    return list(pasted.read(text)) or [{"prompt": line} for line in units(text, LINES)]


READERS: dict[str, Callable[[str], list[Any]]] = {".json": _read_json, ".txt": _read_prompts}
