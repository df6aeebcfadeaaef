"""Small copies of pictures: of finished ones, so that a page of recent ones does not load the full files, and
of those beside LoRA files, whose folder the page does not serve.
"""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

from PIL import Image

log = logging.getLogger(__name__)

EDGE = 320
PREVIEW_EDGE = 112  # twice the size at which a list shows it
SMALL_ENOUGH = 100_000  # bytes
_UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)  # what Pillow raises


def thumbnail(picture: Path, folder: Path) -> Path:
    """The path of a copy of at most EDGE x EDGE pixels in `folder`; the picture itself when it is small."""
    made = ready_thumbnail(picture, folder)
    if made is not None:
        return made
    copy = _copy(picture, folder)
    try:
        _shrink(picture, EDGE, copy)
    except _UNREADABLE as error:  # or a full disk: the original still shows what can be shown
        log.warning("No thumbnail of %s: %s", picture, error)
        copy.unlink(missing_ok=True)
        return picture
    return copy


def ready_thumbnail(picture: Path, folder: Path) -> Path | None:
    """As `thumbnail` where that takes no time; None when the copy is still to be made."""
    copy = _copy(picture, folder)
    if copy.exists():
        return copy
    return picture if picture.stat().st_size <= SMALL_ENOUGH else None


def forget_thumbnail(picture: Path, folder: Path) -> None:
    """Delete the copy of a picture that is about to be deleted itself."""
    if picture.exists():
        _copy(picture, folder).unlink(missing_ok=True)


def _copy(picture: Path, folder: Path) -> Path:
    """The place of its copy, which stays the same when the picture is moved."""
    status = picture.stat()
    seen = f"{picture.name} {status.st_size} {status.st_mtime_ns}"
    return folder / f"{hashlib.sha256(seen.encode(errors='surrogateescape')).hexdigest()[:24]}.webp"


def preview_copy(preview: Path, folder: Path) -> Path | None:
    """The path of a small copy in `folder` of a picture that anyone made; None when it is damaged."""
    try:
        status = preview.stat()
        seen = f"{preview.absolute()} {status.st_size} {status.st_mtime_ns}"
        copy = folder / f"{hashlib.sha256(seen.encode(errors='surrogateescape')).hexdigest()[:24]}.webp"
        if not copy.exists():
            _shrink(preview, PREVIEW_EDGE, copy)
    except _UNREADABLE as error:
        log.warning("No small copy of %s: %s", preview, error)
        return None
    return copy


def _shrink(picture: Path, edge: int, copy: Path) -> None:
    with Image.open(picture) as image:
        image.thumbnail((edge, edge))
        copy.parent.mkdir(parents=True, exist_ok=True)
        image.convert("RGB").save(copy, "WEBP", quality=80)
