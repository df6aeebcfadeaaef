"""Draws scenes on any device: each shape is a signed distance field, looked up once per object and pixel."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from training.grammar import COLOURS, SHAPES, Scene

FIELD = 192  # resolution of a distance field
EXTENT = 2.0  # it covers [-EXTENT, EXTENT] radii around the centre
MAX_THINGS = 3


def outline(shape: str) -> np.ndarray:
    """[n, 2] corner points of a shape of radius 1 around the origin, y pointing down."""
    if shape == "square":
        return np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]) * 0.86
    if shape == "triangle":
        return np.array([(0, -1.02), (1.02, 0.82), (-1.02, 0.82)])
    if shape == "star":
        turn = np.arange(10) * math.pi / 5 - math.pi / 2
        radius = np.where(np.arange(10) % 2 == 0, 1.12, 0.46)
        return np.stack((np.cos(turn), np.sin(turn)), 1) * radius[:, None]
    if shape == "heart":
        t = np.linspace(0, 2 * math.pi, 80, endpoint=False)
        x = 16 * np.sin(t) ** 3
        y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
        return np.stack((x, -y), 1) / 16.0
    turn = np.linspace(0, 2 * math.pi, 96, endpoint=False)
    return np.stack((np.cos(turn), np.sin(turn)), 1)


def polygon_distance(points: np.ndarray, corners: np.ndarray) -> np.ndarray:
    """Signed distance of points [n, 2] to a closed polygon: negative inside."""
    nearest = np.full(len(points), np.inf)
    inside = np.zeros(len(points), bool)
    for a, b in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        edge, to = b - a, points - a
        along = np.clip((to @ edge) / (edge @ edge), 0, 1)
        nearest = np.minimum(nearest, np.hypot(*(to - along[:, None] * edge).T))
        crosses = (a[1] > points[:, 1]) != (b[1] > points[:, 1])
        slope = np.divide(edge[0] * to[:, 1], edge[1], out=np.zeros(len(points)), where=edge[1] != 0)
        inside ^= crosses & (points[:, 0] < a[0] + slope)
    return np.where(inside, -nearest, nearest)


@functools.cache
def distance_fields() -> Tensor:
    """[shapes, FIELD, FIELD] distances in radii."""
    axis = (np.arange(FIELD) + 0.5) / FIELD * 2 * EXTENT - EXTENT
    points = np.stack(np.meshgrid(axis, axis), -1).reshape(-1, 2)
    fields = [polygon_distance(points, outline(s)).reshape(FIELD, FIELD) for s in SHAPES]
    return torch.from_numpy(np.stack(fields)).float()


@dataclass
class Batch:
    """Scenes as tensors. shape: [B, 3] index or -1; colour: [B, 3, 3]; place: [B, 3, (x, y, radius)]; back:
    [B, 3].
    """

    shape: Tensor
    colour: Tensor
    place: Tensor
    back: Tensor

    def to(self, device: torch.device | str) -> Batch:
        return Batch(*(x.to(device) for x in (self.shape, self.colour, self.place, self.back)))

    def __getitem__(self, index: Tensor) -> Batch:
        return Batch(self.shape[index], self.colour[index], self.place[index], self.back[index])


def scene_arrays(scenes: Sequence[Scene]) -> list[np.ndarray]:
    """shape [n, 3] (index or -1), colour [n, 3] (palette index), place [n, 3, 3], background [n] (palette
    index).
    """
    n, names = len(scenes), list(COLOURS)
    shape, colour = np.full((n, MAX_THINGS), -1, np.int8), np.zeros((n, MAX_THINGS), np.int8)
    place = np.zeros((n, MAX_THINGS, 3), np.float32)
    for i, scene in enumerate(scenes):
        for j, thing in enumerate(scene.things):
            shape[i, j] = SHAPES.index(thing.shape)
            colour[i, j] = names.index(thing.colour)
            place[i, j] = thing.x, thing.y, thing.radius
    return [shape, colour, place, np.array([names.index(s.background) for s in scenes], np.int8)]


def to_batch(scenes: Sequence[Scene]) -> Batch:
    shape, colour, place, back = (torch.from_numpy(a) for a in scene_arrays(scenes))
    palette = torch.tensor(list(COLOURS.values())) / 127.5 - 1
    return Batch(shape.long(), palette[colour.long()], place, palette[back.long()])


def jitter(batch: Batch, generator: torch.Generator | None = None) -> Batch:
    """Places, sizes and colours a little different with every drawing."""

    def noise(like: Tensor) -> Tensor:
        return torch.rand(like.shape, generator=generator, device=like.device) * 2 - 1

    place = batch.place.clone()
    place[..., :2] += noise(place[..., :2]) * 0.03
    place[..., 2] *= 1 + 0.06 * noise(place[..., 2])
    colour = (batch.colour + 0.03 * noise(batch.colour)).clamp(-1, 1)
    return Batch(batch.shape, colour, place, (batch.back + 0.03 * noise(batch.back)).clamp(-1, 1))


def coverage(batch: Batch, height: int, width: int, stroke: float = 0) -> Tensor:
    """[B, 3, height, width] how much of each pixel each object covers, 0 to 1.

    stroke: 0 fills the objects; more draws only their outlines, `stroke` pixels wide.
    """
    device, side = batch.place.device, min(height, width)
    fields = distance_fields().to(device)
    xs = (torch.arange(width, device=device) + 0.5) / side
    ys = (torch.arange(height, device=device) + 0.5) / side
    x, y, radius = (batch.place[..., i, None, None] for i in range(3))
    dx = (xs - x * width / side) / radius.clamp_min(1e-3)
    dy = (ys[:, None] - y * height / side) / radius.clamp_min(1e-3)
    grid = torch.stack(torch.broadcast_tensors(dx, dy), -1).flatten(0, 1) / EXTENT
    field = fields[batch.shape.clamp_min(0).flatten()][:, None]
    distance = F.grid_sample(field, grid, padding_mode="border", align_corners=False)[:, 0]
    distance = distance.unflatten(0, (-1, MAX_THINGS)) * radius * side  # in pixels
    if stroke:
        distance = distance.abs() - stroke / 2
    return (0.5 - distance).clamp(0, 1) * (batch.shape >= 0)[..., None, None]


def render(batch: Batch, height: int, width: int, stroke: float = 0) -> tuple[Tensor, Tensor]:
    """The pictures [B, 3, height, width] in -1..1, and the coverage of each object, drawn with `stroke`."""
    cover = coverage(batch, height, width, stroke)
    image = batch.back[..., None, None].expand(-1, -1, height, width)
    for j in range(MAX_THINGS):
        image = torch.lerp(image, batch.colour[:, j, :, None, None].expand_as(image), cover[:, j, None])
    return image, cover


def draw(scene: Scene, size: int = 128, seed: int | None = None, stroke: float = 0) -> np.ndarray:
    """One scene as an RGB array [size, size, 3] uint8; with a seed, jittered. stroke: see `coverage`."""
    batch = to_batch([scene])
    if seed is not None:
        batch = jitter(batch, torch.Generator().manual_seed(seed))
    image = render(batch, size, size, stroke)[0][0]
    return ((image.permute(1, 2, 0) + 1) * 127.5).round().clamp(0, 255).byte().numpy()
