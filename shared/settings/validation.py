"""Checking settings against their table. Nothing is clamped: a value that cannot be used is reported, all of
them at once.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from shared.errors import UserError
from shared.settings.aliases import hints, unknown
from shared.settings.messages import show
from shared.settings.parsing import parse_resolution
from shared.settings.table import MAX_SEED, SETTINGS, Setting, SettingsError, applies
from shared.settings.wan2gp import WAN2GP_SETTINGS, in_our_words, why_idle

MAX_ENTRY = 2000  # characters of one text of a list


@dataclass(frozen=True)
class Validated:
    """What `validate` found: the complete settings, what does nothing here and why, what was substituted."""

    settings: dict[str, Any]
    ignored: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def validate(
    values: Mapping[str, Any], defaults: Mapping[str, Any], capabilities: Mapping[str, Any]
) -> Validated:
    """Check `values` and complete them with the model's `defaults`, then with the table's; null = not given.

    `capabilities` is what the handler's query_model_def returns. Raises SettingsError with every problem.
    """
    if not isinstance(values, Mapping):
        raise SettingsError([f"Settings came as {show(values)}; expected one object of names and values"])
    named = {str(name): value for name, value in values.items() if value is not None}
    given = in_our_words(named, bool(capabilities.get("unified")))
    settings: dict[str, Any] = {}
    problems: list[str] = []
    for setting in SETTINGS.values():
        if not applies(setting, capabilities):
            continue
        default = _first(defaults.get(setting.name), setting.default)
        if setting.more_choices:
            more = tuple(capabilities.get(setting.more_choices, ()))
            setting = replace(setting, choices=(*setting.choices, *more))
        try:
            settings[setting.name] = _convert(setting, given.get(setting.name, default), default)
        except _Unusable as error:
            problems.append(str(error))
    problems += _resolution_problems(settings, capabilities) + _batch_problems(settings)
    if problems:
        raise SettingsError([*problems, *hints(given, {*SETTINGS, *WAN2GP_SETTINGS})])
    return Validated(settings, _ignored(given, capabilities))


def check_argument(setting: Setting, value: Any) -> None:
    """UserError when this is no value of the setting."""
    try:
        _convert(setting, value, setting.default)
    except _Unusable as error:
        raise UserError(f"{error}.") from None


# ---------------------------------------------------------------- one value


class _Unusable(Exception):
    """One value cannot be used; the text is the whole sentence."""


def _convert(setting: Setting, value: Any, example: Any) -> Any:
    if setting.numbers:
        value = _written_out(value)
    if setting.pairs and isinstance(value, dict):
        value = ", ".join(f"{name}={json.dumps(x, default=str)}" for name, x in value.items())
    try:
        converted = _CONVERTERS[setting.kind](value)
    except (TypeError, ValueError, OverflowError):
        raise _Unusable(_sentence(setting, value, example)) from None
    _CHECKERS.get(setting.kind, _check_number)(setting, converted, example)
    return converted


def _written_out(value: Any) -> Any:
    """Numbers as the text that a user would type; anything else as it is."""
    if isinstance(value, (list, tuple)) and all(type(x) in (int, float) for x in value):
        return ",".join(map(str, value))
    return str(value) if type(value) in (int, float) else value


def _to_text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def _to_number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise TypeError
    number = float(value)
    if not math.isfinite(number):
        raise ValueError
    return number


def _to_integer(value: Any) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    number = _to_number(value)
    if not number.is_integer():
        raise ValueError
    return int(number)


def _to_flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError
    return value


def _to_texts(value: Any) -> list[str]:
    if not isinstance(value, (list, tuple)) or not all(isinstance(x, str) for x in value):
        raise TypeError
    return [text for text in value if text.strip()]  # a file's name may begin with a blank


_CONVERTERS: dict[type, Callable[[Any], Any]] = {
    str: _to_text,
    int: _to_integer,
    float: _to_number,
    bool: _to_flag,
    list: _to_texts,
}
_KIND_WORDS = {
    str: "a text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    list: "a list of texts",
}


def _check_number(setting: Setting, value: Any, example: Any) -> None:
    low = -math.inf if setting.minimum is None else setting.minimum
    high = math.inf if setting.maximum is None else setting.maximum
    if not low <= value <= high:
        raise _Unusable(_sentence(setting, value, example))


def _check_text(setting: Setting, value: str, example: Any) -> None:
    if setting.choices and value not in setting.choices:
        raise _Unusable(_sentence(setting, value, example))
    problem = ""
    if setting.minimum and not value.strip():
        problem = f'is empty; expected some text, fill in "{setting.label}"'
    elif setting.maximum is not None and len(value) > setting.maximum:
        problem = f"is {len(value):,} characters long; expected at most {setting.maximum:,.0f}, shorten it"
    elif any("\ud800" <= character <= "\udfff" for character in value):
        problem = "holds half a character (a lone surrogate); expected valid text, type or paste it again"
    if problem:
        raise _Unusable(f"{setting.name} {problem}")


def _check_texts(setting: Setting, value: list[str], example: Any) -> None:
    if setting.maximum is not None and len(value) > setting.maximum:
        raise _Unusable(
            f"{setting.name} has {len(value):,} entries; expected at most {setting.maximum:,.0f}, shorten it"
        )
    for text in value:
        _check_text(replace(setting, maximum=MAX_ENTRY), text, example)


_CHECKERS: dict[type, Callable[[Setting, Any, Any], None]] = {str: _check_text, list: _check_texts}


def _sentence(setting: Setting, value: Any, example: Any) -> str:
    """What came, what was expected, what to do."""
    came = f"{setting.name} came as {show(value)}; expected "
    if setting.choices:
        return f"{came}one of {', '.join(filter(None, setting.choices))}"
    expected = _KIND_WORDS[setting.kind]
    if setting.kind in (int, float) and setting.minimum is not None and setting.maximum is not None:
        expected += f" from {setting.minimum} to {setting.maximum}"
    return f"{came}{expected}" + (f", for example {show(example)}" if example not in ("", [], value) else "")


# ---------------------------------------------------------------- values together


def _resolution_problems(settings: dict[str, Any], capabilities: Mapping[str, Any]) -> list[str]:
    """Write the resolution in its one spelling, or say what is wrong with it."""
    if "resolution" not in settings:
        return []
    try:
        width, height = parse_resolution(settings["resolution"])
    except SettingsError as error:
        return error.problems
    settings["resolution"] = f"{width}x{height}"
    multiple = int(capabilities.get("size_multiple", 16))
    low, high = int(capabilities.get("min_size", 64)), int(capabilities.get("max_size", 8192))
    if all(low <= side <= high and side % multiple == 0 for side in (width, height)):
        return []
    valid = [_nearest_side(side, multiple, low, high) for side in (width, height)]
    return [
        f'resolution came as "{width}x{height}"; expected multiples of {multiple} from {low} to {high} '
        f'pixels, the nearest is "{valid[0]}x{valid[1]}"'
    ]


def _batch_problems(settings: Mapping[str, Any]) -> list[str]:
    """Image k uses seed + k, and each of these must itself be a valid seed."""
    seed, images = settings.get("seed", -1), settings.get("batch_size", 1)
    highest = MAX_SEED - images + 1
    if seed <= highest:
        return []
    return [f"seed came as {seed}; expected at most {highest} for {images} images, lower it"]


def _nearest_side(side: int, multiple: int, low: int, high: int) -> int:
    lowest, highest = -(-low // multiple), high // multiple
    return min(max(round(side / multiple), lowest), highest) * multiple


def _ignored(given: Mapping[str, Any], capabilities: Mapping[str, Any]) -> dict[str, str]:
    asked = [name for name, value in given.items() if not _asks_nothing(name, value)]
    reasons = {name: _why_ignored(name, capabilities) for name in asked}
    return {name: reason for name, reason in reasons.items() if reason}


def _asks_nothing(name: str, value: Any) -> bool:
    """Wan2GP's files have every setting of every model, most of them empty or off."""
    off = (0, False, "0") if name in WAN2GP_SETTINGS and name not in SETTINGS else ()
    return value in ("", [], {}, *off)


def _why_ignored(name: str, capabilities: Mapping[str, Any]) -> str:
    """Why this name does nothing; "" when it acts."""
    if name in SETTINGS:
        return "" if applies(SETTINGS[name], capabilities) else "does not act on this model"
    if reason := why_idle(name):
        return reason
    return unknown(name)


def _first(value: Any, otherwise: Any) -> Any:
    return otherwise if value is None else value
