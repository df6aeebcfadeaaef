"""Control score: does a picture follow the edges it was given, against what its prompt says?

    python -m training.control_score --control models/z_image/mini/control.safetensors --count 64

Each held-out prompt names one shape; the edges are those of another one, a little off the named place. The
drawn shape, found by its colour, is compared with the filled edges (intersection over union). At strength 0
the base draws what the prompt says.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from models.z_image import control, names
from shared.weights import formats
from training.control import edge_map
from training.grammar import SHAPES, Scene, held_out
from training.render import draw
from training.sampling import CardPainter
from training.score import NAMES, classify, label, silhouette
from training.style import write_columns


@dataclass(frozen=True)
class Case:
    """asked: what the prompt says. shape: what the edges [H, W, 3] show; filled [H, W]: the pixels inside."""

    asked: Scene
    shape: str
    edges: np.ndarray
    filled: np.ndarray


@dataclass(frozen=True)
class Verdict:
    """overlap: of the drawn shape with the edges', 0 to 1. looks_like: the drawn shape, "" where none is."""

    overlap: float
    looks_like: str


def cases(count: int, seed: int = 0) -> Iterator[Case]:
    rng = random.Random(seed)
    alone = [scene for scene in held_out(6 * count, seed) if len(scene.things) == 1]
    for i, asked in enumerate(alone[:count]):
        thing = asked.things[0]
        shape = rng.choice([other for other in SHAPES if other != thing.shape])
        picture = draw(replace(asked, things=(replace(thing, shape=shape),)), seed=i)
        edges = edge_map(picture)
        yield Case(asked, shape, edges, silhouette(edges[..., 0] > 0))


def judge(image: np.ndarray, case: Case) -> Verdict:
    """image: [H, W, 3] uint8."""
    drawn = label(image) == NAMES.index(case.asked.things[0].colour)
    overlap = (drawn & case.filled).sum() / (drawn | case.filled).sum()
    return Verdict(float(overlap), classify(drawn) if drawn.any() else "")


def summary(verdicts: Sequence[Verdict], asked: Sequence[Case]) -> str:
    pairs = list(zip(verdicts, asked, strict=True))
    mean = np.mean([v.overlap for v in verdicts])
    close = np.mean([v.overlap >= 0.7 for v in verdicts])
    edges = np.mean([v.looks_like == case.shape for v, case in pairs])
    words = np.mean([v.looks_like == case.asked.things[0].shape for v, case in pairs])
    return (
        f"{len(pairs)} cases: overlap {mean:.3f}, at least 0.7 in {close:.1%}, "
        f"shape of the edges {edges:.1%}, of the words {words:.1%}"
    )


class ControlPainter:
    """Draws cases through a model card's own pipeline: one picture each, seed = its number."""

    def __init__(self, card: str, file: Path | None) -> None:
        """file: of a control network, where it is not to be the card's own."""
        painter = CardPainter(card, {})
        self.settings: dict[str, Any] = painter.settings
        self.pipe = painter.processor.pipe
        if file is not None:
            transformer = self.pipe.transformer
            found = formats.inspect([file], names.CONTROL)
            self.pipe.control = control.load(file, found, transformer.config, transformer.dtype)

    def __call__(self, asked: Sequence[Case], strength: float) -> list[np.ndarray]:
        return [self.paint(case, strength, seed) for seed, case in enumerate(asked)]

    def paint(self, case: Case, strength: float, seed: int) -> np.ndarray:
        height, width = case.filled.shape
        made = self.pipe(
            prompt=case.asked.caption,
            height=height,
            width=width,
            num_inference_steps=self.settings["num_inference_steps"],
            guidance_scale=self.settings["guidance_scale"],
            generator=[torch.Generator("cpu").manual_seed(seed)],
            control_image=Image.fromarray(case.edges),
            control_context_scale=strength,
        )
        return np.asarray(made.images[0])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="z_image_mini", help="a model card's id")
    parser.add_argument("--control", type=Path, help="a control network's file, instead of the card's own")
    parser.add_argument("--strengths", type=float, nargs="+", default=[0, 0.5, 0.75, 0.9, 1])
    parser.add_argument("--count", type=int, default=64, help="held-out prompts")
    parser.add_argument("--sheet", type=Path, help="also write the first pictures, a column per strength")
    parser.add_argument("--rows", type=int, default=6, help="pictures in a column of the sheet")
    args = parser.parse_args()

    painter, asked = ControlPainter(args.model, args.control), list(cases(args.count))
    columns = {"edges": [case.edges for case in asked]}
    for strength in args.strengths:
        pictures = painter(asked, strength)
        columns[f"strength {strength:g}"] = pictures
        verdicts = [judge(*pair) for pair in zip(pictures, asked, strict=True)]
        print(f"strength {strength:g}: {summary(verdicts, asked)}", flush=True)
    if args.sheet:
        write_columns(columns, args.sheet, args.rows)


if __name__ == "__main__":
    main()
