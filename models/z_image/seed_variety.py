"""Seed variety: seeded noise on a prompt's features, so that pictures of one prompt differ more.

Distilled models paint nearly the same picture from every start noise. What they read is then made a little
different for each picture, in the first steps or in all of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from models.arguments import check, default

FEATURE_SPREAD = (0.25, 0.75)  # quantiles: a prompt's first token is a hundred times as large as the others
NORMAL_SPREAD = 1.349  # between these quantiles of a normal distribution of standard deviation 1


@dataclass(frozen=True)
class SeedVariety:
    """strength: of the noise, in units of each feature's spread over the prompt's tokens. share: of the
    entries that get noise, 0 to 1. until: the part of the steps that sees it, 0 to 1. UserError for numbers
    out of the settings' ranges.
    """

    strength: float = default("seed_variety")
    share: float = default("seed_variety_share")
    until: float = default("seed_variety_until")

    def __post_init__(self) -> None:
        check(seed_variety=self.strength, seed_variety_share=self.share, seed_variety_until=self.until)

    @property
    def on(self) -> bool:
        return self.strength > 0 and self.share > 0 and self.until > 0

    def acts_at(self, step: int, steps: int) -> bool:
        """step: counted from 0. The first step has it whenever it is on."""
        return self.on and step < max(1, round(self.until * steps))

    def apply(self, features: Tensor, seed: int) -> Tensor:
        """Features [L, hidden] of one prompt as the picture with this seed sees them; drawn on the CPU."""
        x = features.float().cpu()
        low, high = torch.quantile(x, torch.tensor(FEATURE_SPREAD), dim=0)
        numbers = torch.Generator().manual_seed(_stream(seed))
        chosen = torch.rand(x.shape, generator=numbers) < self.share
        noise = torch.randn(x.shape, generator=numbers) * (high - low) / NORMAL_SPREAD
        return (x + self.strength * noise * chosen).to(features)

    def for_each(
        self, features: Sequence[Tensor], repeat: int, generators: Sequence[torch.Generator | None]
    ) -> list[Tensor]:
        """Each prompt's features for each of its `repeat` pictures, whose generators know their seeds."""
        each = [x for x in features for _ in range(repeat)]
        return [
            self.apply(x, g.initial_seed() if g is not None else int(torch.randint(2**62, ())))
            for x, g in zip(each, generators, strict=True)
        ]


def _stream(seed: int) -> int:
    """Other numbers than those of the picture's start noise."""
    return int.from_bytes(hashlib.sha256(f"seed variety {seed}".encode()).digest()[:7], "big")
