"""Any picture a user hands in, as upright 8-bit sRGB: every correction is said, what cannot be is refused.

`load_picture` reads files, bytes and Pillow images; `fit` brings them to the size that is painted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageOps

from shared.errors import UserError
from shared.settings.messages import printable

FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "GIF", "BMP", "TIFF")  # EPS and its like would run programs
MAX_PIXELS = 2**25  # 33.5 megapixels, 8192 x 4096: larger pictures are scaled down
REFUSED_PIXELS = 80_000_000  # larger ones are not even decoded: they take gigabytes, or are made to
LANCZOS, NEAREST = Image.Resampling.LANCZOS, Image.Resampling.NEAREST

Picture = str | Path | bytes | Image.Image
Edges = tuple[int, int, int, int]  # left, top, right, bottom in pixels; right and bottom lie outside
_ORIENTATION = 0x0112
_SQUARE_TOLERANCE = 0.02  # a cut or a distortion below 2 % is not worth a note


@dataclass(frozen=True)
class Source:
    """A picture ready for use.

    `image` is RGB, with transparent parts laid on white. `alpha` (mode L, the same size, 255 = opaque) is
    None where the picture has no transparent part. `notes` are sentences for the user.
    """

    image: Image.Image
    alpha: Image.Image | None
    notes: list[str]


def load_picture(picture: Picture) -> Source:
    """`picture` upright, in 8-bit sRGB, at most MAX_PIXELS large; the first frame of an animation.

    Raises UserError for what is no picture, is damaged, or has more than REFUSED_PIXELS.
    """
    name = printable(Path(picture).name, 100) if isinstance(picture, (str, Path)) else "The picture"
    try:
        if isinstance(picture, Image.Image):  # may still be undecoded
            return _converted(picture, name)
        Image.init()
        formats = [fmt for fmt in FORMATS if fmt in Image.OPEN]  # Pillow can be built without some
        file = BytesIO(picture) if isinstance(picture, bytes) else picture
        with Image.open(file, formats=formats) as image:
            return _converted(image, name)
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{name} does not exist; choose another picture") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise UserError(_too_large(name)) from None
    except Exception as error:  # Pillow raises anything on damaged files: SyntaxError, struct.error …
        raise UserError(
            f"{name} cannot be read; expected an intact {', '.join(FORMATS[:-1])} or {FORMATS[-1]} picture, "
            "choose another one"
        ) from error


def _converted(image: Image.Image, name: str) -> Source:
    if image.width * image.height > REFUSED_PIXELS:
        raise UserError(_too_large(f"{name} ({image.width}x{image.height})"))
    if not image.width or not image.height:
        raise UserError(f"{name} has no pixels; choose another picture")
    notes: list[str] = []
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":  # MPO: a JPEG photo followed by its own small copies
        notes.append(f"{name} holds {frames} frames; the first one is used")
        image.seek(0)
    image.load()  # first of all: decoding errors would be lost among those of the EXIF block
    upright, turned_notes = _upright(image)
    eight_bit, depth_notes = _eight_bit(upright)
    opaque, alpha, alpha_notes = _alpha_apart(eight_bit)
    coloured, colour_notes = _to_srgb(opaque, image.info.get("icc_profile"))
    if alpha is not None:  # white is laid below only now: the profile describes the picture's own colours
        white = Image.new("RGB", coloured.size, "white")
        coloured = Image.composite(coloured, white, alpha)
    notes += turned_notes + depth_notes + colour_notes + alpha_notes
    return _within_limit(Source(coloured, alpha, notes))


def _too_large(what: str) -> str:
    return f"{what} has more than {REFUSED_PIXELS // 10**6} megapixels; scale it down and try again"


# ---------------------------------------------------------------- one correction each: (picture, notes)


def _upright(image: Image.Image) -> tuple[Image.Image, list[str]]:
    """Turned as the camera noted it. (TIFF arrives upright: there Pillow itself turns while decoding.)"""
    try:
        turned = image.getexif().get(_ORIENTATION, 1) in range(2, 9)
        upright = ImageOps.exif_transpose(image)
    except Exception:  # Pillow raises anything on damaged EXIF blocks; the pixels are decoded and good
        return image, ["Its EXIF block is damaged; the picture is used as it lies in the file"]
    return upright, ["It was turned upright as its EXIF block says"] if turned else []


def _eight_bit(image: Image.Image) -> tuple[Image.Image, list[str]]:
    """Gray of 16 or 32 bits scaled to 8; everything else as it is. Pillow's own conversion clips at 255."""
    if not image.mode.startswith(("I", "F")):
        return image, []
    values = np.asarray(image).astype(np.float64)
    if not np.isfinite(values).all():
        raise UserError("The picture holds values that are no numbers; save it with 8 or 16 bits per channel")
    white = 1.0 if image.mode == "F" else 65535.0
    low, high = float(values.min()), float(values.max())
    if image.mode.startswith("I;16") or (low >= 0 and high <= white):
        scaled = values * (255 / white)
        said = f"Its {'16-bit' if white > 1 else 'floating-point'} values were scaled to 8 bits"
    else:
        scaled = (values - low) * (255 / (high - low)) if high > low else values * 0
        said = f"Its values {low:g} to {high:g} were stretched to black to white"
    gray = Image.fromarray(np.rint(scaled).astype(np.uint8))
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):  # one gray value stands for "nothing here"
        gray.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return gray, [said]


def _alpha_apart(image: Image.Image) -> tuple[Image.Image, Image.Image | None, list[str]]:
    """The picture without transparency in a mode that its colour profile may describe, and its alpha."""
    if not image.has_transparency_data:
        plain = {"P": "RGB", "PA": "RGB", "1": "L"}.get(image.mode, image.mode)
        return image.convert(plain), None, []
    key = image.info.get("transparency")
    if isinstance(key, tuple) and max(key) > 255:  # of 16 bits, while the pixels were read as 8
        image.info["transparency"] = tuple(part >> 8 for part in key)
    gray = image.mode in ("1", "L", "LA", "La")
    coloured = image.convert("RGBA")
    alpha = coloured.getchannel("A")
    opaque = coloured.convert("RGB").convert("L" if gray else "RGB")
    lowest, highest = alpha.getextrema()
    if lowest == 255:
        return opaque, None, []
    if highest == 0:
        return opaque, alpha, ["The picture is wholly transparent; on white, nothing of it is seen"]
    return opaque, alpha, ["Its transparent parts were laid on white"]


def _to_srgb(image: Image.Image, profile: bytes | None) -> tuple[Image.Image, list[str]]:
    if not profile:
        said = "It is CMYK without a colour profile; its colours are approximate"
        return image.convert("RGB"), [said] if image.mode == "CMYK" else []
    try:
        own = ImageCms.ImageCmsProfile(BytesIO(profile))
        described = ImageCms.getProfileDescription(own).strip()
        if image.mode == "RGB" and described.startswith("sRGB"):
            return image, []
        srgb = ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(image, own, srgb, outputMode="RGB")
    except (ImageCms.PyCMSError, OSError):  # damaged, or made for another kind of picture
        return image.convert("RGB"), ["Its colour profile cannot be used; its colours were taken as sRGB"]
    assert converted is not None  # only an in-place conversion returns None
    return converted, [f"Its colours were converted from {described or 'its own profile'} to sRGB"]


def _within_limit(source: Source) -> Source:
    width, height = source.image.size
    if width * height <= MAX_PIXELS:
        return source
    scale = (MAX_PIXELS / (width * height)) ** 0.5
    size = max(1, int(width * scale)), max(1, int(height * scale))
    note = f"It was scaled down from {width}x{height} to {size[0]}x{size[1]}, the largest size worked on"
    alpha = source.alpha and source.alpha.resize(size, LANCZOS)
    return Source(source.image.resize(size, LANCZOS), alpha, [*source.notes, note])


# ---------------------------------------------------------------- sizes


@dataclass(frozen=True)
class Fitted:
    """A picture of the size asked for; `box` is where the source lies in it, `notes` say what was done."""

    image: Image.Image
    box: Edges
    notes: list[str]


def fit(
    image: Image.Image,
    width: int,
    height: int,
    how: str = "cover",
    *,
    resample: Image.Resampling = LANCZOS,
    fill: str | int | tuple[int, ...] = 0,
) -> Fitted:
    """`image` (any 8-bit mode) at exactly `width` x `height` pixels.

    `how`: "cover" cuts what does not fit, evenly from both sides; "contain" shows all of it between bars of
    `fill`; "stretch" distorts. Masks go the same way with `resample=NEAREST`.
    """
    if how not in _WAYS:
        raise UserError(f"A picture is fitted by {', '.join(_WAYS)}, not by {how!r}")
    if width < 1 or height < 1:
        raise UserError(f"The size asked for is {width}x{height}; expected at least 1x1")
    return _WAYS[how](image, (width, height), resample, fill)


def _cover(image: Image.Image, size: tuple[int, int], resample: Image.Resampling, fill: object) -> Fitted:
    scale = max(size[0] / image.width, size[1] / image.height)
    kept = min(image.width, size[0] / scale), min(image.height, size[1] / scale)
    left, top = (image.width - kept[0]) / 2, (image.height - kept[1]) / 2
    fitted = image.resize(size, resample, box=(left, top, left + kept[0], top + kept[1]))
    lost = 1 - kept[0] * kept[1] / (image.width * image.height)
    notes = [f"{lost:.0%} of the picture was cut off to fit {size[0]}x{size[1]}"]
    notes = (notes if lost >= _SQUARE_TOLERANCE else []) + _enlarged(scale)
    return Fitted(fitted, (0, 0, *size), notes)


def _contain(image: Image.Image, size: tuple[int, int], resample: Image.Resampling, fill: object) -> Fitted:
    scale = min(size[0] / image.width, size[1] / image.height)
    inner = _rounded(image.width * scale, size[0]), _rounded(image.height * scale, size[1])
    left, top = (size[0] - inner[0]) // 2, (size[1] - inner[1]) // 2
    canvas = Image.new(image.mode, size, fill)  # type: ignore[arg-type]
    canvas.paste(image.resize(inner, resample), (left, top))
    bars = [f"Bars were added to fit {size[0]}x{size[1]}"] if inner != size else []
    return Fitted(canvas, (left, top, left + inner[0], top + inner[1]), bars + _enlarged(scale))


def _stretch(image: Image.Image, size: tuple[int, int], resample: Image.Resampling, fill: object) -> Fitted:
    across, down = size[0] / image.width, size[1] / image.height
    distorted = max(across / down, down / across) - 1
    notes = [f"The picture was distorted by {distorted:.0%} to fit {size[0]}x{size[1]}"]
    notes = (notes if distorted >= _SQUARE_TOLERANCE else []) + _enlarged(max(across, down))
    return Fitted(image.resize(size, resample), (0, 0, *size), notes)


_WAYS: dict[str, Callable[..., Fitted]] = {"cover": _cover, "contain": _contain, "stretch": _stretch}


def _rounded(side: float, limit: int) -> int:
    return max(1, min(limit, round(side)))


def _enlarged(scale: float) -> list[str]:
    return [f"It was enlarged {scale:.1f} times, so it is soft"] if scale >= 1.5 else []


def fit_source(source: Source, width: int, height: int, how: str = "cover") -> Source:
    """`source` with its alpha at `width` x `height`; bars of "contain" are white and transparent."""
    fitted = fit(source.image, width, height, how, fill="white")
    alpha = source.alpha
    if alpha is None and fitted.box != (0, 0, width, height):
        alpha = Image.new("L", source.image.size, 255)
    alpha = alpha and fit(alpha, width, height, how).image
    return replace(source, image=fitted.image, alpha=alpha, notes=source.notes + fitted.notes)
