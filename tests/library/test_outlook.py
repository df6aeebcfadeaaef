"""What a job takes and which files it fetches: one answer for the page, the command line and the worker."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest

from models.z_image.z_image_handler import family_handler
from shared.cli import main
from shared.engine.engine import Engine, EngineConfig
from shared.engine.inventory import take_stock
from shared.errors import UserError
from shared.gpu import planner
from shared.gpu.planner import GIB, Machine
from shared.library.catalog import catalog
from shared.library.outlook import outlook, unplanned
from shared.ui.components.downloads import about_html, outlook_of, precision_choices
from shared.weights.files import Folders
from shared.worker.model_manager import ModelHost
from tests.support.mini import ROOT

CARD = Machine("Card", 16 * GIB, 12 * GIB, 8 * GIB, int(7.5 * GIB), (8, 9), frozenset({"int8"}))
INT8, BF16 = "ZImageTurbo_quanto_bf16_int8.safetensors", "ZImageTurbo_bf16.safetensors"


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Nothing is on this computer but the program."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    return Folders(ROOT, tmp_path / "ckpts")


@pytest.fixture
def turbo(folders):
    return catalog(ROOT, folders.ckpts).model("z_image")


def fetched(found) -> list[str]:
    return [one.name for one in found.missing if one.size]


def test_everybody_names_the_same_files(turbo, folders, tmp_path, monkeypatch, capsys):
    for module in ("cli.main", "cli.plan", "engine.engine", "engine.inventory", "ui.components.downloads"):
        monkeypatch.setattr(f"shared.{module}.survey", lambda gpu="": CARD)
    config = EngineConfig.at(
        tmp_path, ckpts=folders.ckpts, output_dir=tmp_path / "o", saved=tmp_path / "settings"
    )
    engine = Engine(replace(config, root=ROOT))
    names = fetched(outlook(turbo, folders, turbo.defaults, lambda: CARD))
    assert names == [INT8, "qwen3_quanto_bf16_int8.safetensors", "ZImageTurbo_VAE_bf16.safetensors"]
    worker = ModelHost(folders, machine=lambda: CARD)
    assert fetched(worker.outlook(turbo, turbo.defaults)) == names
    stock = next(one for one in take_stock(engine) if one.info.id == "z_image")
    assert [item.name for item in stock.missing if item.size] == names
    assert "11.6 GB (int8)" in about_html(turbo, found=outlook_of(engine, turbo, turbo.defaults))
    task = tmp_path / "task.json"
    task.write_text(json.dumps({"prompt": "x", "model_type": "z_image"}))
    options = {"ckpts": folders.ckpts, "database": engine.store.path}
    commands = (["--list-models"], ["--plan", "--model", "z_image"], ["--process", str(task), "--dry-run"])
    for arguments in commands:
        assert main.main([*arguments, "--json"], root=ROOT, **options) == 0
        lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        said = next(line for line in lines if line.get("id", "z_image") == "z_image")
        assert [url.rsplit("/", 1)[-1] for url in said["download"]][0] == INT8, arguments
        assert said["download_bytes"] == stock.missing_size


def begin(folders, name, size=1000):
    folders.ckpts.mkdir(exist_ok=True)
    (folders.ckpts / f"{name}.part").write_bytes(b"x" * size)


def test_what_was_begun_is_fetched_and_counts_as_come(turbo, folders):
    begin(folders, BF16)
    found = outlook(turbo, folders, turbo.defaults, lambda: CARD)
    assert fetched(found)[0] == BF16 and found.plan.transformer.kind == "bf16" and found.kind == "bf16"
    assert found.missing[0].left == found.missing[0].size - 1000


def test_what_was_agreed_to_is_fetched_whatever_the_plan_prefers(turbo, folders):
    url = next(url for url in turbo.card.model["URLs"] if url.endswith(BF16))
    assert fetched(outlook(turbo, folders, turbo.defaults, lambda: CARD, agreed={url}))[0] == BF16
    assert fetched(unplanned(turbo, folders, {url}))[0] == BF16


def test_what_was_agreed_to_and_no_longer_fits_is_not_insisted_on(turbo, folders, monkeypatch):
    def plan(machine, offers, needs, overrides, *, rung):
        if {one.kind for one in offers.transformer} == {"bf16"}:
            raise UserError("bf16 does not fit any more")
        return planner.plan(machine, offers, needs, overrides, rung=rung)

    url = next(url for url in turbo.card.model["URLs"] if url.endswith(BF16))
    monkeypatch.setattr("shared.library.outlook.planner", SimpleNamespace(plan=plan))
    assert fetched(outlook(turbo, folders, turbo.defaults, lambda: CARD, agreed={url}))[0] == INT8
    with pytest.raises(UserError, match="does not fit any more"):
        outlook(turbo, folders, {**turbo.defaults, "precision": "bf16"}, lambda: CARD)


@pytest.mark.parametrize(("precision", "name"), [("bf16", BF16), ("int8", INT8)])
def test_the_precision_chosen_wins_over_all(turbo, folders, precision, name):
    other = {BF16: INT8, INT8: BF16}[name]
    begin(folders, other)
    found = outlook(turbo, folders, {**turbo.defaults, "precision": precision}, lambda: CARD)
    assert fetched(found)[0] == name and found.plan.transformer.kind == precision


def test_a_precision_that_there_is_not_is_one_sentence(turbo, folders):
    with pytest.raises(UserError, match="precision came as fp8, Z-Image Turbo is here as bf16, int8"):
        outlook(turbo, folders, {**turbo.defaults, "precision": "fp8"}, lambda: CARD)


def test_precision_is_a_setting_only_where_there_is_a_choice(folders):
    models = catalog(ROOT, folders.ckpts).models
    assert models["z_image"].capabilities["precisions"] == ["bf16", "int8"]
    for name in ("z_image_mini", "z_image_nunchaku_r256_int4"):
        assert "precision" not in models[name].settings
    assert "precision" in models["z_image_control"].settings


def test_precisions_are_read_from_the_headers_of_what_is_here(folders):
    folders.ckpts.mkdir()
    mini = ROOT / "models" / "z_image" / "mini" / "transformer.safetensors"
    (folders.ckpts / "x_int8.safetensors").symlink_to(mini)
    (folders.ckpts / "y_bf16.safetensors").write_bytes(b"damaged")
    card = {"URLs": ["x_int8.safetensors", "y_bf16.safetensors", "absent_fp8.safetensors"]}
    assert family_handler.query_precisions("z_image", card, folders) == ["fp16"]


def test_the_choice_says_what_each_precision_downloads(turbo, folders, tmp_path, monkeypatch):
    monkeypatch.setattr("shared.ui.components.downloads.survey", lambda gpu="": CARD)
    config = EngineConfig.at(tmp_path, ckpts=folders.ckpts)
    engine = Engine(replace(config, root=ROOT))
    said = dict((value, words) for words, value in precision_choices(engine, turbo, turbo.defaults))
    assert said == {
        "auto": "auto (int8)", "bf16": "bf16 · 16.9 GB to download", "int8": "int8 · 11.6 GB to download"
    }  # fmt: skip
