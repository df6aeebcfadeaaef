"""Masks for repainting: where they come from, how they are reshaped, and how the new picture joins the old.

A mask is a Pillow image of mode L, as large as its picture: white (255) is repainted, black (0) is kept.
`from_upload`, `from_layer` and `from_alpha` give pure black and white; only `feather` makes gray.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from PIL import Image

from shared.errors import UserError
from shared.imaging.sources import LANCZOS, NEAREST, REFUSED_PIXELS, Edges, Picture, load_picture

WHITE_FROM = 128  # the models' own mask has no gray either: white from half brightness on
_GRAY = (32, 224)  # values in between are neither black nor white, even after JPEG
MAX_BLUR = 48.0  # pixels (sigma): more costs time and shows nothing new
_GRAY_TOLERANCE = 0.01  # soft edges of strokes are no reason for a note


# ---------------------------------------------------------------- where masks come from


def from_upload(picture: Picture, size: tuple[int, int]) -> tuple[Image.Image, list[str]]:
    """The mask in a picture file, for a picture of `size` (width, height); and notes.

    White is repainted. In a mask with transparent parts, whatever is drawn is repainted, in any colour.
    """
    source = load_picture(picture)
    notes = list(source.notes)
    if source.alpha is not None:
        notes = ["The mask has transparent parts: what is drawn is repainted, what is transparent is kept"]
        gray = source.alpha
    else:
        gray = source.image.convert("L")
    values = np.asarray(gray)
    share = float(((values >= _GRAY[0]) & (values < _GRAY[1])).mean())
    if share > _GRAY_TOLERANCE:
        notes.append(f"{share:.0%} of the mask is gray; the lighter half of it counts as white")
    mask, size_notes = of_size(_binary(values >= WHITE_FROM), size)
    return mask, notes + size_notes


def from_layer(drawing: Image.Image) -> Image.Image:
    """The mask of an editor's drawing (RGBA, as large as its picture): every stroke, in any colour."""
    if "A" not in drawing.getbands():
        raise UserError(f"The drawn mask came in mode {drawing.mode}; expected RGBA with transparent rest")
    return _binary(np.asarray(drawing.getchannel("A")) >= WHITE_FROM)


def from_alpha(alpha: Image.Image) -> Image.Image:
    """The mask of a picture's own holes: what is transparent in `alpha` (`Source.alpha`) is repainted."""
    return _binary(np.asarray(alpha) < WHITE_FROM)


def of_size(mask: Image.Image, size: tuple[int, int]) -> tuple[Image.Image, list[str]]:
    """`mask` at its picture's `size`; resized and said if of the same shape, else refused."""
    if mask.size == size:
        return mask, []
    (width, height), (wide, high) = mask.size, size
    if abs(width * high - wide * height) > max(width, wide, height, high):  # off by more than one pixel
        raise UserError(
            f"The mask is {width}x{height}, its picture {wide}x{high}; a mask needs the "
            "size or at least the shape of its picture, so draw it on the picture itself"
        )
    return resize(mask, size), [f"The mask was resized from {width}x{height} to {wide}x{high}"]


def checked(mask: Image.Image) -> list[str]:
    """Notes about a mask that is to be used; UserError when nothing in it is white."""
    share = coverage(mask)
    if not share:
        raise UserError("The mask is all black: nothing would be repainted; paint over what is to change")
    return ["The mask is all white: the whole picture is repainted"] if share == 1 else []


def coverage(mask: Image.Image) -> float:
    """The share of `mask` that is repainted, 0 to 1."""
    return float(_painted(mask).mean())


# ---------------------------------------------------------------- reshaping


def resize(mask: Image.Image, size: tuple[int, int]) -> Image.Image:
    """`mask` at `size` (width, height), each pixel the nearest one of the old mask: no new values."""
    return mask.resize(size, NEAREST)


def invert(mask: Image.Image) -> Image.Image:
    """Black for white."""
    return Image.fromarray(255 - np.asarray(mask))


def grow(mask: Image.Image, pixels: int) -> Image.Image:
    """`mask` with everything within a circle of `pixels` around its white parts; negative `pixels` shrink it.

    Beyond the picture's border nothing counts as black: a mask that touches the border shrinks only inside.
    """
    painted = _painted(mask)
    if pixels < 0:
        return _binary(~_within(~painted, -pixels))
    return _binary(_within(painted, pixels))


def feather(mask: Image.Image, sigma: float) -> Image.Image:
    """`mask` blurred by a Gaussian of `sigma` pixels, on both sides of its edge."""
    if sigma <= 0:
        return mask
    return Image.fromarray(cv2.GaussianBlur(np.asarray(mask), (0, 0), sigma, borderType=cv2.BORDER_REPLICATE))


def _painted(mask: Image.Image) -> np.ndarray:
    """[H, W] bool."""
    return np.asarray(mask.convert("L")) >= WHITE_FROM


def _binary(painted: np.ndarray) -> Image.Image:
    return Image.fromarray(np.where(painted, 255, 0).astype(np.uint8))


def _within(painted: np.ndarray, pixels: int) -> np.ndarray:
    """Where the nearest painted pixel is at most `pixels` away (Euclid, centre to centre)."""
    if not painted.any():
        return painted
    return _distance(~painted) <= pixels + 1e-3  # the distances are float32


def _distance(inside: np.ndarray) -> np.ndarray:
    """[H, W] float32: each pixel's distance to the nearest one that is not `inside`; 0 there."""
    return cv2.distanceTransform(inside.astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)


# ---------------------------------------------------------------- joining the new picture with the old


def composite(
    original: Image.Image, generated: Image.Image, mask: Image.Image, feather: float = 0
) -> Image.Image:
    """`generated` where `mask` is white, `original` where it is black: there every pixel stays what it was.

    All three are of one size. `feather`: the new picture fades in over so many pixels, inwards from the
    mask's edge; strokes too thin for that fade in faster and reach full strength in their middle.
    """
    if not original.size == generated.size == mask.size:
        sizes = ", ".join("{}x{}".format(*image.size) for image in (original, generated, mask))
        raise UserError(f"The picture, the new picture and the mask are {sizes}; expected one size for all")
    weights = mask.convert("L")
    if feather > 1:
        values = np.asarray(weights)
        weights = Image.fromarray(np.rint(values * _fade(values > 0, feather)).astype(np.uint8))
    return Image.composite(generated.convert("RGB"), original.convert("RGB"), weights)


def _fade(painted: np.ndarray, pixels: float) -> np.ndarray:
    """[H, W] float32: 0 outside, 1 from `pixels` inside the edge on, and in the middle of every island."""
    distance = _distance(painted)
    count, islands = cv2.connectedComponents(painted.astype(np.uint8))
    innermost = np.zeros(count, np.float32)
    np.maximum.at(innermost, np.asarray(islands, np.int32), distance)
    way = np.clip(distance / np.clip(innermost[islands], 1, pixels), 0, 1)
    return way * way * (3 - 2 * way)


# ---------------------------------------------------------------- only the masked part


@dataclass(frozen=True)
class Box:
    """A part of a picture (right and bottom lie outside) and the size it is painted at, all in pixels."""

    left: int
    top: int
    right: int
    bottom: int
    width: int
    height: int

    @property
    def edges(self) -> Edges:
        return self.left, self.top, self.right, self.bottom

    def cut(self, image: Image.Image, resample: Image.Resampling = LANCZOS) -> Image.Image:
        """This part of `image` at the size it is painted at; masks: `resample=NEAREST`."""
        part = image.crop(self.edges)
        size = self.width, self.height
        return part if part.size == size else part.resize(size, resample)

    def put_back(
        self, original: Image.Image, generated: Image.Image, mask: Image.Image, feather: float = 0
    ) -> Image.Image:
        """The whole picture with the painted part in its place; what is black in the whole's `mask` stays."""
        size = self.right - self.left, self.bottom - self.top
        whole = original.copy()
        whole.paste(generated if generated.size == size else generated.resize(size, LANCZOS), self.edges[:2])
        return composite(original, whole, mask, feather)


def crop_around(
    mask: Image.Image, context_margin: int, multiple: int = 16, min_size: int = 512, max_size: int = 1536
) -> Box:
    """The part of the picture to paint alone: all that is white, `context_margin` pixels of context.

    Each side is at least `min_size` long where the picture is, and painted pixel for pixel in multiples of
    `multiple`. A part with a side beyond `max_size` is painted smaller, one that the picture's border keeps
    from being a multiple is painted at the next one up. Raises UserError for a mask without white.
    """
    checked(mask)
    painted = _painted(mask)
    across = _span(np.flatnonzero(painted.any(axis=0)), mask.width, context_margin, multiple, min_size)
    down = _span(np.flatnonzero(painted.any(axis=1)), mask.height, context_margin, multiple, min_size)
    size = across[1] - across[0], down[1] - down[0]
    scale = min(1.0, max_size / max(size))
    width, height = (max(multiple, _up(round(side * scale), multiple)) for side in size)
    limit = max(multiple, max_size // multiple * multiple)
    return Box(across[0], down[0], across[1], down[1], min(width, limit), min(height, limit))


def _span(places: np.ndarray, side: int, margin: int, multiple: int, shortest: int) -> tuple[int, int]:
    """Start and end along one axis of `side` pixels: the painted `places` with their margin."""
    start, end = max(0, int(places[0]) - margin), min(side, int(places[-1]) + 1 + margin)
    length = min(_up(max(end - start, shortest), multiple), side)
    start = min(max(0, (start + end - length) // 2), side - length)
    return start, start + length


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


# ---------------------------------------------------------------- beyond the border


@dataclass(frozen=True)
class Extended:
    """A larger picture: `mask` is white where it is new, `box` is where the original lies, unchanged."""

    image: Image.Image
    mask: Image.Image
    box: Edges
    notes: list[str]


def extend(image: Image.Image, left: int, top: int, right: int, bottom: int, multiple: int = 16) -> Extended:
    """`image` (RGB) with so many pixels added on each side, and the mask of the new part.

    The new part repeats the picture's edge, blurred: colours the model can go on from. Width and height are
    rounded up to multiples of `multiple`, with a note. Raises UserError for amounts that make no sense.
    """
    amounts = left, top, right, bottom
    if min(amounts) < 0 or not any(amounts):
        raise UserError(f"A picture was to be extended by {amounts} pixels; expected one above 0, none below")
    left, right = _rounded_up(image.width, left, right, multiple)
    top, bottom = _rounded_up(image.height, top, bottom, multiple)
    width, height = left + image.width + right, top + image.height + bottom
    if width * height > REFUSED_PIXELS:
        raise UserError(f"The extended picture would be {width}x{height}; extend it by less")
    notes = []
    if (left, top, right, bottom) != amounts:
        notes.append(
            f"It is extended by {left}, {top}, {right} and {bottom} pixels (left, top, right, bottom) "
            f"instead of {', '.join(map(str, amounts))}, so that {width}x{height} are multiples of {multiple}"
        )
    original = np.asarray(image.convert("RGB"))
    canvas = cv2.copyMakeBorder(original, top, bottom, left, right, cv2.BORDER_REPLICATE)
    canvas = cv2.GaussianBlur(canvas, (0, 0), min(MAX_BLUR, max(left, top, right, bottom) / 8))
    inside = slice(top, top + image.height), slice(left, left + image.width)
    canvas[inside] = original
    new = np.ones((height, width), bool)
    new[inside] = False
    box = left, top, left + image.width, top + image.height
    return Extended(Image.fromarray(canvas), _binary(new), box, notes)


def _rounded_up(length: int, before: int, after: int, multiple: int) -> tuple[int, int]:
    """Both amounts along one axis; what the multiple needs more goes to the larger one."""
    extra = -(length + before + after) % multiple
    return (before + extra, after) if before > after else (before, after + extra)
