"""Numbers and settings in the words a person reads."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from shared.settings.messages import size_text as size_text
from shared.settings.table import SETTINGS

DOT = " · "
LONG_VALUES = 80  # characters


def duration_text(seconds: float) -> str:
    """Seconds as "12 s", "3 min 20 s" or "2 h 5 min"."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def plural(count: int, noun: str) -> str:
    """ "1 picture", "3 pictures"."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def settings_line(settings: Mapping[str, Any], model_name: str, seed: int, width: int, height: int) -> str:
    """What made a picture, without its prompt: "Z-Image Mini · 128 × 128 · 8 steps · seed 42"."""
    parts = [model_name, f"{width} × {height}"]
    if "num_inference_steps" in settings:
        parts.append(plural(settings["num_inference_steps"], "step"))
    parts.append(f"seed {seed}")
    guidance = settings.get("guidance_scale")
    if guidance and isinstance(guidance, (int, float)):  # pictures may carry anything
        parts.append(f"guidance {guidance:g}")
    return DOT.join(part for part in parts if part)


def grid_line(axes: Collection[Sequence[str]], model_name: str, width: int, height: int) -> str:
    """What a grid shows: "Grid: Steps 2, 8 × Seed 1-3 · Z-Image Mini · 600 × 400".

    axes: pairs of a setting's name and its values as they were typed.
    """
    varied = [f"{SETTINGS[name].label} {shortened(typed)}" for name, typed in axes]
    fixed = [] if any(name == "model_type" for name, _ in axes) else [model_name]
    return DOT.join([f"Grid: {' × '.join(varied)}", *filter(None, fixed), f"{width} × {height}"])


def shortened(text: str) -> str:
    """A text of a length that a line has room for."""
    return text if len(text) <= LONG_VALUES else f"{text[: LONG_VALUES - 1].rstrip()}…"
