"""Style score: how far a picture's shapes are drawn as outlines, which is what `training.lora` teaches.

    python -m training.style --lora loras/z_image/mini/mini_outlines.safetensors --strengths 0 0.5 1

Each object of the prompt is found by its colour; inside it, around the point farthest from its edge, counts
the share of pixels that show the background. 0 is filled, 1 hollow, and an object that is not there is 0.
The adherence score goes with it; it sees shapes by their silhouettes, because here they have holes.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from training.grammar import Scene, Thing, held_out
from training.lora import TRIGGER
from training.render import outline, polygon_distance
from training.sampling import CardPainter
from training.score import NAMES, Score, blob, judge, label, summarize

CORE = 0.33  # part of the way from the deepest point to the edge that is looked at


@functools.cache
def deepest_point(shape: str) -> tuple[float, float, float]:
    """(x, y, depth) of the point farthest from the edge, as shares of the shape's bounding box (depth: of its
    shorter side).
    """
    corners = outline(shape)
    low, size = corners.min(0), np.ptp(corners, axis=0)
    axis = np.arange(101) / 100
    inside = np.stack(np.meshgrid(axis, axis), -1).reshape(-1, 2)
    distance = polygon_distance(low + inside * size, corners)
    x, y = inside[distance.argmin()]
    return float(x), float(y), float(-distance.min() / size.min())


def hollowness(labels: np.ndarray, thing: Thing, background: str) -> float:
    """0..1 of one object; labels [H, W]: each pixel's named colour."""
    part = blob(labels == NAMES.index(thing.colour), thing)
    if part is None:
        return 0.0
    ys, xs = np.nonzero(part)
    x, y, depth = deepest_point(thing.shape)
    (left, right), (top, bottom) = (np.percentile(v, (1, 99)) + (0, 1) for v in (xs, ys))  # but for strays
    width, height = right - left, bottom - top
    row, column = np.mgrid[: labels.shape[0], : labels.shape[1]] + 0.5
    away = np.hypot(column - (left + x * width), row - (top + y * height))
    core = away <= max(1.0, CORE * depth * min(width, height))
    return float((labels[core] == NAMES.index(background)).mean())


def style(image: np.ndarray, scene: Scene) -> float:
    """0..1 of one picture [H, W, 3] uint8: the mean over its objects."""
    labels = label(image)
    return float(np.mean([hollowness(labels, thing, scene.background) for thing in scene.things]))


def paint(
    card: str, scenes: Sequence[Scene], lora: Path, strength: float, overrides: Mapping[str, Any]
) -> list[np.ndarray]:
    """One picture for each scene by a model card's own pipeline with the LoRA."""
    painter = CardPainter(card, overrides)
    painter.use_lora(lora, strength)
    return painter(scenes)


def measure(pictures: Sequence[np.ndarray], scenes: Sequence[Scene]) -> tuple[float, Score]:
    """The mean style, and the adherence score by silhouettes."""
    pairs = list(zip(pictures, scenes, strict=True))
    styles = [style(picture, scene) for picture, scene in pairs]
    return float(np.mean(styles)), summarize([judge(*pair, silhouettes=True) for pair in pairs])


def write_columns(columns: Mapping[str, Sequence[np.ndarray]], path: Path, rows: int) -> None:
    """The first `rows` pictures of each column under the column's name."""
    side, head = 98, 18
    sheet = Image.new("RGB", (len(columns) * side, head + rows * side), "white")
    write = ImageDraw.Draw(sheet)
    for i, (name, pictures) in enumerate(columns.items()):
        write.text((i * side + 4, 3), name, fill="black")
        for j, picture in enumerate(pictures[:rows]):
            sheet.paste(Image.fromarray(picture).resize((96, 96)), (i * side, head + j * side))
    sheet.save(path, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lora", type=Path, required=True, help="the LoRA's file")
    parser.add_argument("--model", default="z_image_mini_base", help="a model card's id")
    parser.add_argument("--strengths", type=float, nargs="+", default=[0, 0.5, 1], help="of the LoRA")
    parser.add_argument("--count", type=int, default=64, help="held-out prompts")
    parser.add_argument("--steps", type=int, help="steps instead of the card's")
    parser.add_argument("--trigger", action="store_true", help="put the LoRA's trigger before each prompt")
    parser.add_argument("--sheet", type=Path, help="also write the first pictures, a column per strength")
    parser.add_argument("--rows", type=int, default=6, help="pictures in a column of the sheet")
    args = parser.parse_args()

    scenes = held_out(args.count)
    asked = [replace(s, caption=f"{TRIGGER}, {s.caption}") if args.trigger else s for s in scenes]
    overrides = {"num_inference_steps": args.steps} if args.steps else {}
    columns = {}
    for strength in args.strengths:
        pictures = paint(args.model, asked, args.lora, strength, overrides)
        columns[f"strength {strength:g}"] = pictures
        hollow, adherence = measure(pictures, scenes)
        print(f"strength {strength:g}: style {hollow:.3f}; {adherence}", flush=True)
    if args.sheet:
        write_columns(columns, args.sheet, args.rows)


if __name__ == "__main__":
    main()
