"""What flags and wgp_config.json decide, the locks, a worker that starts anew, and the report for bugs."""

from __future__ import annotations

import json
import logging
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from shared import config as config_file
from shared import report as reports
from shared.cli import main
from shared.cli.engine_config import configuration
from shared.cli.flags import build_parser
from shared.engine.configuration import EngineConfig, worker_config
from shared.engine.engine import Engine
from shared.errors import UserError
from shared.gpu import machine
from shared.ui.create.form import about_html, is_slow
from shared.ui.settings.form import FIELDS, GROUPS, form_html, read_form
from shared.ui.settings.tab import machine_text
from shared.worker.config import WorkerConfig
from tests.support.browser import free_port
from tests.support.fake_family import handler_for, make_root
from tests.support.fake_worker import FAKE_WORKER
from tests.support.waiting import until


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make_root(tmp_path / "project")


def configured(root: Path, *flags: str, **options) -> EngineConfig:
    given = build_parser().parse_args([str(flag) for flag in flags])
    return configuration(given, root, {"warm": False, **options})


# ---------------------------------------------------------------- flags over the file over the defaults


def test_the_file_decides_where_no_flag_does(root: Path, tmp_path: Path):
    values = {
        "profile": 4.5, "preload_in_VRAM": 1200, "vram_safety_coefficient": 0.5, "attention_mode": "sage",
        "compile": "transformer", "save_quantized": True, "save_path": str(tmp_path / "pictures"),
        "image_output_codec": "webp_85", "output_filename": "{seed}", "metadata_type": "none",
        "default_model": "other",
    }  # fmt: skip
    config_file.write(root, values)
    found = configured(root)
    overrides = found.overrides
    assert (overrides.profile, overrides.preload, overrides.safety) == ("4.5", 1200 << 20, 0.5)
    assert (overrides.attention, overrides.compile, found.save_quantized) == ("sage", True, True)
    assert found.output_dir == tmp_path / "pictures"
    assert found.database.is_relative_to(root / "outputs")  # the queue and the gallery stay where they were
    assert (found.saving.template, found.saving.metadata, found.saving.quality) == ("{seed}", False, 85)
    engine = Engine(found, handler_for)
    assert engine.catalog.default_model == "other"
    assert engine.catalog.model("fake").defaults["image_format"] == "webp"
    flags = ["--profile", "2", "--preload", "0", "--vram-safety-coefficient", "0.9", "--attention", "auto"]
    won = configured(root, *flags, "--output-dir", tmp_path / "there")
    assert (won.overrides.profile, won.overrides.preload, won.overrides.safety) == ("2", 0, 0.9)
    assert (won.overrides.attention, won.output_dir) == ("auto", tmp_path / "there")


def test_without_file_and_flags_the_plan_is_zgps_own(root: Path):
    found = configured(root)
    plain = EngineConfig.at(root)
    assert (found.overrides, found.saving, found.output_dir) == (
        plain.overrides,
        plain.saving,
        plain.output_dir,
    )
    assert Engine(found, handler_for).catalog.model("fake").defaults["image_format"] == "png"


def test_the_model_used_last_comes_first(root: Path):
    config_file.write(root, {"default_model": "last"})
    engine = Engine(configured(root), handler_for)
    assert engine.catalog.default_model == "fake"  # none was used yet
    engine.submit({"model_type": "other", "prompt": "a"})
    assert Engine(configured(root), handler_for).catalog.default_model == "other"
    config_file.write(root, {"default_model": "gone"})
    assert Engine(configured(root), handler_for).catalog.default_model == "fake"


def test_a_new_config_folder_is_made(root: Path, tmp_path: Path, capsys):
    folder = tmp_path / "a" / "new"
    arguments = ["--config", str(folder), "--list-models"]
    assert main.main(arguments, root=root, handler_for=handler_for) == 0
    assert set(json.loads((folder / config_file.FILE).read_text())) == set(config_file.KEYS)
    (tmp_path / "file").touch()
    for wrong, sentence in (
        (tmp_path / "file", "is a file; expected a folder"),
        (tmp_path / "file" / "a", "written"),
    ):
        assert main.main(["--config", str(wrong), "--list-models"], root=root, handler_for=handler_for) == 2
        said = capsys.readouterr().err
        assert sentence in said and said.count("\n") == 1


def test_advanced_reaches_the_page(root: Path):
    assert configured(root, "--advanced").advanced and not configured(root).advanced


# ---------------------------------------------------------------- locks


def test_a_locked_model_is_the_only_one(root: Path):
    engine = Engine(configured(root, "--lock-model"), handler_for)
    assert list(engine.catalog.models) == ["fake"]
    engine.submit({"prompt": "a"})
    for call in (
        lambda: engine.submit({"prompt": "a", "model_type": "other"}),
        lambda: engine.loras("other"),
    ):
        with pytest.raises(UserError, match=r"'other' cannot be used: this ZGP is locked to 'fake'"):
            call()
    assert list(Engine(configured(root), handler_for).catalog.models) == ["absent", "fake", "other"]


def test_a_locked_configuration_refuses_every_write(root: Path):
    engine = Engine(configured(root, "--lock-config"), handler_for)
    writes = (
        lambda: engine.preferences.change_config({"loras_root": "x"}),
        engine.preferences.reset_config,
        engine.preferences.reset_defaults,
        lambda: engine.preferences.save_defaults({"model_type": "fake", "num_inference_steps": 9}),
    )
    for write in writes:
        with pytest.raises(UserError, match="locked .--lock-config."):
            write()
    assert not (root / "settings").exists() and not (root / config_file.FILE).exists()


# ---------------------------------------------------------------- a change, and a new worker


def test_a_restarted_worker_ends_its_job_and_has_the_new_rules(root: Path, tmp_path: Path):
    engine = Engine(configured(root, worker_command=FAKE_WORKER, restart_seconds=0.01), handler_for)
    engine.start()
    try:
        first, go_on = engine.worker_pid, tmp_path / "go"
        held, _ = engine.submit({"model_type": "fake", "prompt": f"hold {go_on}", "seed": 1})
        until(lambda: engine.store.job(held).phase == "Denoising")
        engine.preferences.change_config({"output_filename": "{model}/{seed}", "metadata_type": "none"})
        engine.restart_worker()
        time.sleep(0.2)
        assert engine.worker_pid == first and engine.store.job(held).status == "running"
        go_on.touch()
        until(lambda: engine.store.job(held).status == "done")
        assert engine.store.job(held).attempts == 1
        job, _ = engine.submit({"model_type": "fake", "prompt": "a", "seed": 7})
        until(lambda: engine.store.job(job).status == "done")
        assert engine.worker_pid != first
        (image,) = engine.store.images(job)
        assert Path(image.path) == root / "outputs" / "fake" / "7.png"
        assert b"fake" not in Path(image.path).read_bytes() and image.metadata["prompt"] == "a"
        client = Engine(engine.config, handler_for)
        with pytest.raises(UserError, match="Another ZGP"):
            client.restart_worker()
    finally:
        engine.stop()


def test_the_rules_are_told_to_the_worker(root: Path):
    config_file.write(root, {"image_output_codec": "jpeg_85"})
    told = WorkerConfig.from_json(worker_config(configured(root)).to_json())
    assert (told.saving.format, told.saving.quality, told.saving.metadata) == ("jpeg", 85, True)


# ---------------------------------------------------------------- the form


def test_the_form_has_a_field_for_every_key_and_says_when_it_counts():
    assert set(FIELDS) == set(config_file.KEYS)
    assert {field.group for field in FIELDS.values()} == set(GROUPS)


def test_what_the_form_shows_can_be_sent_back(tmp_path: Path):
    sent = {
        "checkpoints_paths": "ckpts\n.\n\n", "profile": "-1", "preload_in_VRAM": "0", "compile": "",
        "vram_safety_coefficient": "0.8", "save_quantized": "", "attention_mode": "auto", "theme": "dark",
    }  # fmt: skip
    usual = asdict(config_file.Config())
    assert read_form(sent) == {
        name: list(usual[name]) if isinstance(usual[name], tuple) else usual[name]
        for name in sent
        if name != "theme"
    }
    for text, kept in (("4.5", 4.5), ("4", 4), ("1e9", 10**9), ("four", "four"), ("", "")):
        assert read_form({"profile": text}) == {"profile": kept}
    for wrong in ("four", "", "nan", "1e9"):
        with pytest.raises(UserError, match="'profile' in wgp_config.json came as"):
            config_file.write(tmp_path, read_form({"profile": wrong}))
    with pytest.raises(UserError, match="no form"):
        read_form(["x"])


def test_values_are_escaped_and_a_locked_form_is_disabled():
    values = {
        **asdict(config_file.Config()),
        "loras_root": '"><img src=x>',
        "checkpoints_paths": ("</textarea>",),
    }
    html = form_html(values, [("<i>", "<b>")], locked=False)
    assert "<img" not in html and "<b>" not in html and html.count("</textarea>") == 1
    assert "disabled" not in html and form_html(values, [], locked=True).count("disabled") == 2


# ---------------------------------------------------------------- the report, the card


def test_the_report_holds_no_secret(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "plain-secret")
    monkeypatch.setattr(reports.Path, "home", lambda: Path("/home/anna"))
    monkeypatch.setattr(reports.getpass, "getuser", lambda: "anna")
    lines = [
        "loading /home/anna/models/a.safetensors", "D:\\stuff\\anna\\b", "at /data/anna",
        "Authorization: Bearer abc.def-123456", "hf_AbCdEfGhIjKl", "token=s3cr3t&x=1",
        '"password": "hunter2"', "https://user:pw99@host/file?signature=deadbeef", "plain-secret",
        "anna went home", "api_key: 77aa",
    ]  # fmt: skip
    log = tmp_path / "zgp.log"
    log.write_text("\n".join(lines), encoding="utf-8")
    said = reports.report("A card.", {"save_path": "/home/anna/pictures"}, log)
    for secret in (
        "/home/anna", "\\anna", "/anna", "abc.def", "AbCdEf", "s3cr3t", "hunter2", "pw99", "deadbeef", "77aa",
        "plain-secret",
    ):  # fmt: skip
        assert secret not in said, secret
    assert "~/models/a.safetensors" in said and "torch " in said and "A card." in said


def test_the_end_of_a_long_log_is_shown(tmp_path: Path):
    log = tmp_path / "zgp.log"
    assert reports.tail(log) == []
    log.write_text("".join(f"line {number}\n" for number in range(100_000)))
    assert reports.tail(log)[-1] == "line 99999" and len(reports.tail(log)) == reports.LOG_LINES


def test_a_large_model_warns_where_there_is_no_card(monkeypatch, root: Path):
    model = Engine(configured(root), handler_for).catalog.model("fake")
    machine.has_card.cache_clear()
    monkeypatch.setattr(machine, "nvidia_smi", lambda: [])
    monkeypatch.setattr(machine, "AMD", root / "nothing")
    assert is_slow(model, "") and "takes many minutes" in about_html(model, slow=True)
    machine.has_card.cache_clear()
    monkeypatch.setattr(machine, "nvidia_smi", lambda: ["Card, 8192, 8000, 8.6"])
    assert not is_slow(model, "") and is_slow(model, "cpu")
    assert "minutes" not in about_html(model)
    machine.has_card.cache_clear()


def test_a_folder_that_cannot_be_written_is_one_sentence(root: Path, capsys):
    (root / "outputs").touch()  # where the queue should be
    options = {"handler_for": handler_for, "worker_command": FAKE_WORKER}
    assert main.main(["--server-port", str(free_port())], root=root, **options) == 2
    said = capsys.readouterr().err
    assert said.startswith("wgp.py: ") and said.count("\n") == 1 and str(root / "outputs") in said
    logging.getLogger().handlers.clear()


def test_the_report_names_what_moves_the_weights():
    card = machine.Machine("RTX 9", 16 << 30, 12 << 30, 8 << 30, 7 << 30, (8, 9))
    assert machine_text(card).endswith("RTX 9, 8 GB, with 16 GB of RAM. mmgp moves the weights there.")
    assert machine_text(card, "stream").endswith("RAM. stream moves the weights there.")
    assert machine_text(replace(card, mmgp=False)).endswith("RAM. stream moves the weights there.")
    assert "no graphics card" in machine_text(machine.Machine("CPU", 16 << 30, 12 << 30))


def test_the_engine_is_the_flags_then_the_files(root: Path):
    assert configured(root).overrides.offload == ""
    config_file.write(root, {"offload": "stream"})
    assert configured(root).overrides.offload == "stream"
    assert configured(root, "--offload", "mmgp").overrides.offload == "mmgp"
