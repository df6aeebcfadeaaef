"""The built-in models draw what the prompt says: their adherence score on a small set, with a floor.

docs/mini.md has the scores over 256 prompts; the floors here leave room for the spread of a small sample (one
picture of 24 is 4 points).
"""

import pytest

from training.sampling import CardPainter
from training.score import Score, score

FLOORS = {"z_image_mini": (24, {}), "z_image_mini_base": (16, {"num_inference_steps": 16})}

STEERED = {"num_inference_steps": 10, "resolution": "192x192"}


@pytest.mark.slow
@pytest.mark.parametrize("card", FLOORS)
def test_adherence(card: str) -> None:
    count, overrides = FLOORS[card]
    result: Score = score(CardPainter(card, overrides), count, seed=11)
    assert result.background >= 0.95, result
    assert result.colour_and_place >= 0.9, result
    assert result.shape >= 0.85, result


@pytest.mark.slow
def test_wider_and_larger_pictures_also_follow_the_prompt() -> None:
    result = score(CardPainter("z_image_mini", {"resolution": "192x128"}), 16, seed=12)
    assert result.background >= 0.9 and result.colour_and_place >= 0.8, result


@pytest.mark.slow
def test_guidance_raises_adherence() -> None:
    """From 0 to 4 on the Base, at a size where it needs it: 31 % of the scenes are right without."""
    plain, guided = (
        score(CardPainter("z_image_mini_base", STEERED | {"guidance_scale": scale}), 16, 3)
        for scale in (0.0, 4.0)
    )
    assert guided.everything >= plain.everything + 0.25, (plain, guided)
