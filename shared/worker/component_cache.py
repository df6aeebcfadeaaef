"""Parts that models have in common (text encoder, VAE, transformer), each in memory once."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Key:
    """What a part was made of: files as they were on disk, and anything else that its making depends on."""

    files: tuple[tuple[Path, int, int], ...]
    config: Hashable

    @property
    def paths(self) -> set[Path]:
        return {path for path, _, _ in self.files}


class PartStore:
    """One part for each role. `let_go` is told of a part before it is dropped."""

    def __init__(self, let_go: Callable[[Any], None] = lambda part: None):
        self._parts: dict[str, tuple[Key, Any]] = {}
        self._let_go = let_go

    def share(self, role: str, files: Sequence[Path], config: Hashable, make: Callable[[], T]) -> T:
        """The part of that role made of these files and `config`: the one in memory, else a new one in the
        place of the other one, which goes first.
        """
        key = Key(tuple(_as_it_is(path) for path in files), config)
        if role not in self._parts or self._parts[role][0] != key:
            self._drop(role)
            self._parts[role] = key, make()
        return self._parts[role][1]

    def retain(self, files: Iterable[Path]) -> None:
        """Drop every part that is made of other files than these, or those in these folders."""
        wanted = {inside.resolve() for path in files for inside in (path, *path.rglob("*"))}
        for role, (key, _) in list(self._parts.items()):
            if not key.paths <= wanted:
                self._drop(role)

    def _drop(self, role: str) -> None:
        if role in self._parts:
            self._let_go(self._parts[role][1])
            del self._parts[role]


def _as_it_is(path: Path) -> tuple[Path, int, int]:
    found = path.stat()
    return path.resolve(), found.st_size, found.st_mtime_ns
