"""Files that are made to be downloaded: several pictures as one, a text."""

from __future__ import annotations

import shutil
import time
import zipfile
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from uuid import uuid4

from shared.errors import UserError
from shared.settings.messages import size_text

#: JavaScript: give the user the file of a gr.File
DOWNLOAD = """(file) => {
  if (!file) return;
  const link = document.createElement('a');
  link.href = file.url;
  link.download = file.orig_name || 'queue.zip';
  link.click();
}"""
MOST_BYTES = 2_000_000_000
KEPT_SECONDS = 3600.0


def pack(pictures: Sequence[Path], folder: Path) -> Path:
    """A zip of the files in a new folder below `folder`, where those of more than an hour ago are deleted.

    Files of the same name get numbers. UserError when there is no file, or too much for one zip.
    """
    size = sum(picture.stat().st_size for picture in pictures)
    if not pictures:
        raise UserError("None of these pictures is there any more.")
    if size > MOST_BYTES:
        raise UserError(
            f"These pictures are {size_text(size)}, more than the {size_text(MOST_BYTES)} of one download: "
            "select fewer."
        )
    _tidy(folder)
    path = folder / uuid4().hex / datetime.now().strftime("pictures-%Y-%m-%d-%Hh%Mm%Ss.zip")
    try:
        path.parent.mkdir(parents=True)
        with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:  # pictures are packed already
            taken: set[str] = set()
            for picture in pictures:
                archive.write(picture, _free(picture, taken))
    except OSError as error:
        shutil.rmtree(path.parent, ignore_errors=True)
        raise UserError(
            f"The zip cannot be written ({error.strerror or error}): check the free space."
        ) from error
    return path


def keep(text: str, name: str, folder: Path) -> Path:
    """A text as a file of that name to download; `folder` as for `pack`."""
    _tidy(folder)
    path = folder / uuid4().hex / name
    try:
        path.parent.mkdir(parents=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{name} cannot be written ({error.strerror}): check the free space.") from error
    return path


def _free(picture: Path, taken: set[str]) -> str:
    """The file's name, or the next free one; case tells no names apart, as on Windows."""
    name, number = picture.name, 1
    while name.lower() in taken:
        number += 1
        name = f"{picture.stem}-{number}{picture.suffix}"
    taken.add(name.lower())
    return name


def _tidy(folder: Path) -> None:
    for old in folder.glob("*"):
        if old.stat().st_mtime < time.time() - KEPT_SECONDS:
            shutil.rmtree(old, ignore_errors=True)
