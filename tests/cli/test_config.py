"""The configuration file: read, written whole, and set aside when it is damaged."""

import dataclasses
import json

import pytest

from shared import config
from shared.errors import UserError
from shared.files import atomic
from shared.gpu.planner import PROFILES
from shared.settings.table import SETTINGS


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
        atomic.os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left"))
    )
    with pytest.raises(UserError, match="No space left"):
        config.write(tmp_path, {"loras_root": "second"})
    assert config.read(tmp_path)[0].loras_root == "first"
    assert [path.name for path in tmp_path.iterdir()] == [config.FILE]


EXAMPLES = {
    "offload": ("stream", "cpu"),
    "checkpoints_paths": (["a", "b"], ["a", ""]),
    "loras_root": ("x", 1),
    "profiles_dir": ("mine", ""),
    "save_path": ("/pictures", " "),
    "default_model": ("last", 5),
    "image_output_codec": ("jpeg_85", "gif"),
    "output_filename": ("{seed}", "{sed}"),
    "metadata_type": ("none", "json"),
    "profile": (3.5, 6),
    "preload_in_VRAM": (4000, -1),
    "vram_safety_coefficient": (0.5, 0),
    "attention_mode": ("sage", "fastest"),
    "compile": ("transformer", True),
    "save_quantized": (True, "yes"),
}


@pytest.mark.parametrize("key", config.KEYS)
def test_every_key_is_kept_and_refuses_what_it_cannot_be(tmp_path, key):
    good, wrong = EXAMPLES[key]
    config.write(tmp_path, {key: good})
    found, notices = config.read(tmp_path)
    kept = getattr(found, key)
    assert notices == [] and (list(kept) if isinstance(kept, tuple) else kept) == good
    with pytest.raises(UserError, match=f"'{key}' in wgp_config.json came as .*; expected"):
        config.write(tmp_path, {key: wrong})
    (tmp_path / config.FILE).write_text(json.dumps({key: wrong}))
    found, (notice,) = config.read(tmp_path)
    assert found == config.Config() and f"'{key}'" in notice and "the default applies" in notice


def test_the_table_has_a_row_for_every_key():
    assert list(config.KEYS) == [field.name for field in dataclasses.fields(config.Config)]
    assert {f"{number:g}" for number in config.PROFILES} == {"-1", *PROFILES}
    assert {fmt for fmt, _ in config.CODECS.values()} == set(SETTINGS["image_format"].choices)


def test_a_usual_file_of_wan2gp_acts_without_a_word(tmp_path):
    usual = {
        "attention_mode": "auto", "transformer_types": [], "profile": 4, "preload_in_VRAM": 0, "compile": "",
        "save_path": "outputs", "image_save_path": "outputs", "image_output_codec": "jpeg_95", "boost": 1,
        "metadata_type": "metadata", "checkpoints_paths": ["ckpts", "."], "loras_root": "loras",
    }  # fmt: skip
    (tmp_path / config.FILE).write_text(json.dumps(usual))
    found, notices = config.read(tmp_path)
    assert notices == [] and (found.profile, found.image_output_codec) == (4, "jpeg_95")
    (tmp_path / config.FILE).write_text('{"attention_mode": "sage2"}')
    assert config.read(tmp_path)[0].attention_mode == "sage"


def test_a_new_folder_gets_a_file_with_the_defaults(tmp_path):
    config.create(tmp_path / "new")
    assert config.read(tmp_path / "new") == (config.Config(), [])
    assert set(json.loads((tmp_path / "new" / config.FILE).read_text())) == set(config.KEYS)
    config.write(tmp_path / "new", {"loras_root": "mine"})
    config.create(tmp_path / "new")
    assert config.read(tmp_path / "new")[0].loras_root == "mine"


def test_a_reset_sets_the_file_aside_and_keeps_the_keys_of_others(tmp_path):
    assert config.reset(tmp_path) is None
    (tmp_path / config.FILE).write_text('{"loras_root": "mine", "boost": 1}')
    aside = config.reset(tmp_path)
    assert json.loads(aside.read_text()) == {"loras_root": "mine", "boost": 1}
    assert config.read(tmp_path) == (config.Config(), [])
    assert json.loads((tmp_path / config.FILE).read_text()) == {"boost": 1}
