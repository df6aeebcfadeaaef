"""Depth maps by Depth Anything V2 (Yang et al. 2024) through transformers: near is bright."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np

from shared.errors import UserError

if TYPE_CHECKING:
    import torch

FOLDER = "depth-anything-v2-small"
PATCH = 14  # the model's; sides are multiples of it
MEAN = np.array((0.485, 0.456, 0.406), np.float32)  # ImageNet's, RGB
STD = np.array((0.229, 0.224, 0.225), np.float32)


def depth_map(picture: np.ndarray, *, detail: int, folder: Path) -> np.ndarray:
    """How near every pixel of `picture` is, black the farthest, white the nearest; RGB [H, W, 3] uint8."""
    model = load(folder / FOLDER)
    nearness = predict(model, pixel_values(picture, detail))
    return shown(nearness, picture.shape[1], picture.shape[0])


def load(path: Path) -> Any:
    """The model of a folder with config.json and model.safetensors; nothing is fetched."""
    from safetensors import SafetensorError
    from transformers import DepthAnythingForDepthEstimation

    try:
        return DepthAnythingForDepthEstimation.from_pretrained(path, local_files_only=True).eval()
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"The depth model in {path} cannot be read; delete the folder's files and fetch them again"
        ) from error


def pixel_values(picture: np.ndarray, detail: int) -> torch.Tensor:
    """`picture` as the model wants it: float32 [1, 3, h, w], of about `detail` pixels on its shorter side.

    The side that changes least decides the scale, as in transformers' DPTImageProcessor.
    """
    import torch
    from PIL import Image

    height, width = picture.shape[:2]
    scale = min(detail / height, detail / width, key=lambda scale: abs(1 - scale))
    size = tuple(max(PATCH, round(side * scale / PATCH) * PATCH) for side in (width, height))
    small = np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC))
    normal = (small.astype(np.float32) / 255 - MEAN) / STD
    return torch.from_numpy(np.ascontiguousarray(normal.transpose(2, 0, 1)))[None]


def predict(model: Any, pixels: torch.Tensor) -> np.ndarray:
    """[h, w] float32, larger is nearer: the model's output, or the inverse of a metric model's distances."""
    import torch

    with torch.inference_mode():
        output = model(pixel_values=pixels.to(model.device, model.dtype))
    depth = output.predicted_depth[0].float().cpu().numpy()
    return 1 / np.maximum(depth, 1e-3) if model.config.depth_estimation_type == "metric" else depth


def shown(nearness: np.ndarray, width: int, height: int) -> np.ndarray:
    """[height, width, 3] uint8: the least value black, the greatest white."""
    large = cv2.resize(nearness, (width, height), interpolation=cv2.INTER_CUBIC)
    low, high = float(large.min()), float(large.max())
    scaled = (large - low) * (255 / (high - low)) if high > low else np.zeros_like(large)
    return cv2.cvtColor(scaled.astype(np.uint8), cv2.COLOR_GRAY2RGB)
