"""What the program imports is what requirements.txt installs; no package arrives by accident."""

import ast
import functools
import re
import sys
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

from shared import installing
from shared.settings.table import ATTENTION_PACKAGES
from tests.support.mini import ROOT

PRODUCT = ("start.py", "wgp.py", "models", "shared", "training")
TOOLS = ("benchmarks",)
OWN = {"start", "wgp", "models", "shared", "training", "benchmarks", "tests"}
#: what a user may install beside the requirements; imported inside functions, where its absence is known
OPTIONAL = {
    *ATTENTION_PACKAGES.values(),
    "flash_attn_interface",  # Flash Attention 3
    "comfy_kitchen",  # kernels, installed where there is an NVIDIA card
    "nunchaku",  # kernels; not on PyPI under this name
    "onnxruntime",  # poses
    "spandrel",  # upscalers
}


def sources(places: tuple[str, ...]) -> Iterator[Path]:
    for place in places:
        yield from [ROOT / place] if place.endswith(".py") else sorted((ROOT / place).rglob("*.py"))


@functools.cache
def parsed(path: Path) -> ast.AST:
    return ast.parse(path.read_text("utf-8"))


def imported(tree: ast.AST) -> Iterator[str]:
    """The top packages of other people that the code imports."""
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [node.module]
        tops = {name.partition(".")[0] for name in names}
        yield from tops - OWN - set(sys.stdlib_module_names)


def canonical(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()


def declared(*files: str) -> set[str]:
    lines = "\n".join((ROOT / name).read_text("utf-8") for name in files)
    return {canonical(name) for name in re.findall(r"^([\w.-]+)", lines, re.M)}


def undeclared(places: tuple[str, ...], *files: str) -> set[str]:
    """The packages that are imported in `places` and named in none of the requirements files."""
    installed, names = packages_distributions(), declared(*files)
    packages = {name for path in sources(places) for name in imported(parsed(path))}
    known = {name for name in packages if names & set(map(canonical, installed.get(name, ())))}
    return packages - known - OPTIONAL


def test_every_imported_package_is_declared() -> None:
    assert not undeclared(PRODUCT, "requirements.txt")


def test_the_tools_import_what_the_developers_requirements_add() -> None:
    assert not undeclared(TOOLS, "requirements.txt", "requirements-dev.txt")


def test_optional_packages_are_imported_only_inside_functions() -> None:
    for path in sources(PRODUCT):
        tree = parsed(path)
        functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
        inside = {name for function in functions for name in imported(function)}
        assert OPTIONAL & set(imported(tree)) <= inside, path


def test_the_kernels_for_cards_are_the_developers_as_well() -> None:
    """benchmarks and tests use the version that a card's owner gets."""
    assert canonical(re.split("[<>=]", installing.KERNELS)[0]) in declared("requirements-dev.txt")
