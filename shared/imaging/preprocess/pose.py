"""Poses by DWPose (Yang et al. 2023): YOLOX finds people, RTMPose their joints; drawn as OpenPose draws them.

Both models are ONNX files; `open_model` is the only function that touches onnxruntime.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from shared.errors import UserError

FOLDER = "dwpose"
DETECTOR, KEYPOINTS = "yolox_l.onnx", "dw-ll_ucoco_384.onnx"
STRIDES = (8, 16, 32)  # of YOLOX's three grids
OVERLAP = 0.45  # boxes that share more than this (intersection over union) are one person
PADDING = 1.25  # the part shown to RTMPose is so much larger than the person's box
BINS = 2.0  # SimCC bins per pixel
MEAN = np.array((123.675, 116.28, 103.53), np.float32)  # ImageNet's, RGB, 0 to 255
STD = np.array((58.395, 57.12, 57.375), np.float32)

# COCO-WholeBody's 133 keypoints: 17 body, 6 feet, 68 face, 21 left hand, 21 right hand.
FACE, HANDS = slice(23, 91), (slice(91, 112), slice(112, 133))
SHOULDERS = [5, 6]  # OpenPose's neck is their middle
# OpenPose's 18 body joints in COCO's numbers; None is the neck.
BODY = (0, None, 6, 8, 10, 5, 7, 9, 12, 14, 16, 11, 13, 15, 2, 1, 4, 3)
# Pairs of OpenPose's joints; limb k and joint k have colour k.
LIMBS = (
    (1, 2), (1, 5), (2, 3), (3, 4), (5, 6), (6, 7), (1, 8), (8, 9), (9, 10), (1, 11), (11, 12), (12, 13),
    (1, 0), (0, 14), (14, 16), (0, 15), (15, 17),
)  # fmt: skip
COLOURS = (
    (255, 0, 0), (255, 85, 0), (255, 170, 0), (255, 255, 0), (170, 255, 0), (85, 255, 0), (0, 255, 0),
    (0, 255, 85), (0, 255, 170), (0, 255, 255), (0, 170, 255), (0, 85, 255), (0, 0, 255), (85, 0, 255),
    (170, 0, 255), (255, 0, 255), (255, 0, 170), (255, 0, 85),
)  # fmt: skip
FINGERS = tuple(
    (0 if bone % 4 == 0 else bone, bone + 1) for bone in range(20)
)  # wrist 0, four bones a finger
LIMB_BRIGHTNESS = 0.6


@dataclass(frozen=True)
class Model:
    """An opened ONNX model: `run` maps its input [1, 3, height, width] float32 to all its outputs."""

    run: Callable[[np.ndarray], list[np.ndarray]]
    width: int
    height: int


def open_model(path: Path, default_size: tuple[int, int]) -> Model:
    """The model in `path`, on the CPU; `default_size` (width, height) where the file leaves it open."""
    import onnxruntime

    try:
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own exceptions share no other base
        raise UserError(f"{path.name} cannot be read; delete {path} and fetch it again") from error
    taken = session.get_inputs()[0]
    height, width = taken.shape[2:]
    size = (width, height) if isinstance(height, int) and isinstance(width, int) else default_size
    return Model(lambda pixels: session.run(None, {taken.name: pixels}), *size)


def pose_map(
    picture: np.ndarray,
    *,
    person: float,
    confidence: float,
    hands_and_face: bool,
    thickness: int,
    folder: Path,
) -> np.ndarray:
    """The skeletons of everybody in `picture` (RGB [H, W, 3] uint8), on black, of the same shape.

    Where no person is found, the whole picture is taken for one. Raises UserError when no joint is sure.
    """
    boxes = find_people(picture, open_model(folder / FOLDER / DETECTOR, (640, 640)), person)
    model = open_model(folder / FOLDER / KEYPOINTS, (288, 384))
    people = [find_keypoints(picture, box, model) for box in boxes]
    if not any((scores[: len(BODY) - 1] >= confidence).any() for _, scores in people):
        raise UserError("No person was found in the control picture; lower Joints, or choose another picture")
    return draw(people, picture.shape[1], picture.shape[0], confidence, hands_and_face, thickness)


# ---------------------------------------------------------------- people


def find_people(picture: np.ndarray, model: Model, threshold: float) -> np.ndarray:
    """Boxes [people, 4] (left, top, right, bottom in pixels); the whole picture if there is nobody."""
    pixels, scale = letterbox(picture, model.width, model.height)
    boxes, scores = decode_boxes(model.run(pixels)[0][0], model.width, model.height)
    corners_and_sizes = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)
    kept = cv2.dnn.NMSBoxes(corners_and_sizes.tolist(), scores.tolist(), threshold, OVERLAP)
    if not len(kept):
        return np.array([[0, 0, picture.shape[1], picture.shape[0]]], np.float32)
    return boxes[np.asarray(kept).ravel()] / scale


def letterbox(picture: np.ndarray, width: int, height: int) -> tuple[np.ndarray, float]:
    """As YOLOX was trained: BGR 0 to 255, [1, 3, height, width] float32, the picture top left on gray 114.

    Also returns how many pixels of it a pixel of `picture` is.
    """
    scale = min(height / picture.shape[0], width / picture.shape[1])
    size = max(1, int(picture.shape[1] * scale)), max(1, int(picture.shape[0] * scale))
    canvas = np.full((height, width, 3), 114, np.uint8)
    canvas[: size[1], : size[0]] = cv2.resize(picture, size, interpolation=cv2.INTER_LINEAR)
    return np.ascontiguousarray(canvas[..., ::-1].transpose(2, 0, 1)[None], np.float32), scale


def decode_boxes(output: np.ndarray, width: int, height: int) -> tuple[np.ndarray, np.ndarray]:
    """Boxes [N, 4] (left, top, right, bottom) and scores [N] of people in YOLOX's raw output [N, 85].

    A row is centre and log size relative to its cell, in strides, then objectness and 80 class scores
    (Ge et al. 2021); the cells run row by row through the grids of all strides.
    """
    cells = [np.mgrid[: height // stride, : width // stride][::-1].reshape(2, -1).T for stride in STRIDES]
    strides = np.concatenate(
        [np.full((len(grid), 1), stride) for grid, stride in zip(cells, STRIDES, strict=True)]
    )
    centre = (output[:, :2] + np.concatenate(cells)) * strides
    half = np.exp(output[:, 2:4]) * strides / 2
    return np.concatenate([centre - half, centre + half], axis=1), output[:, 4] * output[:, 5]


# ---------------------------------------------------------------- joints


def find_keypoints(picture: np.ndarray, box: np.ndarray, model: Model) -> tuple[np.ndarray, np.ndarray]:
    """Keypoints [133, 2] (x, y in pixels of `picture`) and their scores [133] of the person in `box`."""
    pixels, left, top, scale = cut_out(picture, box, model.width, model.height)
    across, down = model.run(pixels)[:2]
    points, scores = decode_simcc(across[0], down[0])
    return points * scale + (left, top), scores


def cut_out(
    picture: np.ndarray, box: np.ndarray, width: int, height: int
) -> tuple[np.ndarray, float, float, float]:
    """The person's part as RTMPose was trained on: RGB normalized, [1, 3, height, width] float32.

    Also returns where it lies: left, top, and how many pixels of `picture` one of its pixels is.
    """
    left, top, right, bottom = (float(edge) for edge in box)
    scale = PADDING * max((right - left) / width, (bottom - top) / height)
    left, top = (left + right - width * scale) / 2, (top + bottom - height * scale) / 2
    back = np.array([[scale, 0, left], [0, scale, top]], np.float32)
    part = cv2.warpAffine(picture, back, (width, height), flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP)
    normal = (part.astype(np.float32) - MEAN) / STD
    return np.ascontiguousarray(normal.transpose(2, 0, 1)[None]), left, top, scale


def decode_simcc(across: np.ndarray, down: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Points [K, 2] in the model's input pixels and scores [K] from SimCC's logits [K, 2 W] and [K, 2 H].

    The strongest bin of each axis is the place (Li et al. 2022); the weaker axis is the score, as in mmpose.
    """
    points = np.stack([across.argmax(axis=1), down.argmax(axis=1)], axis=1) / BINS
    return points, np.minimum(across.max(axis=1), down.max(axis=1))


def openpose_body(points: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """OpenPose's 18 joints [18, 2] and scores [18] of COCO's; the neck is as sure as the worse shoulder."""
    neck, neck_score = points[SHOULDERS].mean(axis=0), scores[SHOULDERS].min()
    body = np.stack([neck if joint is None else points[joint] for joint in BODY])
    return body, np.array([neck_score if joint is None else scores[joint] for joint in BODY])


# ---------------------------------------------------------------- drawing


def draw(
    people: list[tuple[np.ndarray, np.ndarray]],
    width: int,
    height: int,
    confidence: float,
    hands_and_face: bool,
    thickness: int,
) -> np.ndarray:
    """RGB [height, width, 3] uint8: what of `people` (keypoints, scores) is at least `confidence` sure.

    Dimmed limbs below bright joints, then hands with coloured bones and blue joints, then white face points,
    as ControlNet's OpenPose maps are.
    """
    canvas = np.zeros((height, width, 3), np.uint8)
    bodies = [openpose_body(*person) for person in people]
    for limb, colour in zip(LIMBS, COLOURS, strict=False):
        for points, scores in bodies:
            if scores[list(limb)].min() >= confidence:
                _draw_limb(canvas, points[list(limb)], colour, thickness)
    canvas = (canvas * LIMB_BRIGHTNESS).astype(np.uint8)
    for points, scores in bodies:
        _draw_points(canvas, points, scores >= confidence, COLOURS, thickness)
    if hands_and_face:
        for points, scores in people:
            _draw_hands_and_face(canvas, points, scores >= confidence, thickness)
    return canvas


def _draw_limb(canvas: np.ndarray, ends: np.ndarray, colour: tuple[int, int, int], thickness: int) -> None:
    """A filled ellipse from one end to the other."""
    (x, y), (across, down) = ends.mean(axis=0), ends[0] - ends[1]
    axes = int(math.hypot(across, down) / 2), thickness
    outline = cv2.ellipse2Poly((int(x), int(y)), axes, int(math.degrees(math.atan2(down, across))), 0, 360, 1)
    cv2.fillConvexPoly(canvas, np.asarray(outline, np.int32), colour)


def _draw_points(canvas: np.ndarray, points: np.ndarray, sure: np.ndarray, colours, radius: int) -> None:
    for (x, y), drawn, colour in zip(points, sure, colours, strict=True):
        if drawn:
            cv2.circle(canvas, (int(x), int(y)), radius, colour, -1)


def _draw_hands_and_face(canvas: np.ndarray, points: np.ndarray, sure: np.ndarray, thickness: int) -> None:
    for hand in HANDS:
        joints, seen = points[hand].astype(int), sure[hand]
        for number, (start, end) in enumerate(FINGERS):
            if seen[start] and seen[end]:
                colour = [255 * part for part in colorsys.hsv_to_rgb(number / len(FINGERS), 1, 1)]
                cv2.line(canvas, joints[start].tolist(), joints[end].tolist(), colour, max(1, thickness // 2))
        _draw_points(canvas, joints, seen, [(0, 0, 255)] * len(joints), thickness)
    face, seen = points[FACE], sure[FACE]
    _draw_points(canvas, face, seen, [(255, 255, 255)] * len(face), max(1, thickness - 1))
