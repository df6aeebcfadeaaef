"""The built-in Mini models for tests: loaded once, on one thread so that runs compare bit for bit."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from models.z_image.z_image_handler import family_handler

ROOT = Path(__file__).resolve().parents[2]


def model_def(card: str) -> dict[str, Any]:
    return json.loads((ROOT / "defaults" / f"{card}.json").read_text("utf-8"))["model"]


@functools.cache
def load(card: str = "z_image_mini") -> tuple[Any, Any]:
    """(processor, pipe) of a Mini card in fp32 on the CPU."""
    definition = model_def(card)
    return family_handler.load_model(
        definition["URLs"][0], definition["architecture"], definition, device="cpu", prompt_cache=None
    )
