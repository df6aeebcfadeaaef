"""Many pictures at once for training and scoring."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from models.z_image.transformer_z_image import Control, ZImageTransformer2DModel
from shared.loras.strengths import parse
from training.grammar import Scene
from training.networks import forward_batch


def sigmas(steps: int, shift: float) -> list[float]:
    """The shifted schedule of the pipeline, ending in 0."""
    line = torch.linspace(1.0, 1 / steps, steps, dtype=torch.float64)
    return [*(shift * line / (1 + (shift - 1) * line)).tolist(), 0.0]


@torch.no_grad()
def sample_latents(
    model: ZImageTransformer2DModel,
    prompt: tuple[Tensor, Tensor],
    negative: tuple[Tensor, Tensor] | None,
    *,
    steps: int,
    guidance: float,
    shift: float,
    seed: int = 0,
    size: tuple[int, int] = (16, 16),
    control: Control | None = None,
) -> Tensor:
    """Euler with classifier-free guidance, pos + guidance * (pos - neg). prompt: (features [B, L, D],
    lengths [B]). control: see `forward_batch`; for both halves.
    """
    features, lengths = prompt
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(len(features), 16, *size, generator=generator).to(features.device)
    grid = sigmas(steps, shift)
    for now, then in zip(grid, grid[1:], strict=False):
        t = torch.full((len(x),), 1 - now, device=x.device)
        prediction, _ = forward_batch(model, x, t, features, lengths, control=control)
        if guidance > 0 and negative is not None:
            other, _ = forward_batch(model, x, t, *negative, control=control)
            prediction = prediction + guidance * (prediction - other)
        x = x + (now - then) * prediction.float()
    return x


def to_pictures(decoded: Tensor) -> list[np.ndarray]:
    """[B, 3, H, W] in -1..1 -> B arrays [H, W, 3] uint8."""
    bytes_ = ((decoded.float().clamp(-1, 1) + 1) * 127.5).round().byte()
    return list(bytes_.permute(0, 2, 3, 1).cpu().numpy())


def write_sheet(pictures: Sequence[np.ndarray], path: Path, columns: int = 8) -> None:
    """All pictures side by side in one file."""
    height, width = pictures[0].shape[:2]
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * (width + 2), rows * (height + 2)), "white")
    for i, picture in enumerate(pictures):
        sheet.paste(Image.fromarray(picture), (i % columns * (width + 2), i // columns * (height + 2)))
    sheet.save(path)


class CardPainter:
    """Draws scenes through the program's own pipeline with a model card: one each, seed = its number."""

    def __init__(self, card: str, overrides: Mapping[str, Any]) -> None:
        from shared.library.catalog import catalog

        root = Path(__file__).resolve().parents[1]
        model = catalog(root, root / "ckpts").model(card)
        self.settings = {**model.defaults, **overrides}
        weights = [one for one in model.required if one.role.startswith(("transformer", "module"))]
        sources = [one.alternatives[0] for one in weights]
        self.processor, _ = model.handler.load_model(sources, model.architecture, model.card.model)
        self.lora_names = model.handler.query_lora_names(model.architecture, model.card.model)

    def use_lora(self, path: Path, strength: float) -> None:
        self.processor.use_loras([path], parse(str(strength), 1), self.lora_names)

    def __call__(self, scenes: Sequence[Scene]) -> list[np.ndarray]:
        pictures = []
        for seed, scene in enumerate(scenes):
            made = self.processor.generate(
                self.settings | {"prompt": scene.caption},
                seeds=[seed],
                on_phase=lambda phase: None,
                on_step=lambda step, total, previews: None,
                interrupt=lambda: False,
            )
            pictures.append(np.asarray(made.images[0]))
        return pictures
