"""The house is as its plan says: layers, rooms of a size, and the names that docs/architecture.md gives."""

from __future__ import annotations

import ast
import importlib
import re

import pytest

from tests.support.layers import layers, table
from tests.support.mini import ROOT

PLAN = (ROOT / "docs" / "architecture.md").read_text("utf-8")
MAX_MODULES = 16  # of a folder: what one looks over at once
LOOSE = {"config", "errors", "installing", "report", "version"}
TABLES = {"shared/cli/flags.py"}  # functions that are lists of flags
MAX_LINES = 60  # of a function: a screen


def sources(*folders: str) -> list:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def test_the_plan_has_the_layers_of_the_contract() -> None:
    assert table() in PLAN


def test_every_room_has_a_layer() -> None:
    known = {module for layer in layers() for module in layer}
    rooms = {f"shared.{path.stem}" for path in (ROOT / "shared").iterdir() if path.stem[0] not in "._"}
    assert rooms == {module for module in known if module.startswith("shared.")}


def test_loose_modules_are_few() -> None:
    loose = {path.stem for path in (ROOT / "shared").glob("*.py")} - {"__init__"}
    assert loose == LOOSE


@pytest.mark.parametrize("root", ["shared", "models", "training", "benchmarks"])
def test_a_folder_holds_one_idea(root: str) -> None:
    folders = {path.parent for path in sources(root)}
    full = {folder: len(list(folder.glob("[!_]*.py"))) for folder in folders}
    assert [(str(folder), count) for folder, count in full.items() if count > MAX_MODULES] == []


def test_a_function_fits_a_screen() -> None:
    long = [
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}: {node.end_lineno - node.lineno + 1}"
        for path in sources("shared", "models")
        if str(path.relative_to(ROOT)) not in TABLES
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno - node.lineno >= MAX_LINES
    ]
    assert long == []


def named_things() -> list[tuple[str, str]]:
    """(module, name in it) of "`Name` (`module`)" and "`module`" in the plan."""
    both = re.findall(r"`([\w.]+)`\s+\(`((?:shared|models)\.[\w.]+)`", PLAN)
    return [(module, name) for name, module in both]


def test_the_plan_names_things() -> None:
    assert len(named_things()) >= 10


@pytest.mark.parametrize(("module", "name"), named_things())
def test_what_the_plan_names_exists(module: str, name: str) -> None:
    thing = importlib.import_module(module)
    for part in name.split("."):
        thing = getattr(thing, part)


def test_files_in_the_plan_exist() -> None:
    files = re.findall(r"`((?:shared|models|tests|docs)/[\w/.<>]+)`", PLAN)
    assert [file for file in files if "<" not in file and not (ROOT / file).exists()] == []


def test_no_test_imports_another() -> None:
    for path in sources("tests"):
        imports = re.findall(r"^\s*(?:from|import) (tests[\w.]*)", path.read_text("utf-8"), re.M)
        assert [name for name in imports if ".test_" in name] == [], path
