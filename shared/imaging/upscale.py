"""Enlarging pictures: by Lanczos, or by an upscaler model that the package spandrel can read.

torch and spandrel are imported where a model is used.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from shared.errors import Cancelled, UserError
from shared.imaging import sources
from shared.imaging.hires import FOLDERS, LANCZOS, Hires, upscalers
from shared.weights.files import Folders, check_safetensors

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

MAX_ON_THE_WAY = 2**27  # pixels of what an upscaler model makes before it is brought to the size asked for
TILE, OVERLAP = 256, 32  # pixels of the picture that an upscaler model sees at once
MAX_PASSES = 3  # of a model that enlarges by less than what was asked for

Interrupt = Callable[[], bool]
#: (picture, size, whether to stop) -> the picture at that size. Raises Cancelled.
Enlarge = Callable[[Image.Image, tuple[int, int], Interrupt], Image.Image]


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
