"""What the unified sampler offers draws on the shipped Mini TwinFlow what its prompts say."""

import math

import pytest

from benchmarks.sampler import ENOUGH, OPTIONS, configurations, everything_right
from models.z_image.unified_sampler import STYLES
from tests.support import mini
from training.grammar import held_out

SCENES = held_out(12)  # of fewer, one that fails would be more than the tenth that may


def score(steps: int, **config: object) -> float:
    _, pipe = mini.load("z_image_mini_twinflow")
    found = everything_right(pipe, SCENES, steps, config)
    assert found is not None
    return found


@pytest.mark.slow
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("steps", [1, 3, 4])
def test_every_order_draws_as_well_as_order_1(steps: int, style: str) -> None:
    first, *more = (score(steps, sampling_style=style, sampling_order=order) for order in (1, 2, 3))
    assert first >= ENOUGH and all(one >= ENOUGH * first for one in more)


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_draws_as_well_as_none(name: str) -> None:
    usual = score(4, sampling_style="any")
    for value in OPTIONS[name][1]:
        assert score(4, sampling_style="any", **{name: value}) >= ENOUGH * usual


def test_options_are_tried_where_they_act() -> None:
    """One noise level: neither fresh noise nor a step before it; four: everything."""
    assert configurations(2, "few", 2) == [{"sampling_style": "few", "sampling_order": 2}]
    tried = configurations(4, "any", 1)
    assert len(tried) == math.prod(1 + len(values) for _, values in OPTIONS.values())
    assert set(tried[-1]) == {"sampling_style", "sampling_order", *OPTIONS}
