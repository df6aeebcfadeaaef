"""Wildcard files: lists to draw from, one entry per line, in the folder wildcards/ and its subfolders.

`__animals/birds__` stands for an entry of wildcards/animals/birds.txt. `#` begins a comment line. An entry
may hold choices and wildcards again.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

from shared.errors import UserError
from shared.wording import nearest

MAX_BYTES = 8 << 20


@dataclass(frozen=True)
class Wildcards:
    """The files of a folder as they were when one was first asked for; the folder need not exist."""

    folder: Path

    @functools.cached_property
    def _files(self) -> dict[str, Path]:
        # Names are looked up here and never made into paths, so none leads out of the folder; nor do links.
        root = self.folder.resolve()
        files = (path for path in self.folder.rglob("*.txt") if path.resolve().is_relative_to(root))
        return {path.relative_to(self.folder).with_suffix("").as_posix(): path for path in sorted(files)}

    def names(self) -> list[str]:
        """What can stand between the underscores."""
        return list(self._files)

    def entries(self, name: str) -> list[str]:
        """The entries of a file. UserError when there is no such file, or it cannot be used."""
        if name not in self._files:
            near = nearest(name, self._files)
            hint = f"did you mean __{near}__?" if near else f"put {name}.txt into {self.folder}."
            raise UserError(f"There is no wildcard file for __{name}__: {hint}")
        path = self._files[name]
        try:
            if path.stat().st_size > MAX_BYTES:
                raise UserError(f"The wildcard file {path} is larger than {MAX_BYTES >> 20} MB: shorten it.")
            lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
        except OSError as error:
            raise UserError(f"The wildcard file {path} cannot be read ({error.strerror}).") from error
        except UnicodeDecodeError as error:
            raise UserError(f"The wildcard file {path} is not UTF-8 text: save it as UTF-8.") from error
        entries = [line for line in lines if line and not line.startswith("#")]
        if not entries:
            raise UserError(f"The wildcard file {path} has no entries: write one into each line.")
        return entries
