"""Latents to pictures and back, whole or in tiles that need less memory.

A tile is not exactly the part of the whole picture that it covers: the VAE's group norms and its one
attention layer look at all they are given. So tiles overlap, and each fades into the next along a linear
ramp.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from shared.errors import Cancelled, UserError

TILE_MULTIPLE = 64  # pixels
# Pixels. Measured on two VAEs: the convolutions' reach past a tile's edge shows up to here, and from here on
# the error at a seam is the group norms', which every other place of the tile has as well.
OVERLAP = 64

Span = tuple[int, int]
Interrupt = Callable[[], bool]


def tiles(size: int, tile: int, overlap: int) -> list[Span]:
    """(start, stop) of the fewest parts of `tile` that cover `size`, evenly spaced.

    Neighbours share at least `overlap` (less than `tile`); one whole span where `size` is not above `tile`.
    """
    if size <= tile:
        return [(0, size)]
    count = math.ceil((size - overlap) / (tile - overlap))
    starts = [i * (size - tile) // (count - 1) for i in range(count)]
    return [(start, start + tile) for start in starts]


def ramps(spans: list[Span]) -> list[Tensor]:
    """Each span's share of its positions, fp32: linear where spans overlap; the shares of a position add up
    to 1.
    """
    shares = [torch.ones(stop - start) for start, stop in spans]
    for i, ((_, stop), (start, _)) in enumerate(zip(spans, spans[1:], strict=False)):
        ramp = (torch.arange(stop - start) + 0.5) / (stop - start)
        shares[i + 1][: len(ramp)] *= ramp
        shares[i][len(shares[i]) - len(ramp) :] *= ramp.flip(0)
    total = torch.zeros(spans[-1][1])
    for (start, stop), share in zip(spans, shares, strict=True):
        total[start:stop] += share
    return [share / total[start:stop] for (start, stop), share in zip(spans, shares, strict=True)]


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

    picture = _by_tiles(compute, z, config.out_channels, cuts, 1, scale, interrupt)
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

    mode = _by_tiles(compute, pixels.float() * 2 - 1, config.latent_channels, cuts, scale, 1, interrupt)
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


def _by_tiles(
    compute: Callable[[Tensor], Tensor],
    x: Tensor,
    channels: int,
    cuts: Cuts,
    unit: int,
    unit_out: int,
    interrupt: Interrupt | None,
) -> Tensor:
    """[c, h * unit, w * unit] -> [channels, h * unit_out, w * unit_out], fp32: `compute` on each tile
    [1, c, ...], and their blend.
    """
    height, width = (side // unit for side in x.shape[1:])
    rows, columns = cuts.spans(height), cuts.spans(width)
    vertical, horizontal = (ramps([_times(span, unit_out) for span in spans]) for spans in (rows, columns))
    result = torch.zeros(channels, height * unit_out, width * unit_out)
    for row, down in zip(rows, vertical, strict=True):
        for column, across in zip(columns, horizontal, strict=True):
            if interrupt is not None and interrupt():
                raise Cancelled
            part = compute(x[None, :, slice(*_times(row, unit)), slice(*_times(column, unit))])[0]
            part = part.float().cpu() * down[:, None] * across
            result[:, slice(*_times(row, unit_out)), slice(*_times(column, unit_out))] += part
    return result


def _times(span: Span, unit: int) -> Span:
    return span[0] * unit, span[1] * unit
