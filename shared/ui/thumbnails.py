"""Small copies of finished pictures, so that a page of recent ones does not load the full files."""

from __future__ import annotations

import logging
from pathlib import Path

from PIL import Image

log = logging.getLogger(__name__)

EDGE = 320
SMALL_ENOUGH = 100_000  # bytes


def thumbnail(picture: Path, folder: Path) -> Path:
    """The path of a copy of at most EDGE x EDGE pixels in `folder`; the picture itself when it is small."""
    copy = folder / f"{picture.parent.name}-{picture.name}.webp"
    if copy.exists():
        return copy
    if picture.stat().st_size <= SMALL_ENOUGH:
        return picture
    try:
        with Image.open(picture) as image:
            image.thumbnail((EDGE, EDGE))
            folder.mkdir(parents=True, exist_ok=True)
            image.convert("RGB").save(copy, "WEBP", quality=80)
    except OSError as error:  # a full disk or a damaged picture: the original still shows what can be shown
        log.warning("No thumbnail of %s: %s", picture, error)
        copy.unlink(missing_ok=True)
        return picture
    return copy
