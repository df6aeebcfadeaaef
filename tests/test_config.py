"""The configuration file: read, written whole, and set aside when it is damaged."""

import json

import pytest

from shared import config
from shared.errors import UserError


def test_without_a_file_the_defaults_apply(tmp_path):
    assert config.read(tmp_path) == (config.Config(), [])
    assert config.Config().folders(tmp_path) == [tmp_path / "ckpts", tmp_path]


def test_a_file_of_wan2gp_is_read_and_its_other_keys_survive_a_change(tmp_path):
    path = tmp_path / config.FILE
    path.write_text(json.dumps({"checkpoints_paths": ["/models", "ckpts"], "attention_mode": "auto"}))
    found, notices = config.read(tmp_path)
    assert found.checkpoints_paths == ("/models", "ckpts") and notices == []
    config.write(tmp_path, {"loras_root": "/loras"})
    content = json.loads(path.read_text())
    assert content["attention_mode"] == "auto" and content["loras_root"] == "/loras"
    assert config.read(tmp_path)[0].loras_root == "/loras"


@pytest.mark.parametrize("damage", [b"", b"{", b"[1]", b'{"a": 1', b"\xff\xfe\x00", b"[" * 100_000])
def test_a_damaged_file_is_set_aside_and_the_backup_applies(tmp_path, damage):
    config.write(tmp_path, {"loras_root": "first"})
    config.write(tmp_path, {"loras_root": "second"})
    (tmp_path / config.FILE).write_bytes(damage)
    found, (notice,) = config.read(tmp_path)
    assert found.loras_root == "first"
    assert "cannot be read" in notice and "version before" in notice
    (aside,) = tmp_path.glob("*.damaged-*")
    assert aside.read_bytes() == damage and aside.name in notice
    assert config.read(tmp_path) == (found, [])


def test_without_a_backup_the_defaults_apply(tmp_path):
    (tmp_path / config.FILE).write_text("{")
    found, (notice,) = config.read(tmp_path)
    assert found == config.Config() and "defaults apply" in notice


@pytest.mark.parametrize("value", [[], "ckpts", [1], [""], None])
def test_a_wrong_value_is_named_and_nothing_is_written(tmp_path, value):
    (tmp_path / config.FILE).write_text(json.dumps({"checkpoints_paths": value, "loras_root": "x"}))
    found, (notice,) = config.read(tmp_path)
    assert found == config.Config(loras_root="x")
    assert "'checkpoints_paths'" in notice and "expected a list of folders" in notice
    with pytest.raises(UserError, match="expected a list of folders"):
        config.write(tmp_path, {"checkpoints_paths": value})
    assert json.loads((tmp_path / config.FILE).read_text())["checkpoints_paths"] == value


def test_an_unknown_key_is_refused(tmp_path):
    with pytest.raises(UserError, match="has no key 'colour'"):
        config.write(tmp_path, {"colour": 1})


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    config.write(tmp_path, {"loras_root": "first"})
    monkeypatch.setattr(
        config.json_file.os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left"))
    )
    with pytest.raises(UserError, match="No space left"):
        config.write(tmp_path, {"loras_root": "second"})
    assert config.read(tmp_path)[0].loras_root == "first"
    assert [path.name for path in tmp_path.iterdir()] == [config.FILE]
