"""Prompts to begin with. The Mini models know a small world of shapes; the others take any description."""

from __future__ import annotations

from shared.engine.catalog import ModelInfo

MINI = (
    "a red circle above a blue square on a yellow background",
    "a large green star on a white background",
    "a small purple heart in the top left corner on an orange background",
    "a black triangle to the left of a pink circle on a gray background",
    "a small yellow moon on a blue background",
)
ANY = (
    "a lighthouse on a cliff at dawn, long exposure of the sea, pale light",
    "portrait of an old fisherman, weathered face, window light, 85 mm photograph",
    "a paper theatre of a forest with foxes, layered cut paper, soft shadows",
    "a red tram on a rainy street at night, reflections, film photograph",
    "a poster of a mountain hut with the words 'OPEN ALL WINTER'",
)


def examples_for(model: ModelInfo) -> tuple[str, ...]:
    """Five prompts that suit the model."""
    return MINI if "mini" in model.id else ANY
