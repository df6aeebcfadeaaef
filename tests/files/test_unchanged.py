"""What is remembered of files is forgotten when they change; a warm worker reads nothing again."""

from __future__ import annotations

import builtins
import io
import json
import os
import shutil
from pathlib import Path

import pytest

from shared.errors import UserError
from shared.files.unchanged import while_unchanged
from shared.library.cards import load_cards
from shared.library.catalog import catalog, look_up
from shared.settings.table import SETTINGS, SettingsError
from shared.weights.files import Folders
from shared.worker.model_manager import ModelHost, Silent
from tests.support.browser import ROOT

MODEL = "z_image_mini"


@pytest.fixture
def asked() -> tuple:
    """(a function whose answers are remembered, the arguments that it was really called with)"""
    calls = []

    @while_unchanged(answers=2)
    def size(path: Path, unit: int = 1) -> int:
        calls.append((path.name, unit))
        if not path.exists():
            raise UserError(f"{path.name} is gone")
        files = path.rglob("*") if path.is_dir() else [path]
        return sum(len(file.read_bytes()) for file in files if file.is_file()) // unit

    return size, calls


def test_an_answer_is_given_again_until_the_file_changes(asked: tuple, tmp_path: Path) -> None:
    size, calls = asked
    file = tmp_path / "a"
    file.write_bytes(b"1234")
    assert [size(file), size(file), size(file, 2)] == [4, 4, 2]
    assert calls == [("a", 1), ("a", 2)]
    file.write_bytes(b"123456")
    assert size(file) == 6
    before = file.stat()
    file.write_bytes(b"654321")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert size(file) == 6 and len(calls) == 4


def test_a_folder_changes_with_each_of_its_files(asked: tuple, tmp_path: Path) -> None:
    size, calls = asked
    folder = tmp_path / "model"
    (folder / "parts").mkdir(parents=True)
    (folder / "parts" / "1").write_bytes(b"12")
    assert size(folder) == size(folder) == 2
    (folder / "parts" / "2").write_bytes(b"345")
    assert size(folder) == 5 and len(calls) == 2


def test_an_error_is_not_remembered(asked: tuple, tmp_path: Path) -> None:
    size, _ = asked
    for _ in range(2):
        with pytest.raises(UserError, match="a is gone"):
            size(tmp_path / "a")
    (tmp_path / "a").write_bytes(b"1")
    assert size(tmp_path / "a") == 1


@pytest.fixture
def folders(tmp_path: Path) -> Folders:
    """A project with the cards of this one."""
    for folder in ("defaults", "finetunes"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    return Folders(tmp_path, ROOT / "ckpts", (ROOT,))


def test_a_card_that_is_changed_added_or_removed_is_seen(folders: Folders) -> None:
    own = folders.root / "finetunes" / "mine.json"
    assert "mine" not in load_cards(folders.root, SETTINGS)[0]
    for steps in (5, 6):
        model = {"name": "Mine", "architecture": "z_image", "URLs": MODEL}
        own.write_text(json.dumps({"model": model, "num_inference_steps": steps}))
        assert look_up("mine", folders).defaults["num_inference_steps"] == steps
    own.unlink()
    with pytest.raises(SettingsError, match="There is no model 'mine'"):
        look_up("mine", folders)


def test_what_a_caller_does_with_the_cards_stays_with_it(folders: Folders) -> None:
    cards, errors = load_cards(folders.root, SETTINGS)
    cards.clear()
    errors.append(None)
    assert load_cards(folders.root, SETTINGS)[0] and load_cards(folders.root, SETTINGS)[1] == []


def test_one_card_is_described_as_among_all(folders: Folders) -> None:
    everything = catalog(folders.root, folders.ckpts, others=folders.others)
    for model_id, model in everything.models.items():
        assert look_up(model_id, folders) == model


def test_a_link_to_nowhere_is_told_and_the_other_cards_load(folders: Folders) -> None:
    (folders.root / "finetunes" / "lost.json").symlink_to(folders.root / "nowhere.json")
    cards, errors = load_cards(folders.root, SETTINGS)
    assert MODEL in cards and ["lost.json" in str(error) for error in errors] == [True]


def test_a_warm_model_is_given_again_without_reading_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    host = ModelHost(Folders(ROOT, ROOT / "ckpts"))
    settings = host.info(MODEL).defaults | {"prompt": "a red circle", "seed": 1}
    first = host.get(MODEL, Silent(), settings)
    opened = []

    def noted(file: object, *more: object, **named: object) -> object:
        opened.append(str(file))
        return real(file, *more, **named)

    real = builtins.open
    monkeypatch.setattr(builtins, "open", noted)
    monkeypatch.setattr(io, "open", noted)
    assert host.get(MODEL, Silent(), settings).pipe is first.pipe
    assert [name for name in opened if name.startswith(str(ROOT))] == []
