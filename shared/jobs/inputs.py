"""Pictures that jobs start from: copied once, so that a job outlives the file that it was given."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from shared.errors import UserError
from shared.files import atomic
from shared.imaging.sources import Picture, load_picture
from shared.settings.messages import printable
from shared.settings.table import SETTINGS, SettingsError

COPY = re.compile(r"[0-9a-f]{64}\.png")
PICTURES = tuple(name for name, setting in SETTINGS.items() if setting.picture)


def keep_pictures(
    settings: Mapping[str, Any], folder: Path, within: Sequence[Path] | None = None
) -> tuple[dict[str, Any], list[str]]:
    """`settings` with copies in `folder` in the place of the pictures that they name; notes about them.

    within: the only folders that pictures are read from (None: anywhere), for settings that come over the
    network. SettingsError when a picture cannot be used.
    """
    kept, notes, problems = dict(settings), list[str](), list[str]()
    for name in PICTURES:
        if not settings.get(name):
            continue
        try:
            picture = _path(settings[name])
            if within is not None and not known_copy(picture, folder):
                _check_place(picture, within)
            path, said = keep_picture(picture, folder)
        except UserError as error:
            problems.append(f"{name}: {error}")
            continue
        kept[name] = str(path)
        notes += said
    if problems:
        raise SettingsError(problems)
    return kept, notes


def _path(text: str) -> Path:
    """UserError for a text that no path can be."""
    if "\0" in text:
        raise UserError(f"'{printable(text)}' cannot be a path: it has a zero character, name one without.")
    return Path(text)


def _check_place(picture: Path, within: Sequence[Path]) -> None:
    """UserError for a file outside of these folders, whether it exists or not."""
    if not any(picture.resolve().is_relative_to(folder.resolve()) for folder in within):
        raise UserError(
            f"'{printable(str(picture))}' is not among the pictures made or uploaded here, and no others "
            "are read for a page or a program: upload it first."
        )


def without_folders(settings: Mapping[str, Any]) -> dict[str, Any]:
    """`settings` as images carry them: the copies by their names alone, since folders tell of their owner.
    `keep_pictures` knows them again.
    """
    return {name: Path(x).name if name in PICTURES and x else x for name, x in settings.items()}


def known_copy(path: str | Path, folder: Path) -> Path | None:
    """The copy in `folder` that a path stands for by its name; None when it stands for none."""
    copy = folder.absolute() / Path(path).name
    return copy if COPY.fullmatch(copy.name) and copy.is_file() else None


def check_pictures(settings: Mapping[str, Any], folder: Path) -> list[str]:
    """What keeps the pictures of these settings from being used, one sentence each; nothing is kept."""
    problems = []
    for name in PICTURES:
        if settings.get(name) and not known_copy(settings[name], folder):
            try:
                load_picture(Path(settings[name]))
            except UserError as error:
                problems.append(f"{name}: {error}")
    return problems


def keep_picture(picture: Picture, folder: Path) -> tuple[Path, list[str]]:
    """The copy of a picture, folder/<sha256 of the copy>.png, upright and in 8-bit sRGB with its
    transparency; and what was corrected. The name of such a copy stands for it.
    """
    known = known_copy(picture, folder) if isinstance(picture, str | Path) else None
    if known:
        return known, []
    source = load_picture(picture)
    data, notes = _copy_from_elsewhere(picture), list[str]()
    if data is None:
        image, notes = source.image, source.notes
        if source.alpha is not None:
            image = image.convert("RGBA")
            image.putalpha(source.alpha)
        data = _png(image)
    copy = folder.absolute() / f"{hashlib.sha256(data).hexdigest()}.png"
    if not copy.is_file():
        atomic.write(copy, data)
    return copy, notes


def _copy_from_elsewhere(picture: Picture) -> bytes | None:
    """The bytes of a copy that another ZGP made, as a saved queue has them: named by its content."""
    if not isinstance(picture, str | Path) or not COPY.fullmatch(Path(picture).name):
        return None
    data = Path(picture).read_bytes()
    return data if hashlib.sha256(data).hexdigest() == Path(picture).stem else None


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)  # a large photograph: a second less than the default
    return file.getvalue()
