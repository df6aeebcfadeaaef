"""Every registered handler answers all that the program asks a family; one that says little is enough."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest

import models
from models.family import Family
from shared.gpu.planner import Machine
from shared.library.catalog import catalog
from shared.library.outlook import outlook
from shared.weights.files import Folders, Required
from tests.support.fake_family import Handler, make_root

QUESTIONS = [name for name, value in vars(Family).items() if isinstance(value, staticmethod)]


@pytest.mark.parametrize("family", models.FAMILIES)
@pytest.mark.parametrize("question", QUESTIONS)
def test_a_handler_takes_what_a_family_is_asked(family: type, question: str) -> None:
    asked = inspect.signature(getattr(Family, question)).parameters
    taken = inspect.signature(getattr(family, question)).parameters
    if question != "load_model":
        assert list(taken) == list(asked)
    assert getattr(family, question) is not getattr(Family, question)


def test_nothing_outside_asks_a_handler_for_more() -> None:
    extra = {name for name in vars(models.FAMILIES[0]) if not name.startswith("_")} - set(QUESTIONS)
    documents = {"query_family_infos", "query_family_maps", "fix_settings", "get_rgb_factors"}
    assert extra == documents


def test_a_family_that_says_nothing_of_memory_is_not_planned(tmp_path: Path) -> None:
    root = make_root(tmp_path / "project")
    info = catalog(root, root / "ckpts", lambda architecture: Handler).models["fake"]
    machine = Machine("Card", 1 << 30, 1 << 30)
    result = outlook(info, Folders(root, root / "ckpts"), info.defaults, lambda: machine)
    assert result.plan is None and result.missing == ()
    assert Handler.query_download_bytes("fake", {}, Required("transformer", ["x"]), "x") == 0
    assert Handler.query_fit("fake", {}, root / "fake.bin") is None
