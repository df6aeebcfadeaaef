"""Settings that are texts with a form of their own: what their parts are."""

from __future__ import annotations

import re

from shared.settings.messages import show
from shared.settings.table import SettingsError

_FLAGS = {"true": True, "false": False}


def parse_resolution(text: str) -> tuple[int, int]:
    """(width, height) in pixels of "WxH"; raises SettingsError when the text has another form."""
    match = re.fullmatch(r"\s*(\d{1,9})\s*[xX×*]\s*(\d{1,9})\s*", text)
    if match is None:
        raise SettingsError(
            [f'resolution came as {show(text)}; expected width x height in pixels, for example "1024x1024"']
        )
    return int(match[1]), int(match[2])


def parse_parameters(text: str) -> dict[str, int | float | bool]:
    """The pairs of a text such as "low=50, invert=true"; SettingsError when it has another form."""
    values: dict[str, int | float | bool] = {}
    for pair in filter(None, (part.strip() for part in text.split(","))):
        match = re.fullmatch(r"(\w+)\s*=\s*(true|false|[-+]?\d{1,9}(\.\d{1,9})?)", pair, re.IGNORECASE)
        if match is None:
            raise SettingsError(
                [f'control_parameters has {show(pair)}; expected pairs such as "low=50, high=150"']
            )
        number = float if match[3] else int
        values[match[1]] = _FLAGS[flag] if (flag := match[2].lower()) in _FLAGS else number(flag)
    return values


def parse_outpaint(text: str, width: int, height: int) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) in pixels, of a text such as "0,0,64,0" or "25%,0,25%,0" for a picture of
    width x height; SettingsError when it has another form.
    """
    parts = re.findall(r"\s*(\d{1,5})\s*(%?)\s*(?:,|$)", text)
    if not text.strip():
        return 0, 0, 0, 0
    if len(parts) != 4 or text.count(",") != 3 or not re.fullmatch(r"[\d\s,%]+", text):
        raise SettingsError(
            [
                f"outpaint came as {show(text)}; expected how far to go on to the left, top, right and "
                'bottom, in pixels or percent, for example "0,0,64,0" or "25%,0,25%,0"'
            ]
        )
    sides = (width, height, width, height)
    left, top, right, bottom = (
        round(side * int(number) / 100) if percent else int(number)
        for (number, percent), side in zip(parts, sides, strict=True)
    )
    return left, top, right, bottom
