"""Image files that appear complete or not at all, and never in the place of another."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from shared.errors import UserError
from shared.imaging import metadata
from shared.imaging.naming import TEMPLATE

log = logging.getLogger(__name__)

_MAX_JPEG_EXIF = 65_533  # one JPEG segment
QUALITY = 95


@dataclass(frozen=True)
class Rules:
    """What a file is called, what is in it, and how small it is made.

    template: see naming. metadata: whether the settings are written into the file. format, quality: pictures
    of this format get this quality, others QUALITY.
    """

    template: str = TEMPLATE
    metadata: bool = True
    format: str = "png"
    quality: int = QUALITY


DEFAULT_RULES = Rules()


def save_image(
    image: Image.Image,
    folder: Path,
    stem: str,
    fmt: str,
    meta: Mapping[str, Any] | None,
    quality: int = QUALITY,
    claim: Callable[[Path], object] = lambda path: None,
) -> Path:
    """Write `image` with its metadata as `stem` plus extension, or stem_1, stem_2 … where that name is taken.

    `fmt` is one of settings' image formats; meta: None for a file with nothing but the picture; quality: of
    JPEG and WebP. The file is written under a temporary name, flushed to the disk
    and only then named, so nobody ever sees half a picture. claim: is told the name before the file has it,
    once more where another one was quicker. Raises UserError when it cannot be written.
    """
    extension, encode = _ENCODERS[fmt]
    if fmt == "jpeg" and meta is not None and len(metadata.exif(meta)) > _MAX_JPEG_EXIF:
        log.warning("The settings of this picture do not fit into a JPEG file; it is saved as PNG instead")
        extension, encode = _ENCODERS["png"]
    data = encode(image, meta, quality)
    temporary = folder / f".zgp-{secrets.token_hex(8)}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write(temporary, data)
        return move_to_free_name(temporary, folder, stem, extension, claim)
    except OSError as error:
        raise UserError(_reason(error, folder, len(data))) from error
    finally:
        if temporary.exists():
            temporary.unlink()


# ---------------------------------------------------------------- encoding
# Into memory first: Pillow hides the reason (disk full) when it writes to a file itself.


def _png(image: Image.Image, meta: Mapping[str, Any] | None, quality: int) -> bytes:
    return _encoded(image, format="PNG", **({} if meta is None else {"pnginfo": metadata.png_chunks(meta)}))


def _jpeg(image: Image.Image, meta: Mapping[str, Any] | None, quality: int) -> bytes:
    # subsampling=0 is 4:4:4: full colour resolution, or red edges smear
    return _encoded(image.convert("RGB"), format="JPEG", quality=quality, subsampling=0, **_exif(meta))


def _webp(image: Image.Image, meta: Mapping[str, Any] | None, quality: int) -> bytes:
    return _encoded(image, format="WEBP", quality=quality, **_exif(meta))


def _exif(meta: Mapping[str, Any] | None) -> dict[str, Any]:
    return {} if meta is None else {"exif": metadata.exif(meta)}


def _encoded(image: Image.Image, **options: Any) -> bytes:
    buffer = BytesIO()
    image.save(buffer, **options)
    return buffer.getvalue()


_ENCODERS: dict[str, tuple[str, Callable[[Image.Image, Mapping[str, Any] | None, int], bytes]]] = {
    "png": (".png", _png),
    "jpeg": (".jpg", _jpeg),
    "webp": (".webp", _webp),
}


# ---------------------------------------------------------------- files


def _write(path: Path, data: bytes) -> None:
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def move_to_free_name(
    temporary: Path,
    folder: Path,
    stem: str,
    extension: str,
    claim: Callable[[Path], object] = lambda path: None,
) -> Path:
    """Give a finished file of the same disk the first free name: stem, stem_1, stem_2 …"""
    number = 0
    while True:
        target = folder / (f"{stem}_{number}{extension}" if number else f"{stem}{extension}")
        number += 1
        if os.path.lexists(target):
            continue
        claim(target)
        with contextlib.suppress(FileExistsError):  # of two processes, the other one got it
            _move_without_overwriting(temporary, target)
            return target


def _move_without_overwriting(source: Path, target: Path) -> None:
    """Raises FileExistsError where `target` exists; of two processes that try at once, one gets it."""
    if os.name == "nt":
        os.rename(source, target)  # refuses to overwrite on Windows
        return
    try:
        os.link(source, target)
    except FileExistsError:
        raise
    except OSError:  # FAT and some network disks have no hard links: reserve the name, then fill it
        os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        try:
            os.replace(source, target)
        except OSError:
            target.unlink()
            raise


def _reason(error: OSError, folder: Path, size: int) -> str:
    if error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)):
        return f"The disk is full: a picture of {size:,} bytes did not fit into {folder}; free some space"
    return f"The picture could not be written into {folder}: {error.strerror or error}; check the folder"
