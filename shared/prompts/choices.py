"""Random choices in a text, drawn with a seed.

    {red|green|blue}        one of these, as likely as each other; they may hold choices again
    {3::red|blue}           red three times as often as blue
    {2$$red|green|blue}     two different ones: "blue, red"
    {1-2$$ and $$red|blue}  one or two, "red and blue"; {-2$$…} and {1-$$…} leave a bound open
    {2$$__colours__}        two different entries
    {red|}                  red or nothing
    __animals/birds__       a line of the file wildcards/animals/birds.txt
    __animals/*__           a line of any of these files
    ${a={red|blue}} ${a}    a variable, drawn at each use; ${a=!{red|blue}} once; ${a:red} where it is not set
    __coats(a=red)__        an entry in which ${a} is red
    \\{  \\}  \\|  \\__        these characters themselves

That is the syntax of sd-dynamic-prompts. Braces without | are plain text; a prompt that is JSON stands as it
is, but for what its strings draw.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from shared.errors import UserError
from shared.prompts.wildcards import Wildcards
from shared.settings.messages import printable

MAX_DEPTH = 20  # of choices and wildcard files within each other
MAX_DRAWS = 2000  # for one text
MAX_CHARACTERS = 100_000
MAX_SHOWN = 40  # of a choice in a sentence

_TOKEN = re.compile(
    r"\\(?P<escaped>[{}|]|__)"
    r"|(?P<line>(?:^|(?<=\n))\\(?=\\*[#!]))"
    r"|\$\{(?P<used>[^\W\d]\w{0,60})\}"
    r"|\$\{(?P<set>[^\W\d]\w{0,60})\s*(?P<how>=!?|:)"
    r"|(?P<mark>[{}|])"
    r"|__(?P<order>[~@]?)(?P<wildcard>[^\W_](?:(?:(?!__)[\w\-/. ])*[^\W_])?"
    r"|(?:(?!__)[\w\-/. ]){0,100}\*(?:(?!__)[\w\-/. *]){0,100})"
    r"(?:\((?P<given>[^()\n]{1,500})\))?__"
)
_COUNT = re.compile(r"\s*(?=[\d-])(\d{0,3})(-?)(\d{0,3})\$\$(?:([^$|{}]{0,100})\$\$)?")
_STRING = re.compile(r'("(?:\\.|[^"\\])*")')
_ORDERS = {"!": "every combination", "@": "one after the other"}
_WEIGHT = re.compile(r"\s*(\d{1,9}(?:\.\d{1,9})?)::")


@dataclass(frozen=True)
class Wildcard:
    """An entry of a file. given: variables for it."""

    name: str
    given: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Choice:
    """From `count` to `most` different ones of the options."""

    options: tuple[Template, ...]
    weights: tuple[float, ...]
    count: int = 1
    most: int = 1
    separator: str = ", "


@dataclass(frozen=True)
class Variable:
    """how: "=" sets it, to be drawn at each use; "=!" sets it to one draw; ":" uses it, else the value; ""
    uses it.
    """

    name: str
    how: str = ""
    value: Template = ()


Node = str | Wildcard | Choice | Variable
Template = tuple[Node, ...]


@dataclass
class _Group:
    """A brace that is not closed yet; the whole text is one, too. variable: that it sets, and how."""

    start: int
    variable: tuple[str, str] = ("", "")
    options: list[list[Node]] = field(default_factory=lambda: [[]])

    def add(self, *nodes: Node) -> None:
        self.options[-1] += nodes


def parse(text: str) -> Template:
    """The text as pieces that stand and pieces to draw. UserError for a choice that cannot be read."""
    return _parsed_json(text) if _is_json(text) else _parsed(text)


def _is_json(text: str) -> bool:
    if not text.lstrip().startswith(("{", "[")):
        return False
    try:
        return isinstance(json.loads(text), (dict, list))
    except (ValueError, RecursionError):
        return False


def _parsed_json(text: str) -> Template:
    """Its braces and bars are JSON's; what a string draws is drawn."""
    nodes: list[Node] = []
    for piece in _STRING.split(text):
        draws = piece.startswith('"') and piece.count("{") == piece.count("}")
        nodes += _parsed(piece) if draws else [piece]
    return tuple(node for node in nodes if node)


def _parsed(text: str) -> Template:
    groups, position = [_Group(0)], 0
    for token in _TOKEN.finditer(text):
        groups[-1].add(text[position : token.start()])
        position = token.end()
        if token["wildcard"]:
            groups[-1].add(_wildcard(token))
        elif token["used"]:
            groups[-1].add(Variable(token["used"]))
        elif token["set"]:
            groups.append(_Group(token.start(), (token["set"], token["how"])))
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
        if len(group.options) > 1 or group.variable[0]:
            raise UserError(
                f"The choice '{printable(text[group.start :], MAX_SHOWN)}' is not closed: add a }}, or write "
                "\\{ for a plain brace."
            )
        groups[-1].add("{", *group.options[0])
    return tuple(node for node in groups[0].options[0] if node)


def _wildcard(token: re.Match[str]) -> Wildcard:
    if token["order"] == "@":
        raise UserError(
            f"{printable(token[0])} asks for its entries one after the other, which is not here: leave out "
            "the @."
        )
    pairs = [pair.partition("=") for pair in (token["given"] or "").split(",")]
    return Wildcard(token["wildcard"], tuple((name.strip(), x.strip()) for name, sign, x in pairs if sign))


def _closed(group: _Group, text: str) -> Sequence[Node]:
    """What a pair of braces stands for; `text` is all of it."""
    options = group.options
    if group.variable[0]:
        value = tuple(options[0]) if len(options) == 1 else tuple(_choice(options, text))
        return [Variable(*group.variable, tuple(node for node in value if node))]
    if len(options) > 1 or _taken(_COUNT, options[0])[0]:
        return _choice(options, text)
    nodes = options[0]
    words = "".join(node for node in nodes if isinstance(node, str))
    if any(not isinstance(node, str) for node in nodes) and not set(words) & set('":'):
        return nodes  # of sd-dynamic-prompts, which groups so; what looks like JSON keeps its braces
    return ["{", *nodes, "}"]


def _choice(options: list[list[Node]], text: str) -> Sequence[Node]:
    counted, first = _taken(_COUNT, _ordered(options[0], text))
    weights, templates = [], []
    for option in [first, *options[1:]]:
        weight, nodes = _taken(_WEIGHT, option)
        weights.append(float(weight[1]) if weight else 1.0)
        templates.append(tuple(node for node in nodes if node))
    several = len(templates) == 1 and len(templates[0]) == 1 and isinstance(templates[0][0], Wildcard)
    there = MAX_DRAWS if several else sum(weight > 0 for weight in weights)
    least, dash, most, separator = counted.groups() if counted else ("1", "", "", None)
    low = int(least or 1)
    high = min(there, int(most or there)) if dash else low
    if not 1 <= low <= high <= there:
        raise UserError(
            f"The choice '{printable(text, MAX_SHOWN)}' asks for {max(low, high)} of {len(templates)}: ask "
            "for fewer, or add more."
        )
    separator = ", " if separator is None else separator
    return [Choice(tuple(templates), tuple(weights), low, high, separator)]


def _ordered(option: list[Node], text: str) -> list[Node]:
    """The option without the sign for the order in which to take them; UserError for what is not here."""
    first = option[0] if option else None
    sign = first[:1] if isinstance(first, str) else ""
    if sign in _ORDERS and sign:
        raise UserError(
            f"The choice '{printable(text, MAX_SHOWN)}' asks for {_ORDERS[sign]}, which is not here: leave "
            f"out the {sign}, use a macro line, or put a blank before it to have it painted."
        )
    return [first[1:], *option[1:]] if isinstance(first, str) and sign == "~" else option


def _taken(pattern: re.Pattern[str], option: list[Node]) -> tuple[re.Match[str] | None, list[Node]]:
    """What stands before an option, None where nothing does, and the option without it."""
    text = option[0] if option else None
    found = pattern.match(text) if isinstance(text, str) else None
    if found is None:
        return None, option
    return found, [found.string[found.end() :], *option[1:]]


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
        self._variables: dict[str, Template] = {}

    def text(self, template: Template, trail: tuple[str, ...]) -> str:
        """trail: the wildcard files that led here."""
        text = "".join(node if isinstance(node, str) else self._drawn(node, trail) for node in template)
        if len(text) > MAX_CHARACTERS:
            raise UserError(f"The prompt grows beyond {MAX_CHARACTERS:,} characters: use fewer wildcards.")
        return text

    def _drawn(self, node: Wildcard | Choice | Variable, trail: tuple[str, ...]) -> str:
        self._draws += 1
        if self._draws > MAX_DRAWS:
            raise UserError(f"The prompt draws more than {MAX_DRAWS} times: use fewer choices and wildcards.")
        if isinstance(node, Variable):
            return self._variable(node, trail)
        if isinstance(node, Wildcard):
            return self._entries(node, 1, trail)[0]
        count = node.count
        if node.most > count:
            count += self._index([1.0] * (node.most - count + 1))
        if len(node.options) == 1 and isinstance(wildcard := node.options[0][:1], tuple) and wildcard:
            if isinstance(wildcard[0], Wildcard) and len(node.options[0]) == 1:
                return node.separator.join(self._entries(wildcard[0], count, trail))
        left = list(range(len(node.options)))
        taken = []
        for _ in range(count):
            taken.append(left.pop(self._index([node.weights[i] for i in left])))
        return node.separator.join(self.text(node.options[i], trail) for i in taken)

    def _variable(self, node: Variable, trail: tuple[str, ...]) -> str:
        if node.how.startswith("="):
            self._variables[node.name] = (self.text(node.value, trail),) if "!" in node.how else node.value
            return ""
        way = self._way(f"${{{node.name}}}", trail)
        if node.name in self._variables:
            return self.text(self._variables[node.name], way)
        if node.how:
            return self.text(node.value, way)
        raise UserError(
            f"The variable ${{{node.name}}} has no value: set it before it is used, as in "
            f"${{{node.name}={{red|blue}}}}, or write $\\{{ for a plain brace."
        )

    def _entries(self, node: Wildcard, count: int, trail: tuple[str, ...]) -> list[str]:
        """Different entries of a file; all of them where there are fewer."""
        way = self._way(node.name, trail)
        entries = self._wildcards.entries(node.name)
        self._variables |= {name: (value,) for name, value in node.given}
        left = list(range(len(entries)))
        taken = [left.pop(self._index([1.0] * len(left))) for _ in range(min(count, len(entries)))]
        return [self.text(parse(entries[i]), way) for i in taken]

    def _way(self, name: str, trail: tuple[str, ...]) -> tuple[str, ...]:
        way = (*trail, name)
        if name in trail or len(way) > MAX_DEPTH:
            shown = printable(" > ".join(way), 150)
            raise UserError(f"The wildcard files lead on and on ({shown}): mend one of them.")
        return way

    def _index(self, weights: Sequence[float]) -> int:
        """Of Random's methods only random() is promised to stay the same in all versions of Python."""
        left = self._numbers.random() * sum(weights)
        for i, weight in enumerate(weights):
            left -= weight
            if left < 0:
                return i
        return max(i for i, weight in enumerate(weights) if weight > 0)  # rounding
