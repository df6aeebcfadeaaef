"""Enlarging pictures: by Lanczos, or by an upscaler model that the package spandrel can read.

`Hires` is what a job's settings say of it. torch and spandrel are imported where a model is used, so that the
page can ask for everything else.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from shared.errors import Cancelled, UserError
from shared.imaging import sources
from shared.settings import parse_outpaint, parse_resolution
from shared.weights.files import Folders, check_safetensors

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

LANCZOS = "lanczos"
FOLDERS = ("upscalers", "upscale_models")  # of the folders with models; the second one is ComfyUI's name
MAX_PIXELS = 2**26  # of a result: 8192 x 8192
MAX_ON_THE_WAY = 2**27  # of what an upscaler model makes before it is brought to the size asked for
TILE, OVERLAP = 256, 32  # pixels of the picture that an upscaler model sees at once
WORK_BYTES = 1 << 30  # what it takes for such a tile at most: 64 channels at four times the size, in fp32
MAX_PASSES = 3  # of a model that enlarges by less than what was asked for

Interrupt = Callable[[], bool]
#: (picture, size, whether to stop) -> the picture at that size. Raises Cancelled.
Enlarge = Callable[[Image.Image, tuple[int, int], Interrupt], Image.Image]


# ---- what a job asks for -----------------------------------------------------------------------------------


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


@dataclass(frozen=True)
class Enlarged:
    """What `Enlarger` made, in the form of what models make."""

    images: list[Image.Image]
    notes: list[str]
    extra: dict[str, Any] = field(default_factory=dict)


class Enlarger:
    """Stands where a model's processor does, in jobs of which `needs_no_model` is true."""

    def __init__(self, folders: Folders):
        self._folders = folders

    def generate(
        self,
        settings: Mapping[str, Any],
        *,
        seeds: Sequence[int],
        on_phase: Callable[[str], None],
        on_step: Callable[..., None],
        interrupt: Interrupt,
    ) -> Enlarged:
        """The picture as often as there are seeds. UserError, Cancelled as in `upscaler`."""
        hires = Hires.of(settings)
        assert hires is not None
        source = sources.load_picture(settings["image_start"])
        size = hires.size(source.image.size)
        on_phase("Enlarging")
        image = upscaler(hires.upscaler, self._folders)(source.image, size, interrupt)
        return Enlarged([image] * len(seeds), source.notes)


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


# ---- by what -----------------------------------------------------------------------------------------------


def upscalers(folders: Folders) -> dict[str, Path]:
    """Name -> file of each upscaler model; none where spandrel is not installed, which reads them."""
    if importlib.util.find_spec("spandrel") is None:
        return {}
    places = [place / name for place in (folders.ckpts, *folders.others) for name in FOLDERS]
    files = [file for place in places for file in sorted(place.glob("*.safetensors")) if file.is_file()]
    return {file.name: file for file in reversed(files)}  # the first of two of one name counts


def upscaler(name: str, folders: Folders, device: torch.device | str | None = None) -> Enlarge:
    """How `name` (LANCZOS, or one of `upscalers`) enlarges. UserError when it is not there or not usable.

    device: of a model; by default the graphics card if there is one.
    """
    if name == LANCZOS:
        return _lanczos
    known = upscalers(folders)
    if name not in known:
        raise UserError(
            f"hires_upscaler came as '{name}'; expected {', '.join((LANCZOS, *known))}. Models "
            f"(.safetensors) belong into {folders.ckpts / FOLDERS[0]}, and the package spandrel reads them: "
            "pip install spandrel"
        )
    return _Model(known[name], device)


def _lanczos(image: Image.Image, size: tuple[int, int], interrupt: Interrupt) -> Image.Image:
    return image if image.size == size else image.resize(size, sources.LANCZOS)


class _Model:
    """An upscaler model's file, loaded."""

    def __init__(self, path: Path, device: torch.device | str | None):
        import spandrel
        import torch

        check_safetensors(path)
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        try:
            found = spandrel.ModelLoader(place).load_from_file(path)
        except Exception as error:  # spandrel raises anything for files that are no models
            log.warning("%s cannot be used as an upscaler", path, exc_info=error)
            raise UserError(
                f"{path.name} is no upscaler model that spandrel knows; choose another one."
            ) from error
        plain = isinstance(found, spandrel.ImageModelDescriptor)
        if not plain or (found.input_channels, found.output_channels) != (3, 3):
            raise UserError(f"{path.name} is no model that enlarges colour pictures; choose another one.")
        half = place.type == "cuda" and found.supports_half
        self._name, self._found, self._device = path.name, found.eval(), place
        self._dtype = torch.float16 if half else torch.float32
        found.to(self._dtype)
        self._tiled = found.tiling == spandrel.ModelTiling.SUPPORTED

    def __call__(self, image: Image.Image, size: tuple[int, int], interrupt: Interrupt) -> Image.Image:
        """As often through the model as it takes to be large enough, then to `size` by Lanczos."""
        for _ in range(MAX_PASSES):
            image = self._once(image, interrupt)
            if self._found.scale == 1 or (image.width >= size[0] and image.height >= size[1]):
                break
        return _lanczos(image, size, interrupt)

    def _once(self, image: Image.Image, interrupt: Interrupt) -> Image.Image:
        import torch

        from shared.imaging.tiling import by_tiles, tiles

        scale = self._found.scale
        if image.width * image.height * scale**2 > MAX_ON_THE_WAY:
            raise UserError(
                f"{self._name} makes a picture of {image.width}x{image.height} {scale} times larger, more "
                f"than {MAX_ON_THE_WAY // 10**6} megapixels: choose {LANCZOS} or a model that enlarges less."
            )
        if interrupt():
            raise Cancelled
        x = torch.from_numpy(np.array(image.convert("RGB"), dtype=np.float32)).permute(2, 0, 1) / 255
        rows, columns = (tiles(s, TILE if self._tiled else s, OVERLAP) for s in (image.height, image.width))
        with torch.inference_mode():
            made = by_tiles(self._compute, x, 3, rows, columns, 1, scale, interrupt)
            pixels = made.nan_to_num_(0).clamp_(0, 1).mul_(255).round_().byte().permute(1, 2, 0)
        return Image.fromarray(pixels.numpy())

    def _compute(self, part: torch.Tensor) -> torch.Tensor:
        return self._found(part.to(self._device, self._dtype))
