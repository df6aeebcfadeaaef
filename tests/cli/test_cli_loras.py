"""The command line's flags for LoRAs and folders."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from shared.cli import main
from shared.cli.engine_config import configuration
from shared.cli.flags import build_parser
from shared.cli.main import ROOT
from shared.engine.configuration import EngineConfig, read_catalog, worker_config
from shared.library.model_info import LoraFolders
from shared.weights.files import Folders
from shared.worker import worker
from tests.support.lora_writers import WRITERS, factors, save
from tests.support.waiting import LIMIT

MINI = {"layers.0.attention.to_q": (128, 128), "layers.1.feed_forward.w2": (128, 341)}
LARGE = {"layers.0.attention.to_q": (3840, 3840)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two LoRAs that can be used, by different models."""
    for name, shapes in (("a/mini.safetensors", MINI), ("large.safetensors", LARGE)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        save(tmp_path / name, WRITERS["musubi"][0](factors(shapes)))
    return tmp_path


def run(*arguments: object) -> int:
    return main.main([str(argument) for argument in arguments])


def test_every_file_is_judged_for_the_models_that_it_fits(
    folder: Path, capsys: pytest.CaptureFixture
) -> None:
    assert run("--check-loras", "--lora-dir-z-image", folder) == 0
    mini, large = capsys.readouterr().out.splitlines()
    assert mini.startswith("a/mini.safetensors: 2 of 2 modules, kohya, rank 4, alpha 2 (for Z-Image Mini, ")
    assert large.startswith("large.safetensors: 1 of 1 modules") and "Z-Image Turbo" in large
    assert run("--check-loras", "--lora-dir-z-image", folder, "--model", "z_image_base") == 1
    assert "a/mini.safetensors: refused: mini.safetensors does not fit Z-Image" in capsys.readouterr().out
    (folder / "cut.safetensors").write_bytes(b"x")
    assert run("--check-loras", "--lora-dir-z-image", folder) == 1
    assert "cut.safetensors: refused: " in capsys.readouterr().out


def test_checking_imports_no_torch(folder: Path) -> None:
    code = (
        "import sys; from shared.cli import main as cli\n"
        "code = cli.main(['--check-loras', '--lora-dir-z-image', sys.argv[1]])\n"
        "sys.exit('torch' if 'torch' in sys.modules else code)"
    )
    subprocess.run([sys.executable, "-c", code, folder], cwd=ROOT, check=True, timeout=LIMIT)


def test_a_file_is_converted_for_other_programs(folder: Path, capsys: pytest.CaptureFixture) -> None:
    out = folder / "out.safetensors"
    assert run("--convert-lora", folder / "a/mini.safetensors", out) == 0
    assert "2 of 2 modules" in capsys.readouterr().out
    made = load_file(out)
    for name, (a, b, alpha) in factors(MINI).items():
        key = f"transformer.{name}.lora_"
        delta = made[f"{key}B.weight"] @ made[f"{key}A.weight"]
        torch.testing.assert_close(delta, alpha / len(a) * (b @ a))
    assert run("--convert-lora", folder / "gone.safetensors", out) == 2
    assert "gone.safetensors cannot be read" in capsys.readouterr().err


def test_flags_that_would_do_nothing_are_refused(folder: Path, capsys: pytest.CaptureFixture) -> None:
    for arguments in (["--check-loras", "--list-models"], ["--check-loras", "--convert-lora", "a", "b"]):
        with pytest.raises(SystemExit):
            run(*arguments)
        assert "exclude each other" in capsys.readouterr().err


def test_a_presets_loras_are_the_defaults_of_jobs(folder: Path, capsys: pytest.CaptureFixture) -> None:
    preset = {"loras": ["a/mini.safetensors"], "loras_mult": "0.5", "prompt": "", "full_prompt": False}
    (folder / "mine.lset").write_text(json.dumps(preset))
    tasks = folder / "tasks.json"
    tasks.write_text(json.dumps([{"prompt": "x"}, {"prompt": "y", "activated_loras": []}]))
    flags = ["--process", tasks, "--dry-run", "--json", "--lora-dir-z-image", folder]
    assert run(*flags, "--lora-preset", "mine") == 0
    first, second = (json.loads(line)["settings"] for line in capsys.readouterr().out.splitlines())
    assert (first["activated_loras"], first["loras_multipliers"]) == (["a/mini.safetensors"], "0.5")
    assert second["activated_loras"] == []
    assert run(*flags, "--lora-preset", "other") == 2
    assert "There is no preset 'other'" in capsys.readouterr().err


def test_a_refused_lora_is_named_before_anything_runs(folder: Path, capsys: pytest.CaptureFixture) -> None:
    tasks = folder / "tasks.json"
    tasks.write_text(json.dumps({"prompt": "x", "activated_loras": ["large.safetensors"]}))
    assert run("--process", tasks, "--dry-run", "--lora-dir-z-image", folder) == 1
    assert "large.safetensors does not fit Z-Image" in capsys.readouterr().err


# -- folders ------------------------------------------------------------------------------------------------


def configured(config: dict, folder: Path, *flags: object) -> EngineConfig:
    (folder / "wgp_config.json").write_text(json.dumps(config))
    options = build_parser().parse_args(["--config", str(folder), *map(str, flags)])
    return configuration(options, ROOT, {})


def test_the_configuration_names_the_folders(tmp_path: Path) -> None:
    config = configured({"checkpoints_paths": ["/models", "ckpts"], "loras_root": "/styles"}, tmp_path)
    assert config.folders == Folders(ROOT, Path("/models"), (ROOT / "ckpts",))
    models = read_catalog(config).models
    assert models["z_image"].loras().folder == Path("/styles/z_image")
    for flags, expected in (
        (["--loras", "/mine"], Path("/mine/z_image")),
        (["--loras", "/mine", "--lora-dir-z-image", "here"], Path("here").absolute()),
    ):
        config = configured({"loras_root": "/styles"}, tmp_path, *flags)
        assert read_catalog(config).models["z_image_mini"].loras().folder == expected
        told, _ = worker._parse([worker_config(config).to_json()])
        assert told == worker_config(config) and told.lora_folders == config.lora_folders
        assert told.folders.others == (ROOT,)


def test_without_a_configuration_the_usual_folders_apply(tmp_path: Path) -> None:
    options = build_parser().parse_args([])
    config = configuration(options, tmp_path, {})
    assert config.folders == Folders(tmp_path, tmp_path / "ckpts", (tmp_path,))
    assert config.lora_folders == LoraFolders(tmp_path / "loras")


def test_a_damaged_configuration_is_said_on_the_screen_and_in_the_log(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "wgp_config.json").write_text("{")
    tasks = tmp_path / "tasks.json"
    tasks.write_text(json.dumps({"prompt": "x", "model_type": "nothing"}))
    said = subprocess.run(
        [sys.executable, "wgp.py", "--config", tmp_path, "--process", tasks],
        cwd=ROOT, capture_output=True, text=True, timeout=LIMIT,
    )  # fmt: skip
    assert "wgp_config.json cannot be read" in said.stderr and said.returncode == 1
    from shared.engine.engine import Engine

    config = EngineConfig.at(
        tmp_path, notices=("something is wrong",), worker_command=(sys.executable, "-c", "")
    )
    engine = Engine(config)
    engine.start()
    engine.stop()
    assert "something is wrong" in config.log_file.read_text()


def test_a_folder_that_is_a_file_is_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    place = tmp_path / "file"
    place.write_text("")
    assert run("--config", str(place), "--list-models") == 2
    assert str(place) in capsys.readouterr().err


def test_a_model_in_another_folder_is_found_and_loaded(tmp_path: Path) -> None:
    """Logic: the Mini's files, moved to a folder of the user's; nothing of them is in ckpts/."""
    from models.z_image.z_image_handler import family_handler

    source, mine = ROOT / "models/z_image/mini", tmp_path / "mine"
    mine.mkdir()
    shutil.copy(source / "transformer.safetensors", mine / "t.safetensors")
    shutil.copy(source / "vae/model.safetensors", mine / "v.safetensors")
    shutil.copytree(source / "text_encoder", mine / "encoder")
    definition = {
        **json.loads((ROOT / "defaults/z_image_mini.json").read_text("utf-8"))["model"],
        "URLs": ["https://example.com/t.safetensors"],
        "VAE_URLs": ["https://example.com/v.safetensors"],
        "text_encoder_URLs": ["https://example.com/model.safetensors"],
        "text_encoder_folder": "encoder",
    }
    folders = Folders(ROOT, tmp_path / "ckpts", (mine,))
    _, pipe = family_handler.load_model(
        "https://example.com/t.safetensors", "z_image", definition, device="cpu", prompt_cache=None,
        folders=folders,
    )  # fmt: skip
    how = dict(height=64, width=64, num_inference_steps=1, output_type="latent")
    assert pipe("a red circle", **how).images.isfinite().all()
    assert os.fspath(mine) in pipe.tokenizer.name_or_path


def test_the_folder_of_profiles_is_the_flags_the_files_or_the_usual_one(tmp_path: Path) -> None:
    assert EngineConfig.at(tmp_path).profiles_folder == tmp_path / "profiles"
    assert configured({}, tmp_path).profiles_folder == ROOT / "profiles"
    assert configured({"profiles_dir": "mine"}, tmp_path).profiles_folder == ROOT / "mine"
    told = configured({"profiles_dir": "mine"}, tmp_path, "--profiles-dir", "/here")
    assert told.profiles_folder == Path("/here")
