"""The strengths of LoRAs as users write them: one for each, over the steps and phases. No torch.

    text  := token (blanks token)*        token i is LoRA i's; missing ones are 1, surplus ones are ignored
    token := phase (";" phase)*           one schedule for each phase of the guidance
    phase := number ("," number)*         spread evenly over the phase's steps

"#" begins a comment that ends with the line. One "|" may part the tokens of accelerator LoRAs (before it)
from the user's own. This is Wan2GP's grammar, less picky about blanks; its texts mean the same here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from shared.errors import UserError
from shared.settings.messages import printable

NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
COMMENT = re.compile(r"#[^\n]*")
TOKEN = re.compile(r"[^\s|]+|\|")
CONTEXT = 12  # characters of the line shown on either side of a mistake

Phases = tuple[tuple[float, ...], ...]  # numbers to spread over the steps, for each phase


@dataclass(frozen=True)
class Multipliers:
    """The strengths of `len(tokens)` LoRAs.

    boundary: tokens before "|", None without one. surplus: tokens without a LoRA.
    """

    tokens: tuple[Phases, ...]
    boundary: int | None = None
    surplus: int = 0

    def at(self, step: int, steps: int, switches: Sequence[int] = ()) -> tuple[float, ...]:
        """The strength of each LoRA at `step` of 0..steps-1.

        switches: the steps at which the phases 2, 3, ... begin. Of n numbers over s steps it is the one at
        int(step * n / s). A phase without numbers of its own repeats the last one's.
        """
        phase = sum(step >= switch for switch in switches)
        bounds = (0, *switches, steps)
        start, stop = bounds[phase], bounds[phase + 1]
        return tuple(
            _spread(phases[min(phase, len(phases) - 1)], step - start, stop - start) for phases in self.tokens
        )

    @property
    def constant(self) -> bool:
        """Whether no strength changes on the way."""
        return all(len(set(sum(phases, ()))) == 1 for phases in self.tokens)


def parse(text: str, count: int, phases: int = 1) -> Multipliers:
    """The strengths of `count` LoRAs for a guidance of `phases` phases.

    UserError that shows the place of a mistake.
    """
    boundary = None
    tokens: list[Phases] = []
    for match in TOKEN.finditer(_without_comments(text)):
        if match[0] != "|":
            tokens.append(_token(text, match, phases))
        elif boundary is None:
            boundary = len(tokens)
        else:
            raise _mistake(text, match.start(), 'a second "|"; expected one at most')
    missing: Phases = ((1.0,),)
    padded = (*tokens[:count], *([missing] * (count - len(tokens))))
    return Multipliers(padded, boundary, max(0, len(tokens) - count))


def words(text: str) -> list[str]:
    """The tokens of a text as they stand there, right or wrong, in the order of their LoRAs."""
    return [match[0] for match in TOKEN.finditer(_without_comments(text)) if match[0] != "|"]


def merge_profile(user: str, accelerator: str) -> str:
    """The text with an accelerator profile's strengths before "|" and the user's own after it."""
    own, profile = split_profile(user)[1], accelerator.strip()
    if not profile:
        return own
    end = "\n" if "#" in profile.rpartition("\n")[2] else ""  # a comment must not swallow the "|"
    return f"{profile}{end}|{own}"


def split_profile(text: str) -> tuple[str, str]:
    """(what stands before "|", what stands after it); without one, everything is the user's own."""
    place = _without_comments(text).find("|")
    return (text[:place].strip(), text[place + 1 :].strip()) if place >= 0 else ("", text.strip())


def _without_comments(text: str) -> str:
    """The text with blanks where comments are, so that places stay the same."""
    return COMMENT.sub(lambda match: " " * len(match[0]), text)


def _token(text: str, match: re.Match[str], phases: int) -> Phases:
    parts = match[0].split(";")
    if len(parts) > phases:
        place = match.start() + len(";".join(parts[:phases]))
        shown = printable(match[0], CONTEXT)
        words = f'"{shown}" has {len(parts)} phases; expected at most {phases} for this model'
        raise _mistake(text, place, words)
    found, place = [], match.start()
    for part in parts:
        numbers = []
        for number in part.split(","):
            numbers.append(_number(text, number, place))
            place += len(number) + 1
        found.append(tuple(numbers))
    return tuple(found)


def _number(text: str, number: str, place: int) -> float:
    if not number:
        raise _mistake(text, place, "a number is missing")
    value = float(number) if NUMBER.fullmatch(number) else math.nan
    if not math.isfinite(value):
        shown = printable(number, CONTEXT)
        raise _mistake(text, place, f'"{shown}" is not a number; expected one such as 0.8')
    return value


def _mistake(text: str, place: int, words: str) -> UserError:
    """Line and column, and the line's text around the place with a caret before it."""
    start = text.rfind("\n", 0, place) + 1
    end = text.find("\n", place)
    line = text[start : len(text) if end < 0 else end].rstrip("\r")
    column = place - start
    before, after = line[max(0, column - CONTEXT) : column], line[column : column + CONTEXT]
    shown = f"{printable(before, 2 * CONTEXT)}^{printable(after, 2 * CONTEXT)}"
    where = f"line {text.count(chr(10), 0, place) + 1}, column {column + 1}"
    return UserError(f"LoRA multipliers, {where}: {words}, at the ^ in: {shown}")


def _spread(numbers: tuple[float, ...], step: int, steps: int) -> float:
    return numbers[min(len(numbers) - 1, step * len(numbers) // max(1, steps))]
