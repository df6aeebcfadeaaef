"""Cheap pictures of latents while they are made: one matrix product, no VAE."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

LONGEST_SIDE = 512  # of a preview, in pixels


@dataclass(frozen=True)
class LatentRgb:
    """factors: 16 rows of (red, green, blue), and a bias: latent @ factors + bias is a picture in -1..1."""

    factors: Sequence[Sequence[float]]
    bias: Sequence[float]

    @classmethod
    def read(cls, path: Path) -> LatentRgb:
        return cls(**json.loads(path.read_text("utf-8")))

    def render(self, latent: Tensor, size: tuple[int, int]) -> Image.Image:
        """latent [16, h, w] -> image of `size` (width, height), or smaller with the same shape."""
        factors = torch.tensor(self.factors, dtype=torch.float32, device=latent.device)
        picture = latent.float().movedim(0, -1) @ factors + torch.tensor(self.bias, device=latent.device)
        pixels = ((picture.clamp(-1, 1) + 1) * 127.5).round().byte().cpu().numpy()
        scale = min(1.0, LONGEST_SIDE / max(size))
        target = (max(1, round(size[0] * scale)), max(1, round(size[1] * scale)))
        return Image.fromarray(pixels).resize(target, Image.Resampling.BICUBIC)
