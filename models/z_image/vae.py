"""Latents to pictures and back, whole or in tiles that need less memory.

A tile is not exactly the part of the whole picture that it covers: the VAE's group norms and its one
attention layer look at all they are given. So tiles overlap, and each fades into the next along a linear
ramp.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from shared.errors import UserError
from shared.imaging.tiling import Interrupt, Span, by_tiles, tiles

TILE_MULTIPLE = 64  # pixels
# Pixels. Measured on two VAEs: the convolutions' reach past a tile's edge shows up to here, and from here on
# the error at a seam is the group norms', which every other place of the tile has as well.
OVERLAP = 64


@torch.inference_mode()
def decode(
    vae: AutoencoderKL,
    latents: Tensor,
    tile: int | None = None,
    interrupt: Interrupt | None = None,
    overlap: int = OVERLAP,
) -> Tensor:
    """latents [16, h, w], as the transformer knows them -> picture [3, 8h, 8w] in 0..1, fp32, in RAM.

    tile: side in pixels, a multiple of 64; None decodes the whole at once. overlap: pixels, at most half
    a tile. The device holds one tile's activations; the picture is put together in RAM. Raises Cancelled
    between tiles, UserError for another tile.
    """
    config, scale = vae.config, _scale(vae)
    z = latents.float() / config.scaling_factor + config.shift_factor
    cuts = Cuts.of(tile, overlap, scale)

    def compute(part: Tensor) -> Tensor:
        return vae.decode(part.to(vae.device, vae.dtype), return_dict=False)[0]

    rows, columns = map(cuts.spans, z.shape[1:])
    picture = by_tiles(compute, z, config.out_channels, rows, columns, 1, scale, interrupt)
    return picture.div_(2).add_(0.5).clamp_(0, 1)


@torch.inference_mode()
def encode(
    vae: AutoencoderKL,
    pixels: Tensor,
    tile: int | None = None,
    interrupt: Interrupt | None = None,
    overlap: int = OVERLAP,
) -> Tensor:
    """picture [3, H, W] in 0..1 (H, W multiples of 8) -> latents [16, H/8, W/8] as the transformer knows
    them, fp32, in RAM: the distribution's mode, shifted and scaled. The rest is as in `decode`.
    """
    config, scale = vae.config, _scale(vae)
    cuts = Cuts.of(tile, overlap, scale)

    def compute(part: Tensor) -> Tensor:
        return vae.encode(part.to(vae.device, vae.dtype)).latent_dist.mode()

    x, channels = pixels.float() * 2 - 1, config.latent_channels
    rows, columns = (cuts.spans(side // scale) for side in pixels.shape[1:])
    mode = by_tiles(compute, x, channels, rows, columns, scale, 1, interrupt)
    return mode.sub_(config.shift_factor).mul_(config.scaling_factor)


@dataclass(frozen=True)
class Cuts:
    """How to cut, in latent positions, so that tiles of latents and of pixels meet; no tile: one whole."""

    tile: int | None
    overlap: int

    @classmethod
    def of(cls, tile: int | None, overlap: int, scale: int) -> Cuts:
        """From pixels. Raises UserError when `tile` is not a multiple of 64."""
        if tile is None:
            return cls(None, 0)
        if tile <= 0 or tile % TILE_MULTIPLE:
            raise UserError(f"The VAE's tile is {tile} pixels; it must be a multiple of {TILE_MULTIPLE}.")
        return cls(tile // scale, min(overlap, tile // 2) // scale)

    def spans(self, size: int) -> list[Span]:
        return tiles(size, self.tile or size, self.overlap)


def _scale(vae: AutoencoderKL) -> int:
    return 2 ** (len(vae.config.block_out_channels) - 1)
