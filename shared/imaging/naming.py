"""What a picture's file is called: a pattern with fields, which may name subfolders, filled in and made safe.

"{date}/{time}_{prompt(40)}" may become "2026-11-21/14h03m22s_a_red_circle". Whatever the fields hold, the
result is a relative path that stays in the folder and that every system can write.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import PurePosixPath

from shared.files.names import without_device

TEMPLATE = "{date}/{date}-{time}_seed{seed}_{prompt}"

_MAX_PROMPT_BYTES = 80
_MAX_PART_BYTES = 180  # with number and extension it stays below every system's 255
_MAX_PARTS = 6
_MAX_TEMPLATE = 300
_FIELD = re.compile(r"\{(\w+)(?:\((\d{1,3})\))?\}")
_NOT_IN_NAMES = set('<>:"|?*')


@dataclass(frozen=True)
class Facts:
    """What the fields of a pattern stand for."""

    when: datetime
    seed: int
    prompt: str
    model: str = ""
    index: int = 0
    steps: int = 0
    resolution: str = ""


FIELDS: dict[str, Callable[[Facts, int], str]] = {
    "date": lambda facts, _: f"{facts.when:%Y-%m-%d}",
    "year": lambda facts, _: f"{facts.when:%Y}",
    "month": lambda facts, _: f"{facts.when:%m}",
    "day": lambda facts, _: f"{facts.when:%d}",
    "time": lambda facts, _: f"{facts.when:%Hh%Mm%Ss}",
    "seed": lambda facts, _: str(facts.seed),
    "prompt": lambda facts, length: words(facts.prompt, length or _MAX_PROMPT_BYTES),
    "model": lambda facts, _: words(facts.model),
    "index": lambda facts, _: str(facts.index + 1),
    "steps": lambda facts, _: str(facts.steps),
    "resolution": lambda facts, _: words(facts.resolution),
}


def template_problem(template: str) -> str:
    """What is wrong with a pattern; "" when nothing is."""
    if not template.strip():
        return "it is empty"
    if len(template) > _MAX_TEMPLATE:
        return f"it is longer than {_MAX_TEMPLATE} characters"
    unknown = [name for name, _ in _FIELD.findall(template) if name not in FIELDS]
    if unknown:
        return f"there is no {{{unknown[0]}}}; there are {', '.join(f'{{{name}}}' for name in FIELDS)}"
    return "a brace has no partner" if set("{}") & set(_FIELD.sub("", template)) else ""


def output_path(template: str, facts: Facts) -> PurePosixPath:
    """The relative path of a picture, without its extension."""
    filled = _FIELD.sub(lambda field: FIELDS[field[1]](facts, int(field[2] or 0)), template)
    parts = [part for part in map(_safe, re.split(r"[/\\]", filled)) if part]
    return PurePosixPath(*(parts[-_MAX_PARTS:] or [f"seed{facts.seed}"]))


def words(text: str, length: int = _MAX_PART_BYTES) -> str:
    """At most `length` bytes of a text as part of a file name.

    Letters and digits of every script stay, anything else (emoji, signs, separators) becomes one underscore.
    """
    letters = unicodedata.normalize("NFC", text)
    kept = "".join(letter if unicodedata.category(letter)[0] in "LNM" else " " for letter in letters)
    return "_".join(kept.split()).encode()[:length].decode(errors="ignore").strip("_")


def _safe(part: str) -> str:
    """One part of a path as all systems take it; "" when nothing is left of it."""
    kept = "".join(
        "_" if letter in _NOT_IN_NAMES or unicodedata.category(letter)[0] == "C" else letter
        for letter in part
    )
    kept = kept.encode(errors="ignore")[:_MAX_PART_BYTES].decode(errors="ignore").strip("_ .")
    return without_device(kept)
