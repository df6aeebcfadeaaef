"""Adherence score: does the picture show what the prompt says?

Over held-out prompts, one picture each: is the background's colour right; is each named object's colour
present in its named place; is its shape right. Shapes are told apart by the best overlap with the five
shapes drawn at the object's own size and place (on rendered truth this is right in more than 98 % of cases;
a test proves it).

    python -m training.score --model z_image_mini --count 256
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from training.grammar import COLOURS, SHAPES, Scene, Thing, held_out
from training.render import outline, polygon_distance

PALETTE = np.array(list(COLOURS.values()), np.float32)
NAMES = list(COLOURS)
GRID = 40  # an object is compared at this resolution


@dataclass(frozen=True)
class Score:
    """Shares of 1. `everything`: all parts of a picture right."""

    count: int
    background: float
    colour_and_place: float
    shape: float
    everything: float

    def __str__(self) -> str:
        parts = {k: v for k, v in asdict(self).items() if k != "count"}
        return f"{self.count} prompts: " + ", ".join(f"{k} {100 * v:.1f} %" for k, v in parts.items())


def label(image: np.ndarray) -> np.ndarray:
    """[H, W, 3] uint8 -> [H, W] index of the nearest named colour."""
    distance = ((image[..., None, :].astype(np.float32) - PALETTE) ** 2).sum(-1)
    return distance.argmin(-1)


def blob(mask: np.ndarray, thing: Thing) -> np.ndarray | None:
    """The part of a colour's mask near where the object should be, or None when it is not there."""
    height, width = mask.shape
    side = min(height, width)
    y, x = np.mgrid[:height, :width] + 0.5
    near = np.hypot(x - thing.x * width, y - thing.y * height) < (1.45 * thing.radius + 0.05) * side
    part = mask & near
    expected = thing.radius**2 * side**2
    if part.sum() < 0.5 * expected:
        return None
    ys, xs = np.nonzero(part)
    off = np.hypot(xs.mean() / width - thing.x, ys.mean() / height - thing.y)
    return part if off < 0.16 else None


@functools.cache
def templates() -> dict[str, np.ndarray]:
    """Each shape at several offsets and scales on a GRID x GRID window of +-1.6 area-equal radii: [n, GRID *
    GRID].
    """
    axis = ((np.arange(GRID) + 0.5) / GRID * 2 - 1) * 1.6
    window = np.stack(np.meshgrid(axis, axis), -1).reshape(-1, 2)
    steps = np.linspace(-0.12, 0.12, 5)
    result = {}
    for shape in SHAPES:
        corners = outline(shape)
        x, y = corners.T
        area = abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2
        centre = corners.mean(0) if shape in ("triangle", "heart") else 0.0
        unit = (corners - centre) / np.sqrt(area / np.pi)  # as large as a circle of radius 1
        masks = [
            polygon_distance(window, unit * scale + (dx, dy)) < 0
            for scale in (0.94, 1.0, 1.06)
            for dx in steps
            for dy in np.linspace(-0.3, 0.3, 11)
        ]
        result[shape] = np.stack(masks)
    return result


def classify(part: np.ndarray) -> str:
    """The shape whose drawing overlaps the mask [H, W] best (intersection over union)."""
    ys, xs = np.nonzero(part)
    radius = np.sqrt(len(ys) / np.pi)
    axis = ((np.arange(GRID) + 0.5) / GRID * 2 - 1) * 1.6 * radius
    rows = np.clip(np.round(ys.mean() + axis).astype(int), -1, part.shape[0])
    columns = np.clip(np.round(xs.mean() + axis).astype(int), -1, part.shape[1])
    framed = np.pad(part, 1)
    window = framed[np.ix_(rows + 1, columns + 1)].reshape(-1)

    def overlap(masks: np.ndarray) -> float:
        both = (masks & window).sum(1)
        return float((both / (masks | window).sum(1)).max())

    best = {shape: overlap(masks) for shape, masks in templates().items()}
    return max(best, key=lambda shape: best[shape])


def grow(mask: np.ndarray) -> np.ndarray:
    """A mask [H, W] and its pixels' four neighbours."""
    grown = mask.copy()
    grown[1:] |= mask[:-1]
    grown[:-1] |= mask[1:]
    grown[:, 1:] |= mask[:, :-1]
    grown[:, :-1] |= mask[:, 1:]
    return grown


def silhouette(mask: np.ndarray, gap: int = 2) -> np.ndarray:
    """A mask [H, W] with its holes filled: all that the outside cannot reach, not through breaks in a line of
    up to 2 * gap pixels either.
    """
    wall = np.pad(mask, gap + 1)
    for _ in range(gap):
        wall = grow(wall)
    outside, before = np.zeros_like(wall), None
    outside[0] = True
    while before is None or (outside != before).any():
        before, outside = outside, grow(outside) & ~wall
    for _ in range(gap):
        outside = grow(outside)
    return ~outside[gap + 1 : -gap - 1, gap + 1 : -gap - 1]


def judge(image: np.ndarray, scene: Scene, *, silhouettes: bool = False) -> dict[str, list[bool]]:
    """The verdicts of one picture: one background, and colour-and-place and shape for each object.

    silhouettes: shapes are told by their silhouettes, so that they may be hollow.
    """
    labels = label(image)
    counts = np.bincount(labels.reshape(-1), minlength=len(NAMES))
    verdict: dict[str, list[bool]] = {
        "background": [NAMES[int(counts.argmax())] == scene.background],
        "colour_and_place": [],
        "shape": [],
    }
    for thing in scene.things:
        part = blob(labels == NAMES.index(thing.colour), thing)
        verdict["colour_and_place"].append(part is not None)
        if part is not None and silhouettes:
            part = silhouette(part)
        verdict["shape"].append(part is not None and classify(part) == thing.shape)
    return verdict


def summarize(verdicts: Sequence[dict[str, list[bool]]]) -> Score:
    def share(key: str) -> float:
        return float(np.mean([ok for v in verdicts for ok in v[key]]))

    everything = float(np.mean([all(all(oks) for oks in v.values()) for v in verdicts]))
    return Score(len(verdicts), share("background"), share("colour_and_place"), share("shape"), everything)


def score(draw: Callable[[Sequence[Scene]], Sequence[np.ndarray]], count: int = 256, seed: int = 0) -> Score:
    """`draw` makes one RGB array [H, W, 3] uint8 for each scene."""
    scenes = held_out(count, seed)
    return summarize([judge(image, scene) for image, scene in zip(draw(scenes), scenes, strict=True)])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="z_image_mini", help="a model card's id")
    parser.add_argument("--count", type=int, default=256, help="held-out prompts")
    parser.add_argument("--steps", type=int, help="steps instead of the card's")
    parser.add_argument("--guidance", type=float, help="guidance_scale instead of the card's")
    parser.add_argument("--shift", type=float, help="flow_shift instead of the card's")
    parser.add_argument("--sheet", type=Path, help="also write the first 64 pictures on one sheet")
    parser.add_argument("--json", action="store_true", help="print the score as JSON")
    args = parser.parse_args()

    from training.sampling import CardPainter, write_sheet

    overrides = {"num_inference_steps": args.steps, "guidance_scale": args.guidance, "flow_shift": args.shift}
    painter = CardPainter(args.model, {k: v for k, v in overrides.items() if v is not None})
    scenes = held_out(args.count)
    images = painter(scenes)
    result = summarize([judge(image, scene) for image, scene in zip(images, scenes, strict=True)])
    if args.sheet:
        write_sheet(images[:64], args.sheet)
    print(json.dumps(asdict(result)) if args.json else result)


if __name__ == "__main__":
    main()
