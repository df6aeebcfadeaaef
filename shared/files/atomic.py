"""A file is written whole or not at all: readers, other writers and a crash never meet half of one."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: Path, *, durable: bool = False, part: Path | None = None) -> Iterator[Path]:
    """A new name beside `path` to write to. The file there takes the place of `path` when the block ends
    well, else it is deleted. Makes the folder. OSError as it comes.

    durable: on the disk before it gets its name, for what would be missed after a power cut. part: the name
    to write to, where what a killed process leaves should be found and overwritten by the next one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = part or path.with_name(f".{secrets.token_hex(8)}.part")
    try:
        yield part
        if durable:
            flush(part)
        os.replace(part, path)
    finally:
        with contextlib.suppress(OSError):  # it has its name, or was never made
            part.unlink()


def write(path: Path, data: str | bytes, *, durable: bool = False) -> None:
    """Replace the file by `data`; text as UTF-8."""
    with replacing(path, durable=durable) as part:
        part.write_bytes(data.encode() if isinstance(data, str) else data)


def flush(path: Path) -> None:
    """Have the system write what it holds of the file to the disk."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())
