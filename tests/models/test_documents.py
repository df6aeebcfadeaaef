"""The commands and lines of the model documents as they are printed: `hf download`, then a picture; and the
Quick Start with its import line changed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from PIL import Image

from models.z_image import pretrained
from models.z_image.pretrained import ZImagePipeline
from models.z_image.z_image_handler import family_handler
from shared.cli import main
from shared.errors import UserError
from shared.files import hashes
from shared.gpu import planner
from shared.weights import downloads
from shared.weights.files import Folders, describe
from tests.support import diffusers_folder, mini
from tests.support.cards import Card
from tests.support.hub_stand_in import HubStandIn, Stored

TURBO, BASE = "Tongyi-MAI/Z-Image-Turbo", "Tongyi-MAI/Z-Image"
PROMPT = "a large red heart on a white background"
SIZE = {"height": 128, "width": 128}
WGP = """
import sys
from pathlib import Path
from shared.cli.main import main
sys.exit(main(sys.argv[2:], root=Path(sys.argv[1])))
"""


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Mini as the repository of Turbo has its files."""
    return diffusers_folder.write(tmp_path_factory.mktemp("official") / "Z-Image-Turbo")


@pytest.fixture
def hub(official: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubStandIn]:
    with HubStandIn(TURBO) as hub:
        for path in official.rglob("*"):
            if path.is_file():
                stored = Stored(path.read_bytes(), large=path.suffix == ".safetensors")
                hub.files[path.relative_to(official).as_posix()] = stored
        hub.be_the_hub(monkeypatch)
        yield hub


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Folders:
    """An empty ckpts/, and an empty cache of the hub."""
    monkeypatch.setattr(hashes, "HASHES", tmp_path / "ckpts" / ".hashes.json")
    monkeypatch.setattr(downloads, "FIRST_PAUSE", 0.0)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    (tmp_path / "ckpts").mkdir()
    return Folders(tmp_path, tmp_path / "ckpts", (tmp_path / "own",))


def hf_download(*more: str) -> None:
    """`hf download Tongyi-MAI/Z-Image-Turbo` with the variable that the documents set."""
    command = [str(Path(sysconfig.get_path("scripts")) / "hf"), "download", TURBO, *more]
    subprocess.run(
        command, env=os.environ | {"HF_XET_HIGH_PERFORMANCE": "1"}, check=True, capture_output=True
    )


def small_card(name: str, **changes: object) -> dict:
    """A card of the program, with the Mini's sizes."""
    found = json.loads((mini.ROOT / "defaults" / f"{name}.json").read_text("utf-8"))
    small = {key: mini.model_def("z_image_mini")[key] for key in ("transformer_config", "vae_config")}
    found["model"] |= small | changes
    return found


def required(name: str) -> list:
    definition = small_card(name)["model"]
    if isinstance(definition["URLs"], str):
        definition["URLs"] = small_card(definition["URLs"])["model"]["URLs"]
    return family_handler.query_model_files(definition["architecture"], definition)


def missing(name: str, folders: Folders) -> list[str]:
    return [one.role for one in required(name) if not describe(one, folders).on_disk]


def difference(one: Image.Image, other: Image.Image) -> int:
    return int(np.abs(np.asarray(one, int) - np.asarray(other, int)).max())


# ---- hf download -------------------------------------------------------------------------------------------


def test_what_hf_download_puts_into_its_cache_is_found(hub: HubStandIn, folders: Folders) -> None:
    assert missing("z_image", folders)
    hf_download()
    assert not missing("z_image", folders)
    assert missing("z_image_control2_1", folders) == ["module0"]  # the control network alone
    assert missing("z_image_base", folders) == ["transformer"]  # another transformer, the same rest
    assert missing("z_image_twinflow_turbo", folders) == ["transformer"]


@pytest.mark.parametrize("place", ["ckpts/Z-Image-Turbo", f"own/{TURBO}", "own/Z-Image-Turbo"])
def test_what_hf_download_puts_into_a_folder_is_found(
    hub: HubStandIn, folders: Folders, place: str, tmp_path: Path
) -> None:
    hf_download("--local-dir", str(tmp_path / place))
    assert not missing("z_image", folders)
    assert missing("z_image_base", folders) == ["transformer"]


def test_the_folder_itself_may_be_among_the_folders(official: Path, folders: Folders) -> None:
    itself = Folders(folders.root, folders.ckpts, (official,))
    assert not missing("z_image", itself)
    assert missing("z_image_base", itself) == ["transformer"]


def test_base_is_found_under_its_own_name(official: Path, folders: Folders) -> None:
    shutil.copytree(official, folders.ckpts / "Z-Image")
    assert not missing("z_image_base", folders)
    assert missing("z_image", folders) == ["transformer"]


@pytest.mark.parametrize(
    ("gone", "role"),
    [
        ("transformer/diffusion_pytorch_model-00002-of-00006.safetensors", "transformer"),
        ("text_encoder/model-00005-of-00005.safetensors", "text_encoder"),
        ("tokenizer/merges.txt", "merges.txt"),
    ],
)
def test_what_a_stopped_download_lacks_is_missing(
    official: Path, folders: Folders, gone: str, role: str
) -> None:
    copy = shutil.copytree(official, folders.ckpts / "Z-Image-Turbo")
    (copy / gone).unlink()
    assert missing("z_image", folders) == [role]
    (copy / gone).parent.joinpath(f"{Path(gone).stem.partition('-')[0]}.safetensors.index.json").unlink(True)
    assert missing("z_image", folders) == [role]  # the shards' own names tell, too


def test_a_shard_that_is_still_coming_is_missing(hub: HubStandIn, folders: Folders) -> None:
    """A cache whose links were made and one of whose blobs was not."""
    hf_download()
    (shard,) = (folders.root / "hf").rglob("snapshots/*/transformer/*-00003-of-00006.safetensors")
    shard.resolve().unlink()
    assert missing("z_image", folders) == ["transformer"]


@pytest.mark.skipif(os.name == "nt", reason="holes take their full size there")
def test_the_real_sizes_are_found_and_planned(
    folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """20 GB of holes in the hub's cache, under diffusers' names and shapes; the program's own cards."""
    cache = Path(constants.HF_HUB_CACHE) / "models--Tongyi-MAI--Z-Image-Turbo"
    snapshot = cache / "snapshots" / ("c" * 40)
    diffusers_folder.write_holes(snapshot)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("c" * 40)
    shutil.copytree(mini.ROOT / "defaults", tmp_path / "defaults")
    (tmp_path / "finetunes").mkdir()
    shutil.copytree(mini.ROOT / "models" / "z_image" / "mini", tmp_path / "models" / "z_image" / "mini")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert main.main(["--list-models", "--json"], root=tmp_path) == 0
    listed = {row["id"]: row for row in map(json.loads, capsys.readouterr().out.splitlines())}
    assert listed["z_image"]["available"] and 20.3e9 < listed["z_image"]["size_bytes"] < 20.7e9
    assert len(listed["z_image_control"]["missing"]) == len(listed["z_image_base"]["missing"]) == 1

    definition = json.loads((mini.ROOT / "defaults/z_image.json").read_text("utf-8"))["model"]
    offers = family_handler.query_offers("z_image", definition, folders)
    here = [variant for variant in offers.transformer if variant.on_disk]
    assert [(one.source, one.kind) for one in here] == [(f"hf://{TURBO}/transformer", "bf16")]
    assert here[0].size.total == 2 * 6_154_908_736
    needs = family_handler.query_memory("z_image", definition, {"resolution": "1024x1024"}, folders)
    gib = 1 << 30
    machine = planner.Machine("Card", 32 * gib, 28 * gib, 12 * gib, 11 * gib, (8, 6))
    made = planner.plan(machine, offers, needs, planner.Overrides())
    assert made.transformer.source == here[0].source  # not the int8 file that is to be downloaded


@pytest.mark.slow
@pytest.mark.parametrize("local", [False, True], ids=["cache", "local-dir"])
def test_the_program_draws_offline_with_what_hf_downloaded(
    hub: HubStandIn, folders: Folders, tmp_path: Path, local: bool
) -> None:
    hf_download(*(["--local-dir", str(tmp_path / "ckpts" / "Z-Image-Turbo")] if local else []))
    hub.asked.clear()
    (tmp_path / "defaults").mkdir()
    (tmp_path / "finetunes").mkdir()
    net = "Z-Image-Turbo-Fun-Controlnet-Union-2.1.safetensors"
    shutil.copy(mini.ROOT / "models/z_image/mini/control.safetensors", folders.ckpts / net)
    for name in ("z_image", "z_image_control2_1"):
        (tmp_path / "defaults" / f"{name}.json").write_text(json.dumps(small_card(name)))
    job = {"prompt": PROMPT, "resolution": "128x128", "seed": 3, "num_inference_steps": 8}
    jobs = [job | {"model_type": name} for name in ("z_image", "z_image_control2_1")]
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))

    def wgp(*arguments: str) -> str:
        command = [sys.executable, "-c", WGP, str(tmp_path), *arguments]
        offline = os.environ | {"HF_HUB_OFFLINE": "1"}
        return subprocess.run(
            command, env=offline, cwd=mini.ROOT, capture_output=True, text=True, check=True
        ).stdout

    listed = {row["id"]: row for row in map(json.loads, wgp("--list-models", "--json").splitlines())}
    assert listed["z_image"]["available"] and listed["z_image_control2_1"]["available"]
    wgp("--process", str(tmp_path / "jobs.json"))
    pictures = sorted((tmp_path / "outputs").rglob("*.png"))
    assert len(pictures) == 2 and hub.asked == []
    _, pipe = mini.load()
    ours = pipe(prompt=PROMPT, **SIZE, generator=torch.Generator().manual_seed(3)).images[0]
    assert all(difference(Image.open(picture), ours) <= 1 for picture in pictures)  # no control picture


def test_a_configuration_that_computes_differently_is_refused(official: Path, folders: Folders) -> None:
    copy = shutil.copytree(official, folders.ckpts / "Z-Image-Turbo")
    config = json.loads((copy / "vae/config.json").read_text("utf-8"))
    (copy / "vae/config.json").write_text(json.dumps(config | {"scaling_factor": 0.18215}))
    with pytest.raises(UserError, match=r"config\.json has scaling_factor = 0\.18215, and .* with 0\.3611"):
        family_handler.load_model(
            copy / "transformer", "z_image", small_card("z_image")["model"], device="cpu", folders=folders
        )


def test_the_int8_form_of_shards_goes_where_the_card_looks(official: Path, folders: Folders) -> None:
    """Not into the hub's cache. The next start then has the choice of both."""
    copy = shutil.copytree(official, folders.ckpts / "Z-Image-Turbo")
    definition = small_card("z_image")["model"]
    family_handler.load_model(
        copy / "transformer", "z_image", definition, device="cpu", folders=folders, save_quantized=True
    )
    offers = family_handler.query_offers("z_image", definition, folders)
    here = [(variant.kind, Path(variant.source).name) for variant in offers.transformer if variant.on_disk]
    assert here == [("int8", "ZImageTurbo_quanto_bf16_int8.safetensors"), ("fp32", "transformer")]


# ---- from_pretrained ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pipe(official: Path) -> ZImagePipeline:
    return ZImagePipeline.from_pretrained(official, torch_dtype=torch.float32, low_cpu_mem_usage=False)


@pytest.mark.parametrize("levels", [1, 2, 5])
def test_a_step_is_a_noise_level_and_the_last_one_is_zero(pipe: ZImagePipeline, levels: int) -> None:
    """diffusers up to 0.37 with sigma_min = 0: linspace(1, 0, N), of which the last forward has no length."""
    reference = diffusers_folder.reference()
    sigmas = [1.0] if levels == 1 else torch.linspace(1, 0, levels).tolist()
    start = torch.randn(1, 16, 16, 16, generator=torch.Generator().manual_seed(1))
    common = dict(prompt=PROMPT, guidance_scale=0.0, output_type="latent", **SIZE)
    theirs = reference(**common, num_inference_steps=levels, sigmas=sigmas, latents=start.clone()).images
    seen: list[int] = []
    ours = pipe(
        **common, num_inference_steps=levels, latents=start, callback=lambda i, n, x: seen.append(n)
    ).images
    torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=2e-4)
    assert seen == [max(1, levels - 1)] * max(1, levels - 1)


def test_the_base_classs_steps_stay_forwards(official: Path, pipe: ZImagePipeline) -> None:
    _, plain = mini.load()
    common = dict(prompt=PROMPT, guidance_scale=0.0, **SIZE)
    (nine,) = pipe(**common, num_inference_steps=5, generator=torch.Generator().manual_seed(7)).images
    (eight,) = plain(**common, num_inference_steps=4, generator=torch.Generator().manual_seed(7)).images
    assert difference(nine, eight) <= 1


KINDS = [
    # folder, shift, what it was saved from -> Base?
    ("Z-Image", 3.0, None, True),
    ("Z-Image-Turbo", 6.0, None, False),
    ("models--Tongyi-MAI--Z-Image/snapshots/abc", 3.0, None, True),
    ("models--Tongyi-MAI--Z-Image-Turbo/snapshots/abc", 6.0, None, False),
    ("mine", 6.0, None, True),
    ("mine", 3.0, None, False),
    ("mine", 3.0, "Tongyi-MAI/Z-Image", True),
    ("mine", 5.0, "Tongyi-MAI/Z-Image-Turbo", False),
    ("mine", 5.0, None, False),
]


@pytest.mark.parametrize(("name", "shift", "saved_from", "base"), KINDS)
def test_a_folder_says_whether_it_is_base(
    official: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture,
    name: str, shift: float, saved_from: str | None, base: bool,
) -> None:  # fmt: skip
    """Turbo takes 8 steps without guidance, Base 30 with guidance 4 (the model cards' own values)."""
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    folder = shutil.copytree(official, tmp_path / name)
    config = {"shift": shift, "num_train_timesteps": 1000}
    (folder / "scheduler/scheduler_config.json").write_text(json.dumps(config))
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(
        json.dumps({**index, **({"_name_or_path": saved_from} if saved_from else {})})
    )
    usual = ZImagePipeline.from_pretrained(folder).usual
    assert (usual.num_inference_steps, usual.guidance_scale) == ((30, 4.0) if base else (8, 0.0))
    assert ("does not say whether" in caplog.text) == (shift == 5.0 and not saved_from)


def test_what_the_transformer_was_saved_from_tells(official: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(official, tmp_path / "mine")
    config = json.loads((folder / "transformer/config.json").read_text("utf-8"))
    (folder / "transformer/config.json").write_text(json.dumps(config | {"_name_or_path": BASE}))
    assert pretrained.kind_of(folder) == "z_image_base"


@pytest.mark.skipif(os.name == "nt", reason="links need rights there")
def test_the_name_that_the_caller_uses_tells(official: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(official, tmp_path / "mine")
    (tmp_path / "Z-Image").symlink_to(folder)
    assert ZImagePipeline.from_pretrained(tmp_path / "Z-Image").usual.num_inference_steps == 30


def test_the_call_has_the_last_word_on_what_a_folder_is(official: Path) -> None:
    made = ZImagePipeline.from_pretrained(official, base_model_type="z_image_base")
    assert made.usual.num_inference_steps == 30
    with pytest.raises(UserError, match="base_model_type came as 'sdxl'; expected z_image or z_image_base"):
        ZImagePipeline.from_pretrained(official, base_model_type="sdxl")


def test_the_folders_own_schedule_is_used(official: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(official, tmp_path / "copy")
    (copy / "scheduler/scheduler_config.json").write_text('{"shift": 5.5, "num_train_timesteps": 1000}')
    assert ZImagePipeline.from_pretrained(str(copy)).scheduler_config["shift"] == 5.5


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda folder: (folder / "model_index.json").unlink(), "has no model_index.json"),
        (lambda folder: shutil.rmtree(folder / "tokenizer"), "has no tokenizer/tokenizer_config.json"),
        (
            lambda folder: next((folder / "transformer").glob("*00002*")).unlink(),
            "has no complete weights in transformer",
        ),
        (
            lambda folder: (folder / "model_index.json").write_text('{"transformer": ["diffusers", "Flux"]}'),
            "names Flux as transformer; expected ZImageTransformer2DModel",
        ),
    ],
)
def test_a_folder_of_something_else_is_refused(official: Path, tmp_path: Path, change, words: str) -> None:
    copy = shutil.copytree(official, tmp_path / "copy")
    change(copy)
    with pytest.raises(UserError, match=words):
        ZImagePipeline.from_pretrained(copy)


@pytest.mark.parametrize("source", ["nowhere", "a/b/c", "../up", ""])
def test_a_name_that_is_nothing_is_refused(source: str, folders: Folders) -> None:
    with pytest.raises(UserError, match="neither a folder here nor the name of a repository"):
        ZImagePipeline.from_pretrained(source or "?", folders=folders)


def test_a_repository_is_fetched_once_and_then_used_offline(
    hub: HubStandIn, folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.files["transformer/old.bin"] = Stored(b"a pickle")
    made = ZImagePipeline.from_pretrained(TURBO, folders=folders)
    assert made.transformer.config.dim == 128
    place = folders.ckpts / "Z-Image-Turbo"
    assert not (place / "transformer/old.bin").exists() and not (place / "README.md").exists()
    assert not missing("z_image", folders)  # the program's cards have it as well
    hub.asked.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    ZImagePipeline.from_pretrained(TURBO, folders=folders)
    assert hub.asked == []
    next(place.rglob("*00002-of-00006.safetensors")).unlink()
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        ZImagePipeline.from_pretrained(TURBO, folders=folders)
    with pytest.raises(UserError, match="leave out local_files_only"):
        ZImagePipeline.from_pretrained(TURBO, folders=folders, local_files_only=True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    ZImagePipeline.from_pretrained(TURBO, folders=folders)
    assert len(hub.bytes_asked()) == 1  # the shard that was gone


def test_a_repository_in_the_hubs_cache_is_used_where_it_lies(hub: HubStandIn, folders: Folders) -> None:
    hf_download()
    hub.asked.clear()
    ZImagePipeline.from_pretrained(TURBO, folders=folders, local_files_only=True)
    assert hub.asked == [] and not any(folders.ckpts.iterdir())


def test_a_repository_that_is_not_there_is_told(hub: HubStandIn, folders: Folders) -> None:
    with pytest.raises(UserError, match="someone/else cannot be had from the hub"):
        ZImagePipeline.from_pretrained("someone/else", folders=folders)


# ---- devices -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("move", ["to", "enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_a_card_that_is_not_there_is_told(pipe: ZImagePipeline, move: str, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="finds no graphics card 'cuda' here"):
        getattr(pipe, move)("cuda")
    with pytest.raises(UserError, match="expected cuda, cuda:1 or cpu"):
        pipe.to("gpu")
    assert pipe.to("cpu") is pipe


@pytest.mark.parametrize(
    ("move", "stay"),
    [
        ("to", {"ZImageTransformer2DModel", "Qwen3Model", "AutoencoderKL"}),
        ("enable_model_cpu_offload", {"AutoencoderKL"}),
        ("enable_sequential_cpu_offload", {"AutoencoderKL"}),
    ],
)
def test_where_the_parts_are_after_a_picture(
    official: Path, card: Card, move: str, stay: set[str]
) -> None:
    made = ZImagePipeline.from_pretrained(official, dtype=torch.float32)
    settings = dict(prompt=PROMPT, num_inference_steps=3, output_type="latent", **SIZE)
    plain = made(**settings, generator=torch.Generator().manual_seed(1)).images
    made.residency = card.residency()
    getattr(made, move)("cpu")
    made.prompt_cache = type(made.prompt_cache)()  # so that the text encoder works again
    again = made(**settings, generator=torch.Generator().manual_seed(1)).images
    assert torch.equal(plain, again)
    made(**settings | {"output_type": "pil"}, generator=torch.Generator().manual_seed(1))
    status = made.residency.status()
    assert {name for name, count in status.on_card.items() if count} == stay
    streamed = status.moved["ZImageTransformer2DModel"] > sum(
        x.nbytes for x in made.transformer.state_dict().values()
    )
    assert streamed == (move == "enable_sequential_cpu_offload")


# ---- the lines ---------------------------------------------------------------------------------------------


README = (mini.ROOT / "README.md").read_text("utf-8")
DOCUMENT = """
import torch
from modelscope import ZImagePipeline

# 1. Load the pipeline
# Use bfloat16 for optimal performance on supported GPUs
pipe = ZImagePipeline.from_pretrained(
    "Tongyi-MAI/Z-Image-Turbo",
    torch_dtype=torch.bfloat16,
    low_cpu_mem_usage=False,
)
pipe.to("cuda")

# [Optional] Attention Backend
# Diffusers uses SDPA by default. Switch to Flash Attention for better efficiency:
pipe.transformer.set_attention_backend("flash") # Enable Flash-Attention-2
pipe.transformer.set_attention_backend("_flash_3") # Enable Flash-Attention-3

# [Optional] Model Compilation
# Compiling the DiT model accelerates inference, but first run takes longer:
# pipe.transformer.compile()

# [Optional] CPU Offloading
# Enable CPU offloading for memory-constrained devices:
pipe.enable_model_cpu_offload()

prompt = "Young Chinese woman in red Hanfu, intricate embroidery..."

# 2. Generate Image
image = pipe(
    prompt=prompt,
    height=1024,
    width=1024,
    num_inference_steps=9,  # This actually results in 8 DiT forwards
    guidance_scale=0.0,     # Guidance should be 0 for Turbo models
    generator=torch.Generator("cuda").manual_seed(42),
).images[0]

image.save("example.png")
"""
OURS = "from models.z_image.pretrained import ZImagePipeline"
(IN_README,) = re.findall(rf"```python\n(import torch\n{re.escape(OURS)}\n.+?)```", README, re.S)


@pytest.mark.parametrize(
    ("lines", "card_is_played"),
    [(DOCUMENT, True), (DOCUMENT, False), (IN_README, True)],
    ids=["document", "document on the CPU", "README"],
)
def test_the_quick_start_runs_with_its_import_line_changed(
    hub: HubStandIn,
    folders: Folders,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    lines: str,
    card_is_played: bool,
) -> None:
    """As printed, with a CPU that answers to "cuda"; and with "cpu" in its place. Size and prompt are the
    Mini's.
    """
    lines = lines.replace("from modelscope import ZImagePipeline", OURS).replace("1024", "128")
    lines = re.sub(r'prompt = ".*"', f'prompt = "{PROMPT}"', lines)
    if card_is_played:
        generator = torch.Generator
        monkeypatch.setattr(torch, "Generator", lambda device: generator(device.replace("cuda", "cpu")))
        monkeypatch.setattr(pretrained, "device_of", lambda wanted: torch.device("cpu"))
    else:
        lines = lines.replace('"cuda"', '"cpu"').replace("_offload()", '_offload("cpu")')
    monkeypatch.setattr(pretrained, "DEFAULT_FOLDERS", folders)
    monkeypatch.chdir(tmp_path)
    exec(compile(lines, "quick start", "exec"), {})
    made = Image.open(tmp_path / "example.png")
    reference = diffusers_folder.reference().to(torch.bfloat16)
    seed = torch.Generator("cpu").manual_seed(42)
    (theirs,) = reference(PROMPT, **SIZE, num_inference_steps=8, guidance_scale=0.0, generator=seed).images
    far = np.abs(np.asarray(made, int) - np.asarray(theirs, int))
    assert made.size == (128, 128) and far.mean() < 2  # two roads in bfloat16
