"""From a job's pictures to what a pass of the pipeline paints, and back to the picture that was asked for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from models.z_image.family import SIZE_MULTIPLE, SMALLEST_SIDE
from shared.imaging import masks, preprocess, sources
from shared.imaging.hires import begins_as_it_is
from shared.settings.parsing import parse_outpaint, parse_parameters, parse_resolution

SMALLEST_PART = 512  # pixels of a side, of what is painted alone


@dataclass(frozen=True)
class Scene:
    """What a pass begins with: the picture `image`, repainted where `mask` is white, and the map `control`.

    All are as large as the picture that is asked for, `size` (width, height); any may be missing.
    """

    size: tuple[int, int]
    image: Image.Image | None = None
    mask: Image.Image | None = None
    control: Image.Image | None = None

    def enlarged(self, image: Image.Image) -> Scene:
        """The scene of the second pass, which begins with `image`, this one's picture enlarged."""
        mask = self.mask and masks.resize(self.mask, image.size)
        control = self.control and self.control.resize(image.size, sources.LANCZOS)
        return Scene(image.size, image, mask, control)


def of_job(settings: Mapping[str, Any], folder: Path) -> tuple[Scene, list[str]]:
    """What a job's first pass begins with, and notes. UserError for pictures that cannot be used.

    folder: of the control preprocessors' models.
    """
    size, image, mask, notes = parse_resolution(settings["resolution"]), None, None, list[str]()
    if settings.get("image_start"):
        image, mask, notes = _start(settings, size)
        size = image.size
    return Scene(size, image, mask, _control(settings, size, folder, notes)), notes


def _start(
    settings: Mapping[str, Any], size: tuple[int, int]
) -> tuple[Image.Image, Image.Image | None, list[str]]:
    """The picture that is started from with its mask, both at the size that is painted, and notes."""
    source = sources.load_picture(settings["image_start"])
    image, mask, notes = source.image, None, source.notes
    if settings.get("image_mask"):
        mask, mask_notes = masks.from_upload(settings["image_mask"], image.size)
        notes = [*notes, *mask_notes]
    if not _keeps_its_size(settings, image.size, size):
        fitted = sources.fit(image, *size)
        image, notes = fitted.image, [*notes, *fitted.notes]
        mask = mask and sources.fit(mask, *size, resample=sources.NEAREST).image
    mask = mask and masks.grow(mask, settings["mask_expand"])
    amounts = parse_outpaint(settings.get("outpaint", ""), *image.size)
    if not any(amounts):
        return image, mask, notes
    larger = masks.extend(image, *amounts, multiple=1)
    if mask:
        larger.mask.paste(mask, larger.box)
    return larger.image, larger.mask, [*notes, *larger.notes]


def _keeps_its_size(settings: Mapping[str, Any], own: tuple[int, int], size: tuple[int, int]) -> bool:
    """Whether every pixel of the picture is wanted: where only a part of it is painted, where it is only
    enlarged, and where it is extended and as large as the resolution, which cannot but be rounded.
    """
    part = bool(settings.get("image_mask") and settings.get("mask_only"))
    near = all(abs(a - b) < SIZE_MULTIPLE for a, b in zip(own, size, strict=True))
    return part or begins_as_it_is(settings) or (bool(settings.get("outpaint")) and near)


def _control(
    settings: Mapping[str, Any], size: tuple[int, int], folder: Path, notes: list[str]
) -> Image.Image | None:
    if not settings.get("image_guide") or not settings["control_net_weight"]:
        return None
    picture = sources.load_picture(settings["image_guide"])
    name, values = settings["control_preprocessor"], parse_parameters(settings["control_parameters"])
    drawn = preprocess.control_map(name, picture.image, *size, values, folder=folder)
    notes += preprocess.empty(name, drawn)
    return drawn


# ---- what the pipeline is given ----------------------------------------------------------------------------


@dataclass(frozen=True)
class FullCanvas:
    """All of a scene, its right and lower edge repeated up to a side that the models paint."""

    scene: Scene
    feather: float

    @property
    def size(self) -> tuple[int, int]:
        width, height = (
            max(SMALLEST_SIDE, -(-side // SIZE_MULTIPLE) * SIZE_MULTIPLE) for side in self.scene.size
        )
        return width, height

    def cut(self, image: Image.Image, resample: Image.Resampling = sources.LANCZOS) -> Image.Image:
        """`image`, as large as the scene, at the size that is painted."""
        if image.size == self.size:
            return image
        beyond = [(0, new - old) for new, old in zip(self.size[::-1], image.size[::-1], strict=True)]
        values = np.asarray(image)
        return Image.fromarray(np.pad(values, [*beyond, (0, 0)][: values.ndim], mode="edge"))

    def paste(self, painted: Image.Image) -> Image.Image:
        """The scene's picture."""
        return painted if painted.size == self.scene.size else painted.crop((0, 0, *self.scene.size))


@dataclass(frozen=True)
class Crop:
    """The part around a scene's mask, which fades into the scene when it is put back: `fade` pixels of it."""

    scene: Scene
    box: masks.Box
    fade: float
    feather = 0.0

    @property
    def size(self) -> tuple[int, int]:
        return self.box.width, self.box.height

    def cut(self, image: Image.Image, resample: Image.Resampling = sources.LANCZOS) -> Image.Image:
        return self.box.cut(image, resample)

    def paste(self, painted: Image.Image) -> Image.Image:
        assert self.scene.image is not None and self.scene.mask is not None
        return self.box.put_back(self.scene.image, painted, self.scene.mask, self.fade)


def select_region(scene: Scene, settings: Mapping[str, Any], scale: float = 1.0) -> FullCanvas | Crop:
    """What of the scene is painted. scale: how much larger it is than the first pass's, for which the
    settings count pixels.
    """
    if scene.mask is None:
        return FullCanvas(scene, 0.0)
    feather = settings["mask_feather"] * scale
    if not settings.get("mask_only"):
        return FullCanvas(scene, feather)
    side = math.isqrt(math.prod(parse_resolution(settings["resolution"])))
    margin, smallest, largest = (
        round(x * scale) for x in (settings["mask_margin"], min(SMALLEST_PART, side), side)
    )
    box = masks.crop_around(scene.mask, margin, min_size=smallest, max_size=largest)
    return Crop(scene, box, feather)


def arguments(region: FullCanvas | Crop, strength: float) -> dict[str, Any]:
    """The pipeline's arguments for what is painted of a scene. strength: of the change, with an image."""
    scene, (width, height) = region.scene, region.size
    result: dict[str, Any] = {"width": width, "height": height}
    if scene.image is not None:
        result |= {"image": region.cut(scene.image), "denoising_strength": strength}
    if scene.mask is not None:
        mask = region.cut(scene.mask, sources.NEAREST)
        result |= {"inpaint_mask": mask, "mask_feather": region.feather}
    if scene.control is not None:
        result["control_image"] = region.cut(scene.control)
    return result
