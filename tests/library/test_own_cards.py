"""The user's own models and the models' files: what a file is recognised as, the card that is written for it,
and what a removal would delete.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from shared.engine import custom_models, inventory
from shared.engine.configuration import EngineConfig
from shared.engine.engine import Engine
from shared.errors import UserError
from shared.gpu.planner import Machine
from shared.jobs.records import Job
from shared.settings.table import SettingsError
from shared.weights.files import Folders, Required
from tests.support.browser import ROOT
from tests.support.lora_writers import Style, factors, save
from tests.support.safetensors_bytes import safetensors, tensor

MINI = ROOT / "models" / "z_image" / "mini"
HF = "https://huggingface.co/DeepBeepMeep/Z-Image/resolve/main"
CPU = Machine("CPU", 16 << 30, 8 << 30)
WEIGHTS = safetensors({"a": tensor(0, 8)}, b"12345678")


@pytest.fixture
def engine(tmp_path):
    """A project with the shipped cards and the Minis' files, and room for a user's own."""
    if not (MINI / "transformer.safetensors").exists():
        pytest.skip("the Mini models' weights are not here")
    for name in ("finetunes", "ckpts", "comfy"):
        (tmp_path / name).mkdir()
    shutil.copytree(ROOT / "defaults", tmp_path / "defaults")
    (tmp_path / "models").symlink_to(ROOT / "models")
    others = (tmp_path / "comfy", tmp_path)
    return Engine(EngineConfig.at(tmp_path, others=others, warm=False, gpu="cpu"))


def put(engine, name: str, content: bytes | None = None, like: str = "transformer.safetensors"):
    path = engine.config.root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes((MINI / like).read_bytes() if content is None else content)
    return path


def ids(found) -> list[str]:
    return [info.id for info in found.like]


# ---- which files there are ---------------------------------------------------------------------------------


def test_the_list_has_the_files_of_the_folders_of_models_and_no_others(engine):
    for name in ("ckpts/a.safetensors", "ckpts/deep/er/b.safetensors", "comfy/unet/c.safetensors", "d.sft"):
        put(engine, name, WEIGHTS)
    for name in (
        "loras/z_image/l.safetensors",
        "ckpts/.cache/x.safetensors",
        "ckpts/a.txt",
        "n/e.safetensors",
    ):
        put(engine, name, WEIGHTS)
    put(engine, "ckpts/s-00001-of-00002.safetensors", WEIGHTS)
    put(engine, "ckpts/s-00002-of-00002.safetensors", WEIGHTS)
    assert list(custom_models.found_files(engine)) == [
        "ckpts/a.safetensors", "ckpts/s-00001-of-00002.safetensors", "ckpts/deep/er/b.safetensors",
        "comfy/unet/c.safetensors", "d.sft",
    ]  # fmt: skip
    for wrong in ("../etc/passwd", "/etc/passwd", "ckpts/a.txt", "ckpts/../d.sft", ""):
        with pytest.raises(UserError, match="not among the files"):
            custom_models.find_file(engine, wrong)


# ---- what a file is ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "like, role, models",
    [
        ("transformer.safetensors", "transformer", ["z_image_mini", "z_image_mini_base"]),
        ("transformer_twinflow.safetensors", "transformer", ["z_image_mini_twinflow"]),
        ("control.safetensors", "module0", ["z_image_mini_control2_1"]),
    ],
)
def test_a_file_is_recognised_by_its_tensors(engine, like, role, models):
    found = custom_models.recognise(engine, put(engine, "ckpts/renamed.safetensors", like=like))
    assert (found.role, found.label, ids(found)) == (role, "fp16", models)


def test_other_files_are_refused_in_words(engine):
    lora = engine.config.root / "ckpts" / "l.safetensors"
    save(lora, Style("diffusion_model.")(factors({"layers.0.attention.to_q": (64, 64)}, rank=4, alpha=8.0)))
    with pytest.raises(UserError, match=r"is a LoRA.*Put it into .*loras/z_image"):
        custom_models.recognise(engine, lora)
    with pytest.raises(UserError, match="not a Z-Image transformer but a VAE"):
        custom_models.recognise(engine, put(engine, "ckpts/v.safetensors", like="vae/model.safetensors"))
    with pytest.raises(UserError, match="its header says"):
        custom_models.recognise(engine, put(engine, "ckpts/cut.safetensors", WEIGHTS[:-1]))


def test_an_incomplete_transformer_and_one_of_another_size_are_refused(engine):
    tensors = load_file(MINI / "transformer.safetensors")
    path = engine.config.root / "ckpts" / "t.safetensors"
    without = {
        name: value for name, value in tensors.items() if not name.startswith("layers.1.feed_forward.w2")
    }
    save_file(without, path)
    with pytest.raises(UserError, match="incomplete, or a transformer of another size|of another size"):
        custom_models.recognise(engine, path)
    name = next(name for name in tensors if "x_embedder" in name and name.endswith("weight"))
    save_file({**tensors, name: torch.zeros(8, 64)}, path)
    with pytest.raises(UserError, match="another size"):
        custom_models.recognise(engine, path)


# ---- the card ----------------------------------------------------------------------------------------------


def test_a_card_is_written_and_used_at_once(engine):
    put(engine, "ckpts/sub/mine.safetensors")
    info = custom_models.add(
        engine, "ckpts/sub/mine.safetensors", "z_image_mini_base", " My  Model ", "Drawn by me.",
        {"num_inference_steps": 12, "guidance_scale": 3.0, "seed": 5},
    )  # fmt: skip
    assert (info.id, info.name, info.available, info.description) == (
        "my_model",
        "My Model",
        True,
        "Drawn by me.",
    )
    content = json.loads((engine.config.root / "finetunes" / "my_model.json").read_text())
    assert content["model"]["URLs"] == ["sub/mine.safetensors"]
    assert content["model"]["VAE_URLs"] == "z_image_mini_base"
    assert (info.defaults["num_inference_steps"], info.defaults["guidance_scale"]) == (12, 3.0)
    base = engine.catalog.models["z_image_mini_base"]
    assert "seed" not in content and info.capabilities == base.capabilities
    assert info.defaults["resolution"] == base.defaults["resolution"]
    assert not list((engine.config.root / "finetunes").glob(".*"))


def test_a_control_networks_card_takes_the_transformer_of_the_model_it_works_like(engine):
    put(engine, "comfy/net.safetensors", like="control.safetensors")
    info = custom_models.add(engine, "comfy/net.safetensors", "z_image_mini_control2_1", "Net", "", {})
    assert info.card.model["modules"] == [["net.safetensors"]]
    assert info.card.model["URLs"] == engine.catalog.models["z_image_mini"].card.model["URLs"]
    assert info.available


def test_no_card_is_overwritten_and_no_broken_one_is_written(engine):
    put(engine, "ckpts/a.safetensors")
    (engine.config.root / "finetunes" / "mine.json").write_text("{broken")
    folder = engine.config.root / "finetunes"

    def add(name, like="z_image_mini", **defaults):
        return custom_models.add(engine, "ckpts/a.safetensors", like, name, "", defaults)

    assert add("Mine").id == "mine_2" and (folder / "mine.json").read_text() == "{broken"
    assert add("图").id == "model" and add("CON").id == "my_con" and add("z image").id == "z_image_2"
    for name, like, said in (
        ("mine", "z_image_mini", "a model called mine already"), ("", "z_image_mini", "1 to 100"),
        ("x", "z_image", "works like"), ("x" * 101, "z_image_mini", "1 to 100"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=said):
            add(name, like)
    with pytest.raises(SettingsError):
        add("steps", num_inference_steps=0)
    assert not (folder / "steps.json").exists()


def test_a_name_that_stands_for_two_files_is_refused(engine, tmp_path_factory):
    put(engine, "ckpts/a.safetensors")
    inside = put(engine, "comfy/a.safetensors")
    info = custom_models.add(engine, "comfy/a.safetensors", "z_image_mini", "Mine", "", {})
    assert info.card.model["URLs"] == ["comfy/a.safetensors"]
    outside = tmp_path_factory.mktemp("elsewhere") / "a.safetensors"
    shutil.copy(inside, outside)
    engine.config = replace(engine.config, others=(outside.parent,))
    with pytest.raises(UserError, match="rename this"):
        custom_models.add(engine, str(outside), "z_image_mini", "Other", "", {})


def test_a_card_is_changed_and_forgotten(engine):
    weights = put(engine, "ckpts/a.safetensors")
    custom_models.add(engine, "ckpts/a.safetensors", "z_image_mini", "Mine", "", {})
    changed = custom_models.change(engine, "mine", "Ours", "New.", {"num_inference_steps": 4})
    assert (changed.id, changed.name, changed.description) == ("mine", "Ours", "New.")
    assert changed.defaults["num_inference_steps"] == 4 and changed.available
    with pytest.raises(UserError, match="comes with the program"):
        custom_models.change(engine, "z_image_mini", "Ours", "", {})
    with pytest.raises(UserError, match="comes with the program"):
        custom_models.forget(engine, "z_image")
    job_id = engine.store.submit({"model_type": "mine"})
    with pytest.raises(UserError, match=f"Job {job_id} in the queue"):
        custom_models.forget(engine, "mine")
    engine.cancel(job_id)
    custom_models.forget(engine, "mine")
    assert "mine" not in engine.catalog.models and weights.exists()


# ---- what there is -----------------------------------------------------------------------------------------


def test_the_built_in_models_come_first_and_what_is_missing_is_estimated(engine):
    stocks = inventory.take_stock(engine)
    assert [one.built_in for one in stocks] == sorted((one.built_in for one in stocks), reverse=True)
    assert stocks[0].info.id == "z_image_mini" and stocks[0].missing_size == 0
    turbo = next(one for one in stocks if one.info.id == "z_image")
    assert turbo.size == 0 and turbo.missing_size > 4e9 and turbo.forecast.seconds is None
    assert "on the CPU" in turbo.forecast.memory


def test_the_published_sizes_are_met(engine):
    """The files' lengths as the hub lists them."""
    handler = engine.catalog.models["z_image"].handler
    folders = Folders(engine.config.root, engine.config.ckpts)

    def size(role, name):
        one = Required(role, [f"{HF}/{name}"])
        return handler.query_download_bytes("z_image", {"URLs": []}, one, one.alternatives[0], folders)

    assert size("transformer", "ZImageTurbo_bf16.safetensors") == pytest.approx(12.31e9, rel=0.01)
    assert size("text_encoder", "Qwen3/qwen3_bf16.safetensors") == pytest.approx(8.04e9, rel=0.01)
    assert size("vae", "ZImageTurbo_VAE_bf16.safetensors") == pytest.approx(0.168e9, rel=0.01)
    assert size("merges.txt", "merges.txt") == 0


@pytest.mark.parametrize(
    "model_id, size",
    [("z_image_control", 3.10e9), ("z_image_control2", 6.71e9), ("z_image_control2_1_8s", 6.71e9),
     ("z_image_control2_1_lite", 2.02e9)],
)  # fmt: skip
def test_the_published_sizes_of_control_networks_are_met(engine, model_id, size):
    info = engine.catalog.models[model_id]
    one = next(one for one in info.required if one.role == "module0")
    found = info.handler.query_download_bytes(info.architecture, info.card.model, one, one.alternatives[0])
    assert found == pytest.approx(size, rel=0.01)


def test_a_card_whose_file_is_gone_is_in_the_list_with_a_reason(engine):
    weights = put(engine, "ckpts/a.safetensors")
    custom_models.add(engine, "ckpts/a.safetensors", "z_image_mini", "Mine", "", {})
    weights.unlink()
    engine.reload_catalog()
    mine = next(one for one in inventory.take_stock(engine) if one.info.id == "mine")
    assert "a.safetensors is in none of the folders of models" in mine.forecast.problem
    assert [item.name for item in mine.missing] == ["a.safetensors"]


def test_a_damaged_file_says_so(engine):
    put(engine, "ckpts/ZImageTurbo_bf16.safetensors", WEIGHTS[:-1])
    turbo = next(one for one in inventory.take_stock(engine) if one.info.id == "z_image")
    assert "its header says" in turbo.here[0].problem


def test_seconds_are_the_median_of_jobs_like_this():
    def job(seconds, **settings):
        made = {
            "model_type": "m",
            "resolution": "64x64",
            "num_inference_steps": 8,
            "batch_size": 1,
            **settings,
        }
        one = Job(1, "done", made, "ui", None, 1, "", 0, 0, None, None)
        return replace(one, started=100.0, finished=100.0 + seconds)

    defaults = {"model_type": "m", "resolution": "64x64", "num_inference_steps": 8}
    jobs = [job(2), job(8, batch_size=2), job(3), job(99, num_inference_steps=9), job(99, resolution="8x8")]
    assert inventory.measured_seconds(jobs, defaults) == [2, 4, 3]


# ---- removal -----------------------------------------------------------------------------------------------


def downloaded(engine, *names):
    """Files as downloads of the 6B models would leave them."""
    for name in names:
        put(engine, f"ckpts/{name}", WEIGHTS)
    engine.reload_catalog()


SHARED = ("Qwen3/qwen3_bf16.safetensors", "ZImageTurbo_VAE_bf16.safetensors") + tuple(
    f"Qwen3/{name}"
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json", "config.json", "merges.txt")
)
TURBO, BASE = "ZImageTurbo_bf16.safetensors", "ZImageBase_bf16.safetensors"


def paths(engine, planned):
    return sorted(path.relative_to(engine.config.root).as_posix() for path, _ in planned)


def test_what_another_model_needs_stays(engine):
    downloaded(engine, TURBO, BASE, *SHARED)
    assert engine.catalog.models["z_image"].available and engine.catalog.models["z_image_base"].available
    planned = inventory.removal(engine, "z_image")
    assert paths(engine, planned.goes) == [f"ckpts/{TURBO}"] and planned.size == len(WEIGHTS)
    assert len(planned.stays) == len(SHARED) and all("Z-Image Base" in why for _, why in planned.stays)
    assert inventory.remove(engine, "z_image", planned.mark) == len(WEIGHTS)
    assert not engine.catalog.models["z_image"].available and engine.catalog.models["z_image_base"].available
    last = inventory.removal(engine, "z_image_base")
    assert len(last.goes) == 1 + len(SHARED) and not last.stays


def test_only_downloads_in_the_folder_of_downloads_go(engine):
    downloaded(engine, TURBO)
    put(engine, "comfy/qwen3_bf16.safetensors", WEIGHTS)
    put(engine, "ckpts/z_image_turbo_bf16.safetensors", WEIGHTS)  # put there by the user, for ComfyUI
    vae = put(engine, "comfy/vae.safetensors", WEIGHTS)
    (engine.config.ckpts / "ZImageTurbo_VAE_bf16.safetensors").symlink_to(vae)
    put(engine, "ckpts/ZImageTurbo_quanto_bf16_int8.safetensors.part", b"some")
    planned = inventory.removal(engine, "z_image")
    assert paths(engine, planned.goes) == [
        f"ckpts/{TURBO}",
        "ckpts/ZImageTurbo_quanto_bf16_int8.safetensors.part",
    ]
    assert {why for _, why in planned.stays} == {"not downloaded by ZGP"} and len(planned.stays) == 3
    inventory.remove(engine, "z_image", planned.mark)
    assert vae.exists() and (engine.config.ckpts / "ZImageTurbo_VAE_bf16.safetensors").exists()
    assert (engine.config.ckpts / "z_image_turbo_bf16.safetensors").exists()


def test_the_built_in_models_and_own_files_are_never_deleted(engine):
    put(engine, "ckpts/a.safetensors")
    custom_models.add(engine, "ckpts/a.safetensors", "z_image_mini", "Mine", "", {})
    for model_id in ("mine", "z_image_mini", "z_image_mini_control2_1"):
        assert inventory.removal(engine, model_id).goes == ()


def test_nothing_goes_that_was_not_shown_or_that_a_job_waits_for(engine):
    downloaded(engine, TURBO)
    shown = inventory.removal(engine, "z_image")
    put(engine, "ckpts/ZImageTurbo_quanto_bf16_int8.safetensors", WEIGHTS)
    with pytest.raises(UserError, match="changed meanwhile; nothing was deleted"):
        inventory.remove(engine, "z_image", shown.mark)
    engine.store.submit({"model_type": "z_image_control"})  # it uses Turbo's transformer
    with pytest.raises(UserError, match="in the queue needs these files"):
        inventory.remove(engine, "z_image", inventory.removal(engine, "z_image").mark)
    assert (engine.config.ckpts / TURBO).exists()
