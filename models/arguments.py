"""The models' arguments that are settings: their defaults and ranges stand in the settings' table alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from shared.settings.table import SETTINGS, Setting
from shared.settings.validation import check_argument

#: argument -> the setting that it is, where the names differ
SETTING_OF = {
    "num_images_per_prompt": "batch_size",
    "control_context_scale": "control_net_weight",
    "sampling_steps": "num_inference_steps",
}
#: arguments from 0 to 1 whose settings are in percent
SHARES = ("seed_variety_share", "seed_variety_until", "control_start", "control_end")


def setting_of(argument: str) -> Setting:
    """The setting under the argument's name and in its unit."""
    setting = replace(SETTINGS[SETTING_OF.get(argument, argument)], name=argument)
    if argument not in SHARES:
        return setting
    low, high, default = (_of_percent(x) for x in (setting.minimum, setting.maximum, setting.default))
    return replace(setting, minimum=low, maximum=high, default=float(default))


def _of_percent(value: Any) -> float:
    share = value / 100
    return int(share) if share.is_integer() else share


def default(argument: str) -> float:
    value: Any = setting_of(argument).default
    return value


def check(**arguments: float | None) -> None:
    """UserError for a number outside its setting's range; None is not checked."""
    for name, value in arguments.items():
        if value is not None:
            check_argument(setting_of(name), value)
