"""Answers about files, remembered while the files stay as they are. Standard library only."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

Answer = TypeVar("Answer")
Identity = tuple[tuple[str, int, int], ...]

_remembered: list[Callable[[], None]] = []  # what empties each function's memory


def identity(paths: Iterable[Path]) -> Identity:
    """What changes when one of these files, or one in these folders, does: each one's path, bytes and time of
    its last change in ns. OSError when one is gone.
    """
    files = [file for path in paths for file in (sorted(path.rglob("*")) if path.is_dir() else [path])]
    states = ((file, file.stat()) for file in files)
    return tuple((str(file), status.st_size, status.st_mtime_ns) for file, status in states)


def remembered(answers: int) -> Callable[[Callable[..., Answer]], Callable[..., Answer]]:
    """Decorates a function of hashable arguments, an identity among them: keeps its last `answers`."""

    def decorate(ask: Callable[..., Answer]) -> Callable[..., Answer]:
        known = functools.lru_cache(maxsize=answers)(ask)
        _remembered.append(known.cache_clear)
        return known

    return decorate


def while_unchanged(answers: int) -> Callable[[Callable[..., Answer]], Callable[..., Answer]]:
    """Decorates a function of a file or folder, its first argument, and of further hashable ones: its last
    `answers` are given again while the file, or every file in the folder, is as it was. Errors are not
    remembered. Who gets an answer shares it, and must not change it.
    """

    def decorate(ask: Callable[..., Answer]) -> Callable[..., Answer]:
        @remembered(answers)
        def known(path: Path, state: Identity, *more: Any) -> Answer:
            return ask(path, *more)

        @functools.wraps(ask)
        def answer(path: Path, *more: Any) -> Answer:
            try:
                state = identity([path])
            except OSError:
                return ask(path, *more)  # which says in its own words what is missing
            return known(path, state, *more)

        return answer

    return decorate


def forget() -> None:
    """Ask everything anew, as a program does that has just begun."""
    for clear in _remembered:
        clear()
