"""Defaults that a user saved for a model: what is kept, which layer wins, and what a damaged file does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shared.cli.engine_config import configuration
from shared.cli.flags import build_parser
from shared.engine.configuration import EngineConfig
from shared.engine.engine import Engine
from shared.errors import UserError
from shared.library import saved_defaults
from shared.library.catalog import catalog
from shared.settings.table import SETTINGS, SettingsError
from tests.support.fake_family import handler_for, make_root


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make_root(tmp_path / "project")


@pytest.fixture
def file(root: Path) -> Path:
    (root / "settings").mkdir()
    return root / "settings" / "fake_settings.json"


def an_engine(root: Path, **options) -> Engine:
    return Engine(EngineConfig.at(root, saved=root / "settings", warm=False, **options), handler_for)


def defaults(root: Path, **layers) -> dict:
    return catalog(root, root, handler_for, saved=root / "settings", **layers).model("fake").defaults


def test_each_layer_wins_over_the_one_before_it(root: Path, file: Path):
    card = root / "defaults" / "fake.json"
    content = json.loads(card.read_text())
    assert defaults(root)["num_inference_steps"] == 3  # the handler's
    card.write_text(json.dumps({**content, "num_inference_steps": 4}))
    assert defaults(root)["num_inference_steps"] == 4
    assert defaults(root, house={"num_inference_steps": 5})["num_inference_steps"] == 5
    file.write_text('{"num_inference_steps": 6}')
    layers = {"house": {"num_inference_steps": 5}, "overrides": {"num_inference_steps": 7}}
    assert defaults(root, house=layers["house"])["num_inference_steps"] == 6
    assert defaults(root, **layers)["num_inference_steps"] == 7
    assert catalog(root, root, handler_for, saved=root / "settings", **layers).model("fake").factory[
        "num_inference_steps"
    ] == 5  # fmt: skip


def test_only_differences_are_kept_so_that_a_better_card_reaches_the_user(root: Path, file: Path):
    engine = an_engine(root)
    form = {**engine.catalog.model("fake").defaults, "prompt": "mine", "num_inference_steps": 9}
    assert engine.preferences.save_defaults(form) == {"num_inference_steps": 9}
    assert json.loads(file.read_text()) == {"num_inference_steps": 9}
    card = root / "defaults" / "fake.json"
    card.write_text(json.dumps({**json.loads(card.read_text()), "resolution": "96x96"}))
    found = engine.reload_catalog().model("fake").defaults
    assert (found["num_inference_steps"], found["resolution"]) == (9, "96x96")
    job, _ = engine.submit({"model_type": "fake", "prompt": "a"})  # any client
    assert engine.store.job(job).settings["num_inference_steps"] == 9


def test_what_belongs_to_one_picture_is_never_a_default(root: Path, file: Path):
    file.write_text(json.dumps({"prompt": "x", "model_type": "other", "image_start": "a.png", "seed": 5}))
    found = defaults(root)
    assert (found["prompt"], found["model_type"], found["seed"]) == ("", "fake", 5)
    assert {"prompt", "model_type", "image_start", "image_mask", "image_guide"} == saved_defaults.NEVER


def test_a_picture_on_the_form_is_no_reason_to_refuse(root: Path, file: Path):
    kept = an_engine(root).preferences.save_defaults(
        {"model_type": "fake", "image_mask": "gone.png", "prompt": "dragon", "batch_size": 2}
    )
    assert kept == {"batch_size": 2}


def test_a_file_of_wan2gp_is_read_without_a_word(root: Path, file: Path):
    snapshot = {
        "type": "WanGP v10 by DeepBeepMeep - Z-Image", "settings_version": 2.74, "video_length": 81,
        "num_inference_steps": 12, "resolution": "128x64", "image_guide": None, "guidance_scale": 2,
    }  # fmt: skip
    file.write_text(json.dumps(snapshot))
    found = catalog(root, root, handler_for, saved=root / "settings")
    assert found.notices == []
    chosen = found.model("fake").defaults
    assert (chosen["num_inference_steps"], chosen["resolution"]) == (12, "128x64")
    assert "guidance_scale" not in chosen


def test_values_of_another_version_are_named_and_the_rest_acts(root: Path, file: Path):
    file.write_text(
        '{"num_inference_steps": 500, "colour": 1, "sed": 2, "batch_size": 2, "resolution": "1x1"}'
    )
    engine = an_engine(root)
    found = engine.catalog.model("fake").defaults
    assert (found["num_inference_steps"], found["batch_size"], found["resolution"]) == (3, 2, "64x64")
    said = " ".join(engine.notices)
    assert len(engine.notices) == 4
    assert "num_inference_steps came as 500; expected a whole number from 1 to 100" in said
    assert "'colour'" in said and "'sed', which is no setting (the nearest one is 'seed')" in said
    assert 'resolution came as "1x1"' in said
    engine.preferences.save_defaults({**found, "batch_size": 3})
    assert engine.notices == [] and json.loads(file.read_text()) == {"batch_size": 3}


@pytest.mark.parametrize("damage", [b"", b"{", b"[1]", b"\xff\x00", b"[" * 100_000])
def test_a_damaged_file_is_set_aside_and_told(root: Path, file: Path, damage: bytes):
    file.write_bytes(damage)
    engine = an_engine(root)
    assert engine.catalog.model("fake").defaults["num_inference_steps"] == 3
    (aside,) = file.parent.iterdir()
    assert aside.read_bytes() == damage and ".damaged-" in aside.name
    engine.reload_catalog()
    (notice,) = engine.notices  # still there for the page, which opens later
    assert "cannot be read" in notice and aside.name in notice and "factory defaults apply" in notice


def test_factory_defaults_come_back_and_nothing_is_deleted(root: Path, file: Path):
    others = file.with_name("t2v_settings.json")  # a model of Wan2GP's
    others.write_text("{}")
    engine = an_engine(root)
    for model in ("fake", "other"):
        engine.preferences.save_defaults({"model_type": model, "num_inference_steps": 9})
    (aside,) = engine.preferences.reset_defaults(["fake"])
    assert json.loads(aside.read_text()) == {"num_inference_steps": 9}
    steps = [engine.catalog.model(model).defaults["num_inference_steps"] for model in ("fake", "other")]
    assert steps == [3, 9]
    assert len(engine.preferences.reset_defaults()) == 1 and engine.preferences.reset_defaults() == []
    assert others.exists() and len(list(file.parent.iterdir())) == 3


def test_saving_the_factory_values_forgets_the_file(root: Path, file: Path):
    engine = an_engine(root)
    engine.preferences.save_defaults({"model_type": "fake", "num_inference_steps": 9})
    engine.preferences.save_defaults({"model_type": "fake", "num_inference_steps": 8})
    assert json.loads(file.with_name(f"{file.name}.bak").read_text()) == {"num_inference_steps": 9}
    assert engine.preferences.save_defaults(engine.catalog.model("fake").factory) == {}
    assert not file.exists()


def test_a_disk_that_refuses_keeps_the_old_defaults(root: Path, file: Path, monkeypatch):
    engine = an_engine(root)
    engine.preferences.save_defaults({"model_type": "fake", "num_inference_steps": 9})

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saved_defaults.json_file.os, "fsync", full)
    with pytest.raises(UserError, match="could not be written .No space left on device."):
        engine.preferences.save_defaults({"model_type": "fake", "num_inference_steps": 8})
    assert json.loads(file.read_text()) == {"num_inference_steps": 9}
    with pytest.raises(SettingsError, match="expected a whole number"):
        engine.preferences.save_defaults({"model_type": "fake", "num_inference_steps": 1000})


def test_the_command_line_reads_the_folder_that_settings_names(root: Path, tmp_path: Path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "fake_settings.json").write_text('{"num_inference_steps": 6, "batch_size": 2}')
    arguments = ["--settings", str(tmp_path / "mine"), "--steps", "5"]
    options = build_parser().parse_args(arguments)
    engine = Engine(configuration(options, root, {}), handler_for)
    found = engine.catalog.model("fake").defaults
    assert (found["num_inference_steps"], found["batch_size"]) == (5, 2)


def test_every_setting_can_be_saved_and_read_back(tmp_path: Path):
    """Whatever a model has: each default of the table passes through a file."""
    factory = {name: setting.default for name, setting in SETTINGS.items()}
    capabilities: dict = {setting.needs: True for setting in SETTINGS.values()}
    capabilities |= {setting.more_choices: ["another"] for setting in SETTINGS.values()}
    everything = {
        **factory, "num_inference_steps": 7, "activated_loras": ["a.safetensors"], "mask_only": True,
        "negative_prompt": "grey", "guidance_scale": 2.5, "image_format": "webp",
    }  # fmt: skip
    kept = saved_defaults.write(tmp_path, "m", everything, factory)
    assert set(kept) == {name for name in everything if everything[name] != factory[name]}
    assert saved_defaults.read(tmp_path, "m", factory, capabilities) == (kept, [])
