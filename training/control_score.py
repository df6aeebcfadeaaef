"""Control score: does a picture follow the edges it was given, against what its prompt says?

    python -m training.control_score --control models/z_image/mini/control.safetensors --count 64

Each held-out prompt names one shape; the edges are those of another one, a little off the named place. The
drawn shape, found by its colour, is compared with the filled edges (intersection over union). At strength 0
the base draws what the prompt says.

--repaint: each picture shows another shape in another colour where the prompt's is to be; a box around it is
repainted, without edges, and the adherence score is asked of the result. At strength 0 the network is not
there, and the pipeline holds what the mask keeps by itself.
"""

from __future__ import annotations

import argparse
import functools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from models.z_image import control
from training.grammar import COLOURS, SHAPES, Scene, held_out
from training.lessons import edge_map
from training.render import draw
from training.sampling import CardPainter
from training.score import NAMES, classify, label, silhouette, summarize
from training.score import judge as judge_scene
from training.style import write_columns

SAMPLER = ("num_inference_steps", "guidance_scale", "flow_shift")  # of a card's settings
SIDE = 128  # of the pictures, in pixels
MARGIN = 1.4  # a box to repaint reaches so many radii from its object's centre


@dataclass(frozen=True)
class Case:
    """asked: what the prompt says. shape: what the picture [H, W, 3] shows in its place."""

    asked: Scene
    shape: str
    picture: np.ndarray

    @functools.cached_property
    def edges(self) -> np.ndarray:
        return edge_map(self.picture)

    @functools.cached_property
    def filled(self) -> np.ndarray:
        """[H, W] the pixels inside of the edges."""
        return silhouette(self.edges[..., 0] > 0)

    @property
    def mask(self) -> np.ndarray:
        """[H, W] the box that is repainted."""
        thing = self.asked.things[0]
        y, x = (np.mgrid[:SIDE, :SIDE] + 0.5) / SIDE
        return np.maximum(abs(x - thing.x), abs(y - thing.y)) < MARGIN * thing.radius


@dataclass(frozen=True)
class Verdict:
    """overlap: of the drawn shape with the edges', 0 to 1. looks_like: the drawn shape, "" where none is."""

    overlap: float
    looks_like: str


def cases(count: int, seed: int = 0, recolour: bool = False) -> Iterator[Case]:
    """recolour: the picture's object has another colour than the prompt's, too."""
    rng = random.Random(seed)
    alone = [scene for scene in held_out(6 * count + 20, seed) if len(scene.things) == 1]
    for i, asked in enumerate(alone[:count]):
        thing = asked.things[0]
        shape = rng.choice([other for other in SHAPES if other != thing.shape])
        other = rng.choice([c for c in COLOURS if c not in (thing.colour, asked.background)])
        shown = replace(thing, shape=shape, colour=other if recolour else thing.colour)
        yield Case(asked, shape, draw(replace(asked, things=(shown,)), SIDE, seed=i))


def judge(image: np.ndarray, case: Case) -> Verdict:
    """image: [H, W, 3] uint8."""
    drawn, filled = label(image) == NAMES.index(case.asked.things[0].colour), case.filled
    overlap = (drawn & filled).sum() / (drawn | filled).sum()
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
        self.settings: dict[str, Any] = {k: v for k, v in painter.settings.items() if k in SAMPLER}
        self.pipe = painter.processor.pipe
        if file is not None:
            transformer = self.pipe.transformer
            self.pipe.control = control.load(file, transformer.config, transformer.dtype)

    def paint(self, asked: Sequence[Case], strength: float) -> list[np.ndarray]:
        """By their edges."""
        return [
            self._draw(case, seed, strength, control_image=Image.fromarray(case.edges))
            for seed, case in enumerate(asked)
        ]

    def repaint(self, asked: Sequence[Case], strength: float) -> list[np.ndarray]:
        """Inside of their masks."""
        return [
            self._draw(
                case,
                seed,
                strength,
                image=Image.fromarray(case.picture),
                inpaint_mask=Image.fromarray(case.mask),
            )
            for seed, case in enumerate(asked)
        ]

    def _draw(self, case: Case, seed: int, strength: float, **pictures: Image.Image) -> np.ndarray:
        made = self.pipe(
            prompt=case.asked.caption,
            height=SIDE,
            width=SIDE,
            generator=[torch.Generator("cpu").manual_seed(seed)],
            control_context_scale=strength,
            **pictures,
            **self.settings,
        )
        return np.asarray(made.images[0])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="z_image_mini_control2_1", help="a model card's id")
    parser.add_argument("--control", type=Path, help="a control network's file, instead of the card's own")
    parser.add_argument("--strengths", type=float, nargs="+", default=[0, 0.5, 0.75, 0.9, 1])
    parser.add_argument("--count", type=int, default=64, help="held-out prompts")
    parser.add_argument("--repaint", action="store_true", help="score repainting instead")
    parser.add_argument("--sheet", type=Path, help="also write the first pictures, a column per strength")
    parser.add_argument("--rows", type=int, default=6, help="pictures in a column of the sheet")
    args = parser.parse_args()

    painter = ControlPainter(args.model, args.control)
    asked = list(cases(args.count, recolour=args.repaint))
    columns = {"before": [case.picture for case in asked]}
    if not args.repaint:
        columns = {"edges": [case.edges for case in asked]}
    for strength in args.strengths:
        pictures = (painter.repaint if args.repaint else painter.paint)(asked, strength)
        columns[f"strength {strength:g}"] = pictures
        pairs = list(zip(pictures, asked, strict=True))
        if args.repaint:
            result = str(summarize([judge_scene(picture, case.asked) for picture, case in pairs]))
        else:
            result = summary([judge(*pair) for pair in pairs], asked)
        print(f"strength {strength:g}: {result}", flush=True)
    if args.sheet:
        write_columns(columns, args.sheet, args.rows)


if __name__ == "__main__":
    main()
