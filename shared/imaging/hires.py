"""What a job asks for when it enlarges its picture, read from its settings. Nothing is computed here."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from shared.errors import UserError
from shared.settings.parsing import parse_outpaint, parse_resolution
from shared.weights.files import Folders

LANCZOS = "lanczos"
FOLDERS = ("upscalers", "upscale_models")  # of the folders with models; the second one is ComfyUI's name
MAX_PIXELS = 2**26  # of a result: 8192 x 8192
#: what an upscaler model takes at most, for a tile of 256 pixels: 64 channels at four times the size, in fp32
WORK_BYTES = 1 << 30


@dataclass(frozen=True)
class Hires:
    """The second pass of a job: its picture enlarged, then denoised again.

    strength: 0 to 1, how far. steps: at strength 1. tile: pixels; None for the whole picture.
    """

    scale: float
    upscaler: str
    strength: float
    steps: int
    tile: int | None

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Hires | None:
        """None for a job whose picture is not enlarged."""
        scale = settings.get("hires_scale", 1)
        if scale == 1:
            return None
        return cls(
            scale,
            settings["hires_upscaler"],
            settings["hires_denoising_strength"],
            settings["hires_steps"] or settings["num_inference_steps"],
            settings["hires_tile"] or None,
        )

    def size(self, size: tuple[int, int]) -> tuple[int, int]:
        """What a picture of `size` (width, height) becomes. UserError when that is too large."""
        width, height = (max(1, round(side * self.scale)) for side in size)
        if width * height > MAX_PIXELS:
            most = (MAX_PIXELS / (size[0] * size[1])) ** 0.5
            raise UserError(
                f"hires_scale came as {self.scale:g} for a picture of {size[0]}x{size[1]}, which would "
                f"become {width}x{height}; expected at most {MAX_PIXELS // 10**6} megapixels, so "
                + (f"{int(most * 20) / 20:g} or less." if most >= 1.05 else "leave it as large as it is.")
            )
        return width, height


def begins_as_it_is(settings: Mapping[str, Any]) -> bool:
    """Whether there is nothing to do in the first pass: a picture is enlarged from its own size."""
    return bool(
        Hires.of(settings) and settings.get("image_start") and settings.get("denoising_strength") == 0
    )


def needs_no_model(settings: Mapping[str, Any]) -> bool:
    """Whether a job only enlarges a picture, so that no model has to be loaded for it."""
    hires = Hires.of(settings)
    return (
        hires is not None
        and begins_as_it_is(settings)
        and hires.strength == 0
        and not settings.get("outpaint")
    )


def run_sizes(settings: Mapping[str, Any]) -> tuple[list[tuple[int, int, int]], tuple[int, int]]:
    """(width, height, images at once) of each pass of a job, and the size of the finished picture. About: a
    picture to start from is asked for its size only.
    """
    size, images = parse_resolution(settings["resolution"]), settings.get("batch_size", 1)
    if not (settings.get("image_mask") and settings.get("mask_only")):
        if begins_as_it_is(settings):
            size = _size_of(settings["image_start"]) or size
        left, top, right, bottom = parse_outpaint(settings.get("outpaint", ""), *size)
        size = size[0] + left + right, size[1] + top + bottom
    hires = Hires.of(settings)
    if hires is None:
        return [(*size, images)], size
    last = hires.size(size)
    tile = hires.tile or max(last)
    first = [] if begins_as_it_is(settings) else [(*size, images)]
    second = [(min(last[0], tile), min(last[1], tile), 1)] if hires.strength or not first else []
    return [*first, *second], last


def _size_of(picture: str) -> tuple[int, int] | None:
    """None for what is no picture; the job will say so."""
    try:
        with Image.open(picture) as image:
            return image.size
    except (OSError, Image.DecompressionBombError):
        return None


def upscalers(folders: Folders) -> dict[str, Path]:
    """Name -> file of each upscaler model; none where spandrel is not installed, which reads them."""
    if importlib.util.find_spec("spandrel") is None:
        return {}
    places = [place / name for place in (folders.ckpts, *folders.others) for name in FOLDERS]
    files = [file for place in places for file in sorted(place.glob("*.safetensors")) if file.is_file()]
    return {file.name: file for file in reversed(files)}  # the first of two of one name counts
