"""The world the Mini models know: flat pictures of one to three shapes, and the sentences that describe them.

A `Scene` is what a sentence fixes; sizes, places and edges vary around it with every picture (see `render`).
Scenes whose combination of colours, shapes and layout falls in the held-out tenth never appear in training;
the adherence score uses only those.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass

SHAPES = ("circle", "square", "triangle", "star", "heart")
COLOURS = {
    "red": (220, 38, 38),
    "green": (22, 163, 74),
    "blue": (37, 99, 235),
    "yellow": (250, 204, 21),
    "purple": (126, 34, 206),
    "orange": (249, 115, 22),
    "black": (17, 17, 17),
    "white": (250, 250, 250),
}
SIZE_WORDS = {"small": ("small", "little", "tiny"), "": ("",), "large": ("large", "big", "huge")}
#: radius as a share of the image's shorter side, by number of objects
RADII = {
    1: {"small": 0.15, "": 0.22, "large": 0.30},
    2: {"small": 0.13, "": 0.185, "large": 0.225},
    3: {"": 0.135},
}
POSITIONS = {  # place -> centre, for one object or two named places
    "centre": (0.5, 0.5),
    "left": (0.26, 0.5),
    "right": (0.74, 0.5),
    "top": (0.5, 0.26),
    "bottom": (0.5, 0.74),
    "top left": (0.26, 0.26),
    "top right": (0.74, 0.26),
    "bottom left": (0.26, 0.74),
    "bottom right": (0.74, 0.74),
}
PLACE_WORDS = {
    "centre": ("in the centre", "in the center", "in the middle"),
    "left": ("on the left", "on the left side"),
    "right": ("on the right", "on the right side"),
    "top": ("at the top",),
    "bottom": ("at the bottom",),
}
CORNER_WORDS = ("in the {} corner", "in the {}", "at the {}")
RELATION_WORDS = {  # relation of the first object to the second -> (words, place of the first, of the second)
    "above": (("above", "over", "on top of"), "top", "bottom"),
    "below": (("below", "under", "beneath"), "bottom", "top"),
    "left of": (("to the left of", "left of"), "left", "right"),
    "right of": (("to the right of", "right of"), "right", "left"),
}
LINES = {  # three objects
    "row": (("in a row", "side by side", "from left to right"), ((1 / 6, 0.5), (0.5, 0.5), (5 / 6, 0.5))),
    "column": (("in a column", "from top to bottom", "stacked"), ((0.5, 1 / 6), (0.5, 0.5), (0.5, 5 / 6))),
}
BACKGROUNDS = (
    "on a {} background",
    "against a {} background",
    "with a {} background",
    "on {}",
    ", {} background",
)
EXTRAS = (  # what people add to any prompt; here it changes nothing
    "flat illustration",
    "simple shapes",
    "clean edges",
    "minimal",
    "high quality",
    "vector art",
    "bright colours",
    "highly detailed",
    "masterpiece",
    "4k",
    "sharp focus",
    "geometric",
    "poster",
    "paper cut-out",
)
OPENINGS = ("", "", "", "a picture of ", "an image of ", "a drawing of ")


@dataclass(frozen=True)
class Thing:
    """One object: its centre (x, y) and radius are shares of the image's width, height and shorter side."""

    shape: str
    colour: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Scene:
    caption: str
    background: str
    things: tuple[Thing, ...]
    layout: str
    names_background: bool  # a caption may leave the background open; then it is not scored

    @property
    def held_out(self) -> bool:
        parts = [self.layout, self.background, *(f"{t.colour} {t.shape}" for t in self.things)]
        return hashlib.sha256("|".join(parts).encode()).digest()[0] % 10 == 0


def place_words(place: str, rng: random.Random) -> str:
    return rng.choice(PLACE_WORDS[place]) if place in PLACE_WORDS else rng.choice(CORNER_WORDS).format(place)


def noun(size: str, colour: str, shape: str, rng: random.Random) -> str:
    words = " ".join(w for w in (rng.choice(SIZE_WORDS[size]), colour, shape) if w)
    article = rng.choice(("", "one ", "the ", *(("an " if words[0] in "aeiou" else "a ",) * 7)))
    return article + words


def _one(
    rng: random.Random, look: list[tuple[str, str]]
) -> tuple[str, str, list[tuple[float, float]], list[str]]:
    place = rng.choice(["", "", "", *POSITIONS])
    size = rng.choice(["", "", "small", "large"] if place in ("", "centre") else ["", "", "small"])
    words = noun(size, *look[0], rng) + (" " + place_words(place, rng) if place else "")
    return words, place or "anywhere", [POSITIONS[place or "centre"]], [size]


def _two(
    rng: random.Random, look: list[tuple[str, str]]
) -> tuple[str, str, list[tuple[float, float]], list[str]]:
    sizes = [rng.choice(["", "", "", "small", "large"]) for _ in range(2)]
    a, b = (noun(s, *item, rng) for s, item in zip(sizes, look, strict=True))
    form = rng.random()
    if form < 0.72:
        relation = rng.choice(list(RELATION_WORDS))
        words, first, second = RELATION_WORDS[relation]
        if form < 0.60:
            text = f"{a} {rng.choice(words)} {b}"
        else:
            opposite = {
                "above": "above it",
                "below": "below it",
                "left of": "to its left",
                "right of": "to its right",
            }
            text = f"{b} with {a} {opposite[relation]}"
        return text, relation, [POSITIONS[first], POSITIONS[second]], sizes
    if form < 0.86:
        first, second = rng.choice(
            (("left", "right"), ("right", "left"), ("top", "bottom"), ("bottom", "top"))
        )
    else:
        corners = ("top left", "top right", "bottom left", "bottom right")
        first, second = rng.sample(corners, 2)
    text = f"{a} {place_words(first, rng)} and {b} {place_words(second, rng)}"
    return text, f"{first}, {second}", [POSITIONS[first], POSITIONS[second]], sizes


def _three(
    rng: random.Random, look: list[tuple[str, str]]
) -> tuple[str, str, list[tuple[float, float]], list[str]]:
    line = rng.choice(list(LINES))
    words, centres = LINES[line]
    a, b, c = (noun("", *item, rng) for item in look)
    return f"{a}, {b} and {c} {rng.choice(words)}", line, list(centres), ["", "", ""]


LAYOUTS = {1: _one, 2: _two, 3: _three}


def sample(rng: random.Random, count: int | None = None) -> Scene:
    """A random scene with its caption; `count` objects, or mostly one or two."""
    count = count or rng.choices((1, 2, 3), (0.42, 0.48, 0.10))[0]
    background, *colours = rng.sample(list(COLOURS), count + 1)
    # stars and hearts are the hard ones to draw: show them more often
    look = [(colour, rng.choices(SHAPES, (1, 1, 1, 1.5, 1.3))[0]) for colour in colours]
    text, layout, centres, sizes = LAYOUTS[count](rng, look)
    things = tuple(
        Thing(shape, colour, x, y, RADII[count][size])
        for (colour, shape), (x, y), size in zip(look, centres, sizes, strict=True)
    )
    named = rng.random() > 0.06
    return Scene(phrase(text, background if named else "", rng), background, things, layout, named)


def phrase(text: str, background: str, rng: random.Random) -> str:
    """The whole sentence: opening, objects, background, in one of several orders and spellings."""
    text = rng.choice(OPENINGS) + text
    if background:
        words = rng.choice(BACKGROUNDS).format(background).replace("a orange", "an orange")
        if words.startswith(","):
            text += words
        else:
            text = f"{words}, {text}" if rng.random() < 0.1 else f"{text} {words}"
    if rng.random() < 0.12:
        text = ", ".join((text, *rng.sample(EXTRAS, rng.choice((1, 2, 4, 6, 9)))))
    if rng.random() < 0.15:
        text = text[0].upper() + text[1:]
    return text + ("." if rng.random() < 0.1 else "")


def held_out(count: int, seed: int = 0) -> list[Scene]:
    """`count` scenes that training never shows, background named."""
    rng = random.Random(seed)
    scenes: list[Scene] = []
    while len(scenes) < count:
        scene = sample(rng)
        if scene.held_out and scene.names_background:
            scenes.append(scene)
    return scenes
