"""Wildcard files: lists to draw from, in the folder wildcards/ and its subfolders.

`__animals/birds__` stands for an entry of wildcards/animals/birds.txt, which has one in each line; `#` begins
a comment line. A .yaml or .json file holds lists under names, as sd-dynamic-prompts has them: of
{artists: {dutch: [...]}}, `__artists/dutch__` draws. `*` stands for any part of a name. An entry may hold
choices and wildcards again.
"""

from __future__ import annotations

import fnmatch
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from shared.errors import UserError
from shared.settings.messages import nearest, printable

MAX_BYTES = 8 << 20
MAX_TABLE_BYTES = 1 << 20  # of a YAML or JSON file, which takes longer to read
MAX_NESTED = 20
MAX_ENTRIES = 200_000  # of all files that a name with * stands for
_LISTS, _TABLES = (".txt",), (".yaml", ".yml", ".json")


_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(frozen=True)
class Wildcards:
    """The files of a folder as they were when one was first asked for; the folder need not exist."""

    folder: Path

    @functools.cached_property
    def _files(self) -> dict[str, Path]:
        return {self._name(path): path for path in self._found(_LISTS)}

    @functools.cached_property
    def _tables(self) -> dict[str, list[str] | UserError]:
        """The lists of all YAML and JSON files; of a file that cannot be read, why."""
        tables: dict[str, list[str] | UserError] = {}
        for path in self._found(_TABLES):
            try:
                tables |= dict(_lists(_table(path), ""))
            except UserError as error:
                tables[self._name(path)] = error
        return tables

    def _found(self, endings: tuple[str, ...]) -> list[Path]:
        # Names are looked up here and never made into paths, so none leads out of the folder; nor do links.
        root = self.folder.resolve()
        files = (path for path in self.folder.rglob("*.*") if path.suffix.lower() in endings)
        return sorted(path for path in files if path.resolve().is_relative_to(root))

    def _name(self, path: Path) -> str:
        return path.relative_to(self.folder).with_suffix("").as_posix()

    def names(self) -> list[str]:
        """What can stand between the underscores."""
        return sorted({*self._files, *self._tables})

    def entries(self, name: str) -> list[str]:
        """The entries of a file, or of all that a name with * stands for. UserError when there is none of
        that name, or it cannot be used.
        """
        if "*" not in name:
            return self._entries(name)
        pattern = name.replace("**", "*")
        matching = [one for one in self.names() if fnmatch.fnmatchcase(one, pattern)]
        if not matching:
            raise UserError(
                f"No wildcard file is called like __{printable(name)}__: put one into {self.folder}, or "
                "write \\__ where underscores are meant."
            )
        entries: list[str] = []
        for one in matching:
            entries += self._entries(one)
            if len(entries) > MAX_ENTRIES:
                many = f"__{printable(name)}__ stands for more than {MAX_ENTRIES:,} entries"
                raise UserError(f"{many}: name fewer files.")
        return entries

    def _entries(self, name: str) -> list[str]:
        if name in self._files:
            return _lines(self._files[name])
        found = self._tables.get(name)
        if isinstance(found, UserError):
            raise found
        if found is None:
            near, shown = nearest(name, self.names()), printable(name)
            hint = f"did you mean __{near}__?" if near else f"put {shown}.txt into {self.folder}."
            raise UserError(
                f"There is no wildcard file for __{shown}__: {hint} Where the underscores are meant, write "
                f"\\__{shown}\\__."
            )
        return found


def _lines(path: Path) -> list[str]:
    lines = [line.strip() for line in _text(path, MAX_BYTES).splitlines()]
    entries = [line for line in lines if line and not line.startswith("#")]
    if not entries:
        raise UserError(f"The wildcard file {path} has no entries: write one into each line.")
    return entries


def _text(path: Path, limit: int) -> str:
    try:
        if path.stat().st_size > limit:
            raise UserError(f"The wildcard file {path} is larger than {limit >> 20} MB: shorten it.")
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"The wildcard file {path} cannot be read ({error.strerror}).") from error
    except UnicodeDecodeError as error:
        raise UserError(f"The wildcard file {path} is not UTF-8 text: save it as UTF-8.") from error


def _table(path: Path) -> Any:
    """What a YAML file holds, or a JSON file, which is YAML, too."""
    text = _text(path, MAX_TABLE_BYTES)
    try:
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, _Loader)):
            raise ValueError("it has aliases, *name, which can stand for any amount of text")
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        place = getattr(error, "problem_mark", None)
        where = f"line {place.line + 1}" if place else str(error)[:100]
        raise UserError(f"The wildcard file {path} cannot be read ({where}): mend it.") from error


def _lists(table: Any, prefix: str, depth: int = 0) -> Iterator[tuple[str, list[str]]]:
    """The lists below names; what is no list of texts is left out."""
    if isinstance(table, dict) and depth < MAX_NESTED:
        for name, below in table.items():
            yield from _lists(below, f"{prefix}/{name}" if prefix else str(name), depth + 1)
    elif isinstance(table, list) and prefix:
        entries = [str(entry).strip() for entry in table if isinstance(entry, (str, int, float))]
        if any(entries):
            yield prefix, list(filter(None, entries))
