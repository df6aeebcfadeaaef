"""How sentences to the user name things: a value that came, the known name that was meant."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterable
from typing import Any

_UNITS = (("GB", 1e9), ("MB", 1e6), ("kB", 1e3))
_CONTAINER_WORDS: dict[type, str] = {dict: "an object", list: "a list", tuple: "a list"}


def show(value: Any) -> str:
    """The value as JSON users know it, printable and short enough for a sentence."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, str):
        shown = json.dumps(value if len(value) <= 60 else value[:57] + "…", ensure_ascii=False)
        return "".join(map(_shown, shown))
    if isinstance(value, int) and abs(value) >= 10**40:  # Python refuses to print thousands of digits
        return f"a number of about {int(value.bit_length() * math.log10(2)) + 1:,} digits"
    if isinstance(value, (int, float)):
        return str(value)
    return _CONTAINER_WORDS.get(type(value), f"a value of type {type(value).__name__}")


def printable(text: str, limit: int = 60) -> str:
    """Text that a file brought along, as a part of one line that may be shown anywhere: at most `limit`
    characters, and those that control a terminal or the direction of writing, break the line, or are halves
    of others spelled as escapes.
    """
    text = text if len(text) <= limit else text[: limit - 1] + "…"
    shown = text if text.isprintable() else "".join(map(_shown, text))
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"


def _shown(character: str) -> str:
    return character if character.isprintable() else character.encode("unicode_escape").decode()


def size_text(count: float) -> str:
    """Bytes as "20.5 GB"."""
    for unit, size in _UNITS:
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} bytes"


def nearest(name: str, known: Iterable[str], alike: float = 0) -> str:
    """The name of `known` most like `name`, whatever its case; "" when none is alike.

    alike: how much, from 0 to 1, for names of which one may not stand for another because it holds it.
    """
    by_lower = {candidate.lower(): candidate for candidate in known}
    holding = [candidate for candidate in by_lower if len(name) > 2 and name.lower() in candidate]
    close = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=alike or 0.5)
    found = close if alike else holding or close
    return by_lower[found[0]] if found else ""
