"""Denoising in tiles: each prediction is made part by part and blended, so that there is one picture all the
time, with one noise, whatever the sampler.

Every tile sees the prompt and only its own part of the picture (MultiDiffusion, arXiv 2302.08113). At low
strengths the picture that is started from keeps the tiles together.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from shared.imaging.tiling import ramps, tiles

OVERLAP = 4  # a tile shares at least this part of its side with the next

#: (the number of a tile, its parts [16, h, w] of the samples) -> their predictions
PredictTile = Callable[[int, list[Tensor]], list[Tensor]]


@dataclass(frozen=True)
class LatentTiles:
    """The tiles of a latent, all of one size (rows, columns).

    weights: of each tile at its places, [rows, columns]; they add up to 1 at every place of the latent.
    """

    rows: int
    columns: int
    cuts: list[tuple[slice, slice]]
    weights: list[Tensor]

    @classmethod
    def of(cls, rows: int, columns: int, tile: int | None) -> LatentTiles:
        """All in latent positions. tile: even; None for one tile, the whole."""
        tall, wide = min(rows, tile or rows), min(columns, tile or columns)
        down, across = tiles(rows, tall, tall // OVERLAP), tiles(columns, wide, wide // OVERLAP)
        cuts = [(slice(*a), slice(*b)) for a in down for b in across]
        weights = [a[:, None] * b for a in ramps(down) for b in ramps(across)]
        return cls(tall, wide, cuts, weights)

    def joined(self, predict: PredictTile, samples: list[Tensor]) -> list[Tensor]:
        """One prediction for each whole sample from those of its tiles."""
        if len(self.cuts) == 1:
            return predict(0, samples)
        wholes = [torch.zeros_like(x) for x in samples]
        for tile, (cut, weight) in enumerate(zip(self.cuts, self.weights, strict=True)):
            parts = predict(tile, [x[(slice(None), *cut)].contiguous() for x in samples])
            for whole, part in zip(wholes, parts, strict=True):
                whole[(slice(None), *cut)] += part * weight.to(part)
        return wholes
