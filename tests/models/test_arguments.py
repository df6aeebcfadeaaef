"""The pipeline's numbers are the settings table's: their ranges, and their defaults but for a model's own."""

from __future__ import annotations

import inspect

import pytest

from models.z_image.control import ControlSchedule
from models.z_image.nag import Nag
from models.z_image.pipeline_z_image import ZImagePipeline
from models.z_image.sampling import Guidance
from models.z_image.seed_variety import SeedVariety
from shared.errors import UserError
from shared.settings.table import SETTINGS

#: argument -> (its setting, what takes it, under which name there, units of the setting in one of its own)
TAKEN = {
    "cfg_normalization": ("cfg_normalization", Guidance, "normalization", 1),
    "cfg_truncation": ("cfg_truncation", Guidance, "truncation", 1),
    "NAG_scale": ("NAG_scale", Nag, "scale", 1),
    "NAG_tau": ("NAG_tau", Nag, "tau", 1),
    "NAG_alpha": ("NAG_alpha", Nag, "alpha", 1),
    "seed_variety": ("seed_variety", SeedVariety, "strength", 1),
    "seed_variety_share": ("seed_variety_share", SeedVariety, "share", 100),
    "seed_variety_until": ("seed_variety_until", SeedVariety, "until", 100),
    "control_context_scale": ("control_net_weight", ControlSchedule, "scale", 1),
    "control_start": ("control_start", ControlSchedule, "start", 100),
    "control_end": ("control_end", ControlSchedule, "end", 100),
}


@pytest.mark.parametrize("argument", TAKEN)
def test_the_range_of_an_argument_is_its_settings(argument: str) -> None:
    name, taker, field, units = TAKEN[argument]
    low, high = SETTINGS[name].minimum / units, SETTINGS[name].maximum / units
    for inside in (low, high):
        assert getattr(taker(**{field: inside}), field) == inside
    for outside in (low - 0.01, high + 0.01):
        words = f"{argument} came as .*; expected a number from {low:g} to {high:g}"
        with pytest.raises(UserError, match=words):
            taker(**{field: outside})


@pytest.mark.parametrize("argument", TAKEN)
def test_the_default_of_an_argument_is_its_settings(argument: str) -> None:
    name, taker, field, units = TAKEN[argument]
    expected = SETTINGS[name].default / units
    assert getattr(taker(), field) == expected
    parameter = inspect.signature(ZImagePipeline.__call__).parameters[argument]
    usual = argument == "control_context_scale"  # a model has its own
    assert parameter.default == (None if usual else expected)
