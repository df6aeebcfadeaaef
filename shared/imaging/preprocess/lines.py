"""Control maps that need no model: OpenCV and arithmetic. Every function: RGB [H, W, 3] uint8 -> the same."""

from __future__ import annotations

import cv2
import numpy as np

from shared.errors import UserError


def as_it_is(picture: np.ndarray, *, invert: bool) -> np.ndarray:
    return 255 - picture if invert else picture


def canny(picture: np.ndarray, *, low: int, high: int) -> np.ndarray:
    """Canny's edges, white on black, of the colour channel that changes most.

    Both thresholds are on the sum of the absolute Sobel gradients.
    """
    if low > high:
        raise UserError(f"low is {low} and high is {high}; expected low to be at most high")
    return _rgb(cv2.Canny(picture, low, high))


def straight_lines(picture: np.ndarray, *, length: float, certainty: float) -> np.ndarray:
    """The segments of OpenCV's LSD (von Gioi et al. 2010), drawn as MLSD's are: white on black, thin.

    `certainty` is -log10 of the number of such lines expected in noise.
    """
    detector = cv2.createLineSegmentDetector(cv2.LSD_REFINE_ADV, log_eps=certainty)
    found = detector.detect(_luminance(picture))[0]
    drawn = np.zeros(picture.shape[:2], np.uint8)
    side = min(picture.shape[:2])
    for start_x, start_y, end_x, end_y in np.empty((0, 4)) if found is None else found.reshape(-1, 4):
        if np.hypot(end_x - start_x, end_y - start_y) >= side * length / 100:
            ends = (round(start_x), round(start_y)), (round(end_x), round(end_y))
            cv2.line(drawn, *ends, 255, max(1, side // 512))  # MLSD works at 512 and draws one pixel
    return _rgb(drawn)


def scribble(picture: np.ndarray, *, coarseness: float, threshold: int, thickness: int) -> np.ndarray:
    """Canny's edges of the smoothed picture as strokes `thickness` pixels wide with soft borders."""
    # In floating point: whole steps of brightness would turn a soft ramp into a staircase of edges.
    smooth = cv2.GaussianBlur(picture.astype(np.float32), (0, 0), coarseness, borderType=cv2.BORDER_REPLICATE)
    # Smoothing flattens an edge in proportion to its sigma; undone, or the threshold would mean two things.
    across, down = (cv2.Sobel(smooth, cv2.CV_32F, *axis) * coarseness for axis in ((1, 0), (0, 1)))
    strongest = (across**2 + down**2).argmax(axis=2)[..., None]  # colour channel
    gradient = [np.take_along_axis(part, strongest, 2)[..., 0] for part in (across, down)]
    gradient = [np.clip(part, -32767, 32767).astype(np.int16) for part in gradient]
    edges = cv2.Canny(gradient[0], gradient[1], threshold / 2, threshold)
    brush = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (thickness, thickness))
    return _rgb(cv2.GaussianBlur(cv2.dilate(edges, brush), (0, 0), max(0.5, thickness / 6)))


def gray(picture: np.ndarray) -> np.ndarray:
    return _rgb(_luminance(picture))


def tile(picture: np.ndarray, *, factor: float) -> np.ndarray:
    """Averages over squares of `factor` pixels, smoothly enlarged again."""
    height, width = picture.shape[:2]
    small = max(1, round(width / factor)), max(1, round(height / factor))
    return cv2.resize(
        cv2.resize(picture, small, interpolation=cv2.INTER_AREA),
        (width, height),
        interpolation=cv2.INTER_CUBIC,
    )


def _luminance(picture: np.ndarray) -> np.ndarray:
    return cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)


def _rgb(values: np.ndarray) -> np.ndarray:
    return cv2.cvtColor(values, cv2.COLOR_GRAY2RGB)
