"""`python -m tests.support.layers` prints the layers' table of docs/architecture.md: from the contract in
pyproject.toml and the first line of each package.
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HEAD = ("| layer | what it is |", "|---|---|")


def layers() -> list[list[str]]:
    """The packages and modules of each layer, the highest first."""
    contract = (ROOT / "pyproject.toml").read_text("utf-8").partition("layers = [")[2].partition("]")[0]
    return [re.split(r"\s*[:|]\s*", line) for line in re.findall(r'"(.+)"', contract)]


def summary(module: str) -> str:
    """The first sentence of a module's docstring."""
    path = ROOT / module.replace(".", "/")
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    words = " ".join((ast.get_docstring(ast.parse(file.read_text("utf-8"))) or "").split())
    return words.partition(". ")[0].rstrip(".") + "."


def table() -> str:
    """In Markdown; each layer may import those below it and no other."""
    rows = [f"| `{module}` | {summary(module)} |" for layer in layers() for module in layer]
    return "\n".join([*HEAD, *rows])


if __name__ == "__main__":
    sys.stdout.write(table() + "\n")
