"""Enlarging a finished picture is an ordinary job; here are its settings."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shared.errors import UserError
from shared.imaging import metadata, sources
from shared.imaging.hires import MAX_PIXELS
from shared.library.model_info import ModelInfo
from shared.settings.table import SETTINGS

PROMPT = "a sharp, detailed picture"  # for pictures that do not say what they show
NO_PICTURES = dict.fromkeys([name for name, setting in SETTINGS.items() if setting.picture], "")


def upscale_settings(
    picture: Path,
    model: ModelInfo,
    *,
    scale: float,
    upscaler: str = "lanczos",
    strength: float = 0.0,
    tile: int = 0,
    prompt: str = "",
) -> dict[str, Any]:
    """Settings that enlarge the picture in a file: image to image at strength 0, then the second pass.

    scale, upscaler, strength, tile: of the settings hires_*. At strength 0 no model is loaded. prompt: of
    what is painted; "" for the picture's own. UserError for a file that is no picture, or when the result
    would be too large.
    """
    source = sources.load_picture(picture).image
    width, height = (round(side * scale) for side in source.size)
    if width * height > MAX_PIXELS:
        raise UserError(
            f"{scale:g} times {source.width}x{source.height} is {width}x{height}, more than "
            f"{MAX_PIXELS // 10**6} megapixels: choose a smaller scale."
        )
    own = _own(picture)
    known = own if own.get("model_type") == model.id else {}
    settings = {name: value for name, value in known.items() if name in model.settings}
    settings |= {name: text for name, text in NO_PICTURES.items() if name in model.settings}
    if model.defaults.get("control_preprocessor") == "tile":  # such models paint detail into what they follow
        settings |= {"image_guide": str(picture), "control_preprocessor": "tile", "control_parameters": ""}
    return settings | {
        "model_type": model.id,
        "prompt": prompt.strip() or str(own.get("prompt") or PROMPT),
        "resolution": "x".join(str(_suited(side, model)) for side in source.size),
        "batch_size": 1,
        "outpaint": "",
        "image_start": str(picture),
        "denoising_strength": 0.0,
        "hires_scale": scale,
        "hires_upscaler": upscaler,
        "hires_denoising_strength": strength,
        "hires_tile": tile,
    }


def _own(picture: Path) -> Mapping[str, Any]:
    """The settings that a picture was made with; none where it does not say them."""
    try:
        found = metadata.read(picture)
    except UserError:  # a format without metadata
        return {}
    return metadata.settings_from(found) if found else {}


def _suited(side: int, model: ModelInfo) -> int:
    """The next side that the setting takes; the picture itself keeps its own."""
    multiple = int(model.capabilities.get("size_multiple", 16))
    low, high = int(model.capabilities.get("min_size", 64)), int(model.capabilities.get("max_size", 8192))
    return min(max(-(-side // multiple) * multiple, low), high)
