"""Random choices in a text, drawn with a seed.

    {red|green|blue}        one of these, as likely as each other; they may hold choices again
    {3::red|blue}           red three times as often as blue
    {2$$red|green|blue}     two different ones: "blue, red"
    {red|}                  red or nothing
    __animals/birds__       a line of the file wildcards/animals/birds.txt
    \\{  \\}  \\|  \\__        these characters themselves

Braces without | are plain text, so that a prompt may be JSON.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from shared.errors import UserError
from shared.prompts.wildcards import Wildcards

MAX_DEPTH = 20  # of choices and wildcard files within each other
MAX_DRAWS = 2000  # for one text
MAX_CHARACTERS = 100_000

_TOKEN = re.compile(
    r"\\(?P<escaped>[{}|]|__)"
    r"|(?P<line>(?:^|(?<=\n))\\(?=\\*[#!]))"
    r"|(?P<mark>[{}|])"
    r"|__(?P<wildcard>[^\W_](?:(?:(?!__)[\w\-/. ])*[^\W_])?)__"
)
_COUNT = re.compile(r"\s*(\d{1,3})\$\$")
_WEIGHT = re.compile(r"\s*(\d{1,9}(?:\.\d{1,9})?)::")


@dataclass(frozen=True)
class Wildcard:
    """An entry of a file."""

    name: str


@dataclass(frozen=True)
class Choice:
    """`count` different ones of the options."""

    options: tuple[Template, ...]
    weights: tuple[float, ...]
    count: int = 1


Node = str | Wildcard | Choice
Template = tuple[Node, ...]


@dataclass
class _Group:
    """A brace that is not closed yet; the whole text is one, too."""

    start: int
    options: list[list[Node]] = field(default_factory=lambda: [[]])

    def add(self, *nodes: Node) -> None:
        self.options[-1] += nodes


def parse(text: str) -> Template:
    """The text as pieces that stand and pieces to draw. UserError for a choice that cannot be read."""
    groups, position = [_Group(0)], 0
    for token in _TOKEN.finditer(text):
        groups[-1].add(text[position : token.start()])
        position = token.end()
        if token["wildcard"]:
            groups[-1].add(Wildcard(token["wildcard"]))
        elif token["escaped"]:
            groups[-1].add(token["escaped"])
        elif token["mark"] == "{":
            groups.append(_Group(token.start()))
        elif token["mark"] and len(groups) == 1:
            groups[0].add(token["mark"])
        elif token["mark"] == "|":
            groups[-1].options.append([])
        elif token["mark"] == "}":
            group = groups.pop()
            groups[-1].add(*_closed(group, text[group.start : position]))
        if len(groups) > MAX_DEPTH:
            raise UserError(f"The prompt has more than {MAX_DEPTH} braces within each other: simplify it.")
    groups[-1].add(text[position:])
    while len(groups) > 1:
        group = groups.pop()
        if len(group.options) > 1:
            raise UserError(
                f"The choice '{text[group.start : group.start + 40]}' is not closed: add a }}, or write \\{{ "
                "for a plain brace."
            )
        groups[-1].add("{", *group.options[0])
    return tuple(node for node in groups[0].options[0] if node)


def _closed(group: _Group, text: str) -> Sequence[Node]:
    """What a pair of braces stands for; `text` is all of it."""
    count, first = _number(_COUNT, group.options[0])
    if count is None and len(group.options) == 1:
        return ["{", *group.options[0], "}"]
    weights, options = [], []
    for option in [first, *group.options[1:]]:
        weight, nodes = _number(_WEIGHT, option)
        weights.append(1.0 if weight is None else weight)
        options.append(tuple(node for node in nodes if node))
    wanted = 1 if count is None else int(count)
    if not 1 <= wanted <= sum(weight > 0 for weight in weights):
        raise UserError(
            f"The choice '{text[:40]}' asks for {wanted} of {len(options)}: ask for fewer, or add more."
        )
    return [Choice(tuple(options), tuple(weights), wanted)]


def _number(pattern: re.Pattern[str], option: list[Node]) -> tuple[float | None, list[Node]]:
    """The number before an option, None without one, and the option without it."""
    text = option[0] if option else None
    found = pattern.match(text) if isinstance(text, str) else None
    if found is None:
        return None, option
    return float(found[1]), [found.string[found.end() :], *option[1:]]


def is_random(template: Template) -> bool:
    """Whether anything in it is to be drawn."""
    return any(not isinstance(node, str) for node in template)


def draw(template: Template, seed: str, wildcards: Wildcards) -> str:
    """The text that this seed draws: always the same one, as long as the wildcard files stay the same.

    UserError when a wildcard file is missing or leads back to itself.
    """
    return _Draw(random.Random(seed), wildcards).text(template, ())


def escape(text: str) -> str:
    """The text that stands for exactly `text` when it is expanded."""
    return re.sub(r"[{}|]|__", r"\\\g<0>", re.sub(r"(?m)^(?=\\*[#!])", r"\\", text))


class _Draw:
    def __init__(self, numbers: random.Random, wildcards: Wildcards):
        self._numbers, self._wildcards, self._draws = numbers, wildcards, 0

    def text(self, template: Template, trail: tuple[str, ...]) -> str:
        """trail: the wildcard files that led here."""
        text = "".join(node if isinstance(node, str) else self._drawn(node, trail) for node in template)
        if len(text) > MAX_CHARACTERS:
            raise UserError(f"The prompt grows beyond {MAX_CHARACTERS:,} characters: use fewer wildcards.")
        return text

    def _drawn(self, node: Wildcard | Choice, trail: tuple[str, ...]) -> str:
        self._draws += 1
        if self._draws > MAX_DRAWS:
            raise UserError(f"The prompt draws more than {MAX_DRAWS} times: use fewer choices and wildcards.")
        if isinstance(node, Wildcard):
            return self._entry(node.name, trail)
        left = list(range(len(node.options)))
        taken = []
        for _ in range(node.count):
            taken.append(left.pop(self._index([node.weights[i] for i in left])))
        return ", ".join(self.text(node.options[i], trail) for i in taken)

    def _entry(self, name: str, trail: tuple[str, ...]) -> str:
        way = (*trail, name)
        if name in trail or len(way) > MAX_DEPTH:
            raise UserError(f"The wildcard files lead on and on ({' > '.join(way)}): mend one of them.")
        entries = self._wildcards.entries(name)
        return self.text(parse(entries[self._index([1.0] * len(entries))]), way)

    def _index(self, weights: Sequence[float]) -> int:
        """Of Random's methods only random() is promised to stay the same in all versions of Python."""
        left = self._numbers.random() * sum(weights)
        for i, weight in enumerate(weights):
            left -= weight
            if left < 0:
                return i
        return max(i for i, weight in enumerate(weights) if weight > 0)  # rounding
