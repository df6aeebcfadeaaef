"""What a control network learns from: pictures with their edges, or with a part to be repainted.

Words are true where no edges contradict them. Beside edges many name wrong shapes or none, so that the
network learns to believe the edges; and some shapes have no name at all.
"""

from __future__ import annotations

import math
import random
import re
import string
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from models.z_image.control import INPAINT_CHANNELS, context, without_painted
from shared.imaging.preprocess import PREPROCESSORS
from training.grammar import COLOURS, SHAPES, Scene, sample
from training.lora import Drawings
from training.render import jitter, render, to_batch
from training.sampling import to_pictures
from training.train import SCALE, SHIFT

SIZES = {  # (height, width) in pixels -> how often
    (128, 128): 0.81,
    (128, 192): 0.07,
    (192, 128): 0.07,
    (192, 192): 0.05,
}
KINDS = {(True, False): 0.62, (True, True): 0.13, (False, True): 0.2, (False, False): 0.05}  # (edges, hole)
USES = 2  # steps on each batch, with noise of their own: to make one costs as much as to learn from it
FORMS = ("drawn", "warped", "doodled")


@dataclass(frozen=True)
class Lesson:
    """A picture and what is told of it. edges, hole: whether its edges are shown, part of it to be repainted.
    form: the scene as it is "drawn", "warped" (turned, stretched, moved), or "doodled" (a shape without a
    name, in the colours of a scene with one thing).
    """

    scene: Scene
    caption: str
    edges: bool
    hole: bool
    form: str


def misnamed(caption: str, rng: random.Random) -> str:
    """The caption with each shape's name replaced by another's, or by none."""
    return re.sub("|".join(SHAPES), lambda _: rng.choice((*SHAPES, *SHAPES, "shape", "thing")), caption)


def misplaced(scene: Scene, rng: random.Random) -> str:
    """The words of another scene with one thing, in this scene's colours."""
    other = sample(rng, 1)
    colours = {
        other.background: scene.background,
        other.things[0].colour: scene.things[0].colour,
    }
    return re.sub("(?i)" + "|".join(COLOURS), lambda m: colours.get(m[0].lower(), m[0]), other.caption)


def draw_lesson(rng: random.Random) -> Lesson | None:
    """One at random; None for a scene that is held out. Words are true where no edges contradict them."""
    edges, hole = rng.choices(list(KINDS), list(KINDS.values()))[0]
    scene = sample(rng)
    if scene.held_out:
        return None
    caption, alone = scene.caption, len(scene.things) == 1
    if edges and rng.random() < 0.55:
        elsewhere = alone and rng.random() < 0.5
        caption = misplaced(scene, rng) if elsewhere else misnamed(caption, rng)
    if rng.random() < 0.05:
        caption = ""
    form = rng.choices(FORMS, (0.3, 0.2, 0.5))[0] if edges and alone else "drawn"
    return Lesson(scene, caption, edges, hole, form)


def warp(images: Tensor) -> Tensor:
    """[B, 3, H, W], each picture turned, stretched and moved differently; its background goes on."""
    count, (height, width) = len(images), images.shape[-2:]
    angle = torch.rand(count) * 2 * math.pi
    turn = torch.stack((angle.cos(), -angle.sin(), angle.sin(), angle.cos()), 1).view(-1, 2, 2)
    stretch = torch.diag_embed(0.7 + 0.7 * torch.rand(count, 2))
    aspect = torch.tensor([[1, height / width], [width / height, 1]])  # grids reach from -1 to 1 both ways
    move = torch.rand(count, 2, 1) * 0.8 - 0.4
    grid = F.affine_grid(torch.cat((turn @ stretch * aspect, move), 2), list(images.shape), False)
    return F.grid_sample(images, grid.to(images), padding_mode="border", align_corners=False)


def doodle(height: int, width: int, rng: random.Random) -> Tensor:
    """[height, width] how much of each pixel a shape covers that no word names, half of them with a hole."""
    large = np.zeros((4 * height, 4 * width), np.uint8)
    side = min(large.shape)
    centre = np.array([rng.uniform(0.3, 0.7) * n for n in large.shape[::-1]])
    size = rng.uniform(0.15, 0.42) * side
    for colour in (255, 0)[: rng.choice((1, 2))]:
        draw_form(large, centre, size, colour, rng)
        size *= rng.uniform(0.4, 0.7)
    return torch.from_numpy(
        cv2.resize(large, (width, height), interpolation=cv2.INTER_AREA) / np.float32(255)
    )


def draw_form(canvas: np.ndarray, centre: np.ndarray, size: float, colour: int, rng: random.Random) -> None:
    """A polygon, an ellipse, a box, a bent line or a letter, on the canvas [H, W] uint8."""
    x, y = (round(v) for v in centre)
    kind = rng.choice(("polygon", "ellipse", "box", "line", "letter"))
    if kind == "ellipse":
        axes = round(size), round(size * rng.uniform(0.3, 1))
        cv2.ellipse(canvas, (x, y), axes, rng.uniform(0, 180), 0, 360, colour, -1)
    elif kind == "letter":
        thick = round(size * rng.uniform(0.2, 0.4))
        start = round(x - 0.8 * size), round(y + 0.8 * size)
        letter = rng.choice(string.ascii_letters + string.digits)
        cv2.putText(canvas, letter, start, cv2.FONT_HERSHEY_SIMPLEX, size / 14, colour, thick)
    else:
        count = {"box": 4, "line": rng.randint(3, 4)}.get(kind, rng.randint(3, 9))
        turns = np.sort([rng.uniform(0, 2 * math.pi) for _ in range(count)])
        radii = np.array([rng.uniform(0.35, 1) for _ in range(count)])
        if kind == "box":
            half = rng.uniform(0.15, math.pi / 2 - 0.15)  # between a diagonal and the middle
            turns, radii = np.array([half, math.pi - half, math.pi + half, -half]), np.ones(4)
        corners = centre + size * radii[:, None] * np.stack((np.cos(turns), np.sin(turns)), 1)
        points = [corners.round().astype(np.int32)]
        if kind == "line":
            cv2.polylines(canvas, points, False, colour, round(size * rng.uniform(0.25, 0.5)))
        else:
            cv2.fillPoly(canvas, points, colour)


def draw_pictures(
    lessons: Sequence[Lesson], height: int, width: int, rng: random.Random, device: str
) -> Tensor:
    """[B, 3, height, width] of the lessons, each different with every drawing."""
    batch = jitter(to_batch([lesson.scene for lesson in lessons]).to(device))
    images, _ = render(batch, height, width)
    warped = warp(images)
    for i, lesson in enumerate(lessons):
        if lesson.form == "warped":
            images[i] = warped[i]
        elif lesson.form == "doodled":
            cover = doodle(height, width, rng).to(device)
            images[i] = torch.lerp(batch.back[i, :, None, None], batch.colour[i, 0, :, None, None], cover)
    return images


def edge_map(picture: np.ndarray) -> np.ndarray:
    """[H, W, 3] uint8 -> its edges in the same form, by the preprocessor that the program uses."""
    canny = PREPROCESSORS["canny"]
    return canny.make(picture, **{setting.name: setting.default for setting in canny.parameters})


def edge_maps(images: Tensor, rng: random.Random) -> Tensor:
    """[B, 3, H, W] -> their edges, white (1) on black (-1); a quarter of them with thick lines."""
    maps = [edge_map(picture) for picture in to_pictures(images)]
    edges = torch.from_numpy(np.stack(maps)).permute(0, 3, 1, 2).to(images) / 127.5 - 1
    thick = torch.tensor([rng.random() < 0.25 for _ in maps], device=images.device)
    return torch.where(thick[:, None, None, None], F.max_pool2d(edges, 3, 1, 1), edges)


def random_hole(height: int, width: int, rng: random.Random) -> Tensor:
    """Bool [height, width], true where the picture is repainted: boxes, ellipses, at times all of it."""
    y, x = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
    painted = torch.full((height, width), rng.random() < 0.08)
    for _ in range(rng.choice((1, 1, 2))):
        across, down = (abs(axis - rng.random()) / rng.uniform(0.12, 0.45) for axis in (x, y))
        painted |= (across.maximum(down) if rng.random() < 0.5 else across.hypot(down)) < 1
    return painted


class Lessons:
    """Batches of latents, words and control contexts, through the Mini's own text encoder and VAE."""

    def __init__(self, batch: int, seed: int, device: str) -> None:
        self.batch, self.device, self.rng = batch, device, random.Random(seed)
        self.parts = Drawings(batch, seed, device)

    def lessons(self) -> Iterator[list[Lesson]]:
        """Batches without end; all captions of one are padded to the same length."""
        waiting: dict[int, list[Lesson]] = defaultdict(list)
        while True:
            lesson = draw_lesson(self.rng)
            if lesson is None:
                continue
            same = waiting[self.parts.padded_length(lesson.caption)]
            same.append(lesson)
            if len(same) == self.batch:
                yield same.copy()
                same.clear()

    def encode(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, 16, H / 8, W / 8]"""
        with torch.no_grad(), torch.autocast(self.device, dtype=torch.bfloat16):
            return (self.parts.vae.encode(images).latent_dist.mode().float() - SHIFT) * SCALE

    def encode_some(self, images: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The latents of those pictures [3, H, W] that are there."""
        there = [image for image in images if image is not None]
        latents = iter(self.encode(torch.stack(there)) if there else ())
        return [None if image is None else next(latents) for image in images]

    def contexts(self, lessons: Sequence[Lesson], images: Tensor) -> Tensor:
        """[B, 33, h, w] for pictures [B, 3, H, W]."""
        height, width = images.shape[-2:]
        painted = [random_hole(height, width, self.rng).to(images.device) for _ in lessons]
        kept = [
            without_painted(image / 2 + 0.5, where) * 2 - 1 if lesson.hole else None
            for lesson, image, where in zip(lessons, images, painted, strict=True)
        ]
        maps = edge_maps(images, self.rng)
        edges = [one if lesson.edges else None for lesson, one in zip(lessons, maps, strict=True)]
        nothing = images.new_zeros(16, height // 8, width // 8)
        parts = zip(self.encode_some(edges), self.encode_some(kept), painted, strict=True)
        found = [
            context(INPAINT_CHANNELS, nothing if control is None else control, rest, where)
            for control, rest, where in parts
        ]
        return torch.stack(found).to(images)

    def __iter__(self) -> Iterator[tuple[Tensor, tuple[Tensor, Tensor], Tensor]]:
        """latents, (features, lengths), contexts"""
        for lessons in self.lessons():
            height, width = self.rng.choices(list(SIZES), list(SIZES.values()))[0]
            images = draw_pictures(lessons, height, width, self.rng, self.device)
            words = self.parts.words([lesson.caption for lesson in lessons])
            made = self.encode(images), words, self.contexts(lessons, images)
            for _ in range(USES):
                yield made
