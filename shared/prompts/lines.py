"""The lines of a prompt box: comments, several prompts, and macros, as in Wan2GP.

    # a comment: any line that begins with #
    ! {Animal}="cat","dog" : {Place}="a forest","a city","a boat"
    a {Animal} in {Place}

The lines after a macro line are repeated, up to the next macro line: once for each value of the variable that
has the most, the others starting over (here: cat in a forest, dog in a city, cat in a boat). What comes of it
is one prompt ("FG"), one for each line ("G"), or one for each paragraph ("PG"). `\\#` and `\\!` begin a line
that is meant as it stands. Without a macro line, `{Animal}` is plain text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from shared.errors import UserError
from shared.settings.messages import nearest, printable
from shared.settings.table import ALL_ONE, PARAGRAPHS

ENHANCED = "!enhanced!"  # Wan2GP's mark of a prompt that a program has rewritten

_MACRO = re.compile(r"!(\s*\{|.*\{[^{}]*\}\s*=)")
_DECLARATION = re.compile(
    r'[^{}"]*\{\s*(?P<name>[^{}"|]+?)\s*\}\s*=\s*(?P<values>"[^"]*"(?:\s*,\s*"[^"]*")*)\s*'
)
_REFERENCE = re.compile(r"(?<![\\$])\{([^{}|]+)\}")

Variables = Mapping[str, list[str]]


def units(text: str, mode: str) -> list[str]:
    """The prompts of a box, macros filled in; their lines are stripped and not empty.

    mode: a value of the setting multi_prompts_gen_type. UserError for a macro that cannot be read.
    """
    lines = _filled_in(text.replace("\r\n", "\n").replace("\r", "\n").strip())
    if mode == ALL_ONE:
        return [tidy("\n".join(lines))] if any(lines) else []
    if mode == PARAGRAPHS:
        return [tidy(part) for part in re.split(r"\n\n+", "\n".join(lines)) if part.strip()]
    return [line for line in lines if line]


def comments(text: str) -> list[str]:
    """The lines of a box that are comments, stripped."""
    return [line for line in map(str.strip, text.split("\n")) if line.startswith("#")]


def tidy(text: str) -> str:
    """`text` without empty lines and without blanks around the others."""
    return "\n".join(stripped for line in text.split("\n") if (stripped := line.strip()))


def _filled_in(text: str) -> list[str]:
    """All lines, stripped, without comments and with each macro's values in their places."""
    done: list[str] = []
    variables: Variables = {}
    template: list[str] = []
    for line in map(str.strip, text.removeprefix(ENHANCED).split("\n")):
        if line.startswith("#"):
            continue
        if _MACRO.match(line):
            done += _repeated(template, variables)
            variables, template = _declared(line), []
        else:
            template.append(line)
    return done + _repeated(template, variables)


def _repeated(template: list[str], variables: Variables) -> list[str]:
    if not variables:
        return template
    for name in _REFERENCE.findall("\n".join(template)):
        if name not in variables:
            near = nearest(name, variables) or next(iter(variables))
            raise UserError(
                f"'{{{printable(name)}}}' is no variable of the macro above it: did you mean "
                f"'{{{printable(near)}}}'? A plain brace is written \\{{."
            )
    rounds = max(map(len, variables.values()))
    return [_replaced(line, variables, i) for i in range(rounds) for line in template]


def _replaced(line: str, variables: Variables, number: int) -> str:
    for name, values in variables.items():
        line = line.replace(f"{{{name}}}", values[number % len(values)])
    return line


def _declared(line: str) -> dict[str, list[str]]:
    """The variables of a macro line, in their order."""
    variables: dict[str, list[str]] = {}
    position = 1
    while position < len(line):
        found = _DECLARATION.match(line, position)
        position = found.end() if found else position
        if found is None or (position < len(line) and line[position] != ":"):
            raise UserError(
                f'The macro line "{printable(line)}" cannot be read: expected the form '
                '! {Name}="one","two" : {Other}="three".'
            )
        variables[found["name"]] = re.findall(r'"([^"]*)"', found["values"])
        position += 1
    return variables
