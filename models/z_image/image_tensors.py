"""The pictures that a run starts from, is held to, or is controlled by: from what callers give to tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from shared.errors import UserError
from shared.imaging import masks, sources

#: a picture file, its bytes, a Pillow image, or [3, H, W] in 0..1
ImageInput = sources.Picture | Tensor


@dataclass(frozen=True)
class ImageTensors:
    """All on the CPU and of the size that is made.

    image, control: [3, H, W] fp32 in 0..1. painted: bool [H, W], true where the image is repainted.
    weights: [H, W] fp32, how much of the new picture is seen at each pixel: 0 wherever nothing is painted.
    notes: what was substituted.
    """

    image: Tensor | None = None
    painted: Tensor | None = None
    weights: Tensor | None = None
    control: Tensor | None = None
    notes: tuple[str, ...] = ()

    def joined(self, picture: Tensor) -> Tensor:
        """picture [3, H, W] where it was to be repainted, the image's own pixels elsewhere."""
        if self.image is None or self.weights is None:
            return picture
        mixed = self.weights * picture + (1 - self.weights) * self.image
        return torch.where(self.weights == 0, self.image, mixed)


def prepare(
    size: tuple[int, int],
    image: ImageInput | None = None,
    mask: ImageInput | None = None,
    control: ImageInput | None = None,
    feather: float = 0.0,
) -> ImageTensors:
    """What the pipeline was given, at `size` (width, height). UserError for what cannot be used.

    mask: white (from half on) is repainted. feather: pixels over which the new picture fades in, inwards from
    the mask's edge.
    """
    notes: tuple[str, ...] = ()
    if mask is not None and image is None:
        if control is None:
            raise UserError("inpaint_mask came without a picture: give the one to repaint as image.")
        notes = ("There was a mask but no image: the control picture is the one that was repainted.",)
        image, control = control, None
    (pixels, image_notes), (map_pixels, map_notes) = (_pixels(x, *size) for x in (image, control))
    notes += (*image_notes, *map_notes)
    if mask is None:
        return ImageTensors(pixels, control=map_pixels, notes=notes)
    white, mask_notes = _mask(mask, *size)
    black, full = (Image.new("RGB", white.size, colour) for colour in ("black", "white"))
    weights = masks.composite(black, full, white, feather)
    painted = _tensor(white)[0] >= 0.5
    return ImageTensors(pixels, painted, _tensor(weights)[0], map_pixels, (*notes, *mask_notes))


def _pixels(image: ImageInput | None, width: int, height: int) -> tuple[Tensor | None, Sequence[str]]:
    """(values, notes)"""
    if image is None:
        return None, ()
    if isinstance(image, Tensor):
        if tuple(image.shape) != (3, height, width):
            raise UserError(
                f"A picture came as a tensor of shape {tuple(image.shape)}; expected {(3, height, width)} "
                "with values from 0 to 1."
            )
        return image.float().cpu().clamp(0, 1), ()
    source = sources.fit_source(sources.load_picture(image), width, height)
    return _tensor(source.image), source.notes


def _mask(image: ImageInput, width: int, height: int) -> tuple[Image.Image, Sequence[str]]:
    """(black and white, notes)"""
    if isinstance(image, Tensor):
        values = image.detach().float().cpu().squeeze()
        if tuple(values.shape) != (height, width):
            raise UserError(
                f"inpaint_mask came as a tensor of shape {tuple(image.shape)}; expected {(height, width)}, "
                "1 where the picture is repainted."
            )
        return Image.fromarray(np.where(values.numpy() >= 0.5, 255, 0).astype(np.uint8)), ()
    mask, notes = masks.from_upload(image, (width, height))
    return mask, [*notes, *masks.checked(mask)]


def _tensor(image: Image.Image) -> Tensor:
    """[channels, H, W] fp32 in 0..1."""
    values = torch.from_numpy(np.array(image, dtype=np.float32)) / 255
    return values.permute(2, 0, 1).contiguous() if values.dim() == 3 else values[None]


@dataclass(frozen=True)
class InpaintConstraint:
    """What masked denoising leaves as it is: `painted`, bool [1, h, w], is false there.

    latent: the picture's, [16, h, w].
    """

    latent: Tensor
    painted: Tensor

    @classmethod
    def of(cls, latent: Tensor, painted: Tensor) -> InpaintConstraint:
        """painted: of pixels, [H, W]. A place of the latent is painted when one of its pixels is."""
        size = (latent.shape[1], latent.shape[2])
        return cls(latent, F.adaptive_max_pool2d(painted[None].float(), size).to(latent.device) > 0)

    def apply(self, outputs: Sequence[Tensor], samples: Sequence[Tensor], sigma: float) -> list[Tensor]:
        """The predictions of x - z for samples at a noise level, exact for what is not painted.

        So that part stays, at every level, the picture under its own noise, whichever sampler steps on.
        """
        return [
            torch.where(self.painted, out, ((self.latent.to(x) - x) / sigma).to(out))
            for out, x in zip(outputs, samples, strict=True)
        ]
