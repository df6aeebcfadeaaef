"""The second pass, upscaling and extending, as jobs of the Mini models."""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from models.z_image.tiles import LatentTiles
from models.z_image.z_image_handler import family_handler
from shared.errors import Cancelled, UserError
from shared.imaging import metadata
from shared.imaging.hires import FOLDERS, Hires, run_sizes, upscalers
from shared.imaging.upscale import upscaler
from shared.jobs.store import JobStore
from shared.jobs.upscale_job import upscale_settings
from shared.library.catalog import catalog
from shared.settings.table import SettingsError
from shared.weights.files import Folders
from shared.worker.model_manager import ModelHost, Silent
from shared.worker.worker import Worker
from tests.support import mini

ROOT = mini.ROOT
PROMPT = "a large green star on a yellow background"
MINI, BASE, TWIN, CONTROL = (f"z_image_mini{name}" for name in ("", "_base", "_twinflow", "_control2_1"))
HERE = Folders(ROOT, ROOT / "ckpts")
LANCZOS = Image.Resampling.LANCZOS


@functools.cache
def models() -> Any:
    return catalog(ROOT, ROOT / "ckpts")


@functools.cache
def processor(card: str) -> Any:
    definition = mini.model_def(card)
    files = [definition["URLs"][0], *(files[0] for files in definition.get("modules", []))]
    return family_handler.load_model(
        files, definition["architecture"], definition, device="cpu", prompt_cache=None
    )[0]


def settings(card: str = MINI, **values: Any) -> dict[str, Any]:
    """Complete ones, as a job has them."""
    given = {"model_type": card, "prompt": PROMPT, "num_inference_steps": 2, "hires_scale": 1.5, **values}
    return models().validate(given).settings


def run(given: dict[str, Any], seeds: list[int], **watch: Any) -> Any:
    silent = {"on_phase": lambda phase: None, "on_step": lambda *step: None, "interrupt": lambda: False}
    return processor(given["model_type"]).generate(given, seeds=seeds, **{**silent, **watch})


def made(card: str = MINI, seed: int = 5, **values: Any) -> np.ndarray:
    return np.asarray(run(settings(card, **values), [seed]).images[0])


def photograph(size: tuple[int, int]) -> Image.Image:
    width, height = size
    y, x = np.mgrid[:height, :width]
    waves = np.stack([np.sin(x / 7), np.cos(y / 5), np.sin((x + y) / 11)], axis=-1)
    return Image.fromarray(((waves + 1) * 127).astype(np.uint8))


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    photograph((131, 117)).save(path)
    return path


def white(path: Path, size: tuple[int, int], box: tuple[int, int, int, int]) -> Path:
    mask = Image.new("L", size)
    mask.paste(255, box)
    mask.save(path)
    return path


# ---- the second pass ---------------------------------------------------------------------------------------


def test_it_is_image_to_image_on_the_enlarged_picture() -> None:
    """By hand: the pipeline, Pillow's Lanczos, the pipeline again with the same generator."""
    pipe, generator = processor(MINI).pipe, torch.Generator().manual_seed(5)
    how: dict[str, Any] = {"num_inference_steps": 2, "generator": generator}
    first = pipe(PROMPT, width=128, height=128, **how).images[0]
    larger = first.resize((192, 192), LANCZOS)
    how |= {"num_inference_steps": 6, "image": larger, "denoising_strength": 0.5}
    second = pipe(PROMPT, width=192, height=192, **how).images[0]
    assert np.array_equal(made(hires_denoising_strength=0.5, hires_steps=6), np.asarray(second))
    assert np.array_equal(made(hires_denoising_strength=0), np.asarray(larger))


def test_a_scale_of_one_is_the_plain_picture_bit_for_bit() -> None:
    others = {"hires_denoising_strength": 0.9, "hires_steps": 7, "hires_tile": 64}
    assert np.array_equal(made(hires_scale=1, **others), made(hires_scale=1))
    assert made(hires_scale=1).shape == (128, 128, 3)


@pytest.mark.parametrize(
    "change",
    [
        {"hires_scale": 1.6}, {"hires_denoising_strength": 0.6}, {"hires_steps": 8}, {"hires_tile": 128},
    ],
    ids=str,
)  # fmt: skip
def test_every_setting_changes_the_picture(change: dict) -> None:
    given = {"hires_denoising_strength": 0.5}
    assert not np.array_equal(made(**given), made(**given | change))


@pytest.mark.parametrize(("card", "tile"), [(MINI, 0), (MINI, 128), (BASE, 128), (TWIN, 128), (CONTROL, 128)])
def test_a_picture_of_a_batch_is_the_same_alone(card: str, tile: int, photo: Path) -> None:
    guide = {"image_guide": str(photo)} if card == CONTROL else {}
    given = settings(card, hires_tile=tile, image_start=str(photo), **guide)
    together = run(given, [5, 6]).images
    alone = run(given, [6]).images[0]
    assert alone.size == (192, 192) and alone.tobytes() == together[1].tobytes()
    assert alone.tobytes() != together[0].tobytes()
    plain = run({**given, "hires_scale": 1.0}, [6]).images[0].resize((192, 192), LANCZOS)
    assert plain.tobytes() != alone.tobytes()


def test_negative_prompts_and_loras_act_in_it(photo: Path) -> None:
    """Begun from a picture at strength 0, the second pass is all that there is."""
    given = {"image_start": str(photo), "denoising_strength": 0, "hires_denoising_strength": 0.6}
    guided = [made(BASE, guidance_scale=scale, **given) for scale in (1, 4)]
    assert not np.array_equal(*guided)
    nag = [made(MINI, NAG_scale=scale, negative_prompt="green", **given) for scale in (1, 4)]
    assert not np.array_equal(*nag)


@pytest.mark.parametrize("tile", [0, 96])
def test_control_acts_in_it(photo: Path, tile: int) -> None:
    given = {"image_start": str(photo), "denoising_strength": 0, "hires_denoising_strength": 0.8}
    given |= {"hires_tile": tile, "image_guide": str(photo)}
    pictures = [made(CONTROL, control_net_weight=weight, **given) for weight in (0.0, 0.9)]
    assert not np.array_equal(*pictures)


@pytest.mark.parametrize("only", [False, True])
def test_what_a_mask_keeps_is_the_enlarged_picture(photo: Path, tmp_path: Path, only: bool) -> None:
    mask = white(tmp_path / "mask.png", (131, 117), (40, 30, 90, 80))
    given = {
        "image_start": str(photo), "image_mask": str(mask), "mask_only": only, "mask_feather": 0,
        "denoising_strength": 1, "hires_scale": 2, "hires_denoising_strength": 0.6, "resolution": "128x112",
    }  # fmt: skip
    first, second = made(**{**given, "hires_scale": 1}), made(**given)
    size = (262, 234) if only else (256, 224)
    larger = np.asarray(Image.fromarray(first).resize(size, LANCZOS))
    fitted = Image.open(mask) if only else Image.open(mask).crop((0, 1, 131, 116))
    painted = np.asarray(fitted.resize(size, Image.Resampling.NEAREST)) > 0
    margin = 4  # where the mask was cut to the shape of the resolution
    inside = np.zeros_like(painted)
    rows, columns = np.flatnonzero(painted.any(1)), np.flatnonzero(painted.any(0))
    inside[rows[0] - margin : rows[-1] + margin, columns[0] - margin : columns[-1] + margin] = True
    assert second.shape == larger.shape
    assert np.array_equal(second[~inside], larger[~inside]) and (second != larger)[painted].mean() > 0.5


def test_both_passes_are_phases_and_a_wish_to_stop_is_heard_in_the_second() -> None:
    phases: list[str] = []
    run(settings(batch_size=2), [5, 6], on_phase=phases.append)
    first = phases.index("Enlarging")
    assert "Denoising" in phases[:first]
    for number in (1, 2):
        assert f"Second pass of image {number} of 2: Denoising" in phases[first:]
    phases.clear()
    with pytest.raises(Cancelled):
        stops = {"interrupt": lambda: phases[-1:] == ["Second pass: Denoising"]}
        run(settings(), [5], on_phase=phases.append, **stops)


# ---- tiles -------------------------------------------------------------------------------------------------


def test_tiles_of_what_looks_at_single_places_are_the_whole() -> None:
    tiles = LatentTiles.of(30, 22, 12)
    total = torch.zeros(30, 22)
    for cut, weight in zip(tiles.cuts, tiles.weights, strict=True):
        assert weight.shape == total[cut].shape == (12, 12)
        total[cut] += weight
    torch.testing.assert_close(total, torch.ones(30, 22))
    x = torch.randn(2, 30, 22)
    torch.testing.assert_close(tiles.joined(lambda tile, xs: [0.3 * x for x in xs], [x]), [0.3 * x])


def test_tiles_see_their_own_part_and_fade_into_each_other() -> None:
    """Each answers with its number: between two it rises without a step as large as between the numbers."""
    tiles = LatentTiles.of(8, 28, 16)
    assert [cut[1] for cut in tiles.cuts] == [slice(0, 16), slice(12, 28)]
    def numbered(tile: int, xs: list[torch.Tensor]) -> list[torch.Tensor]:
        return [torch.full_like(x, tile) for x in xs]

    (made_of,) = tiles.joined(numbered, [torch.zeros(1, 8, 28)])
    assert (made_of[..., :12] == 0).all() and (made_of[..., 16:] == 1).all()
    steps = made_of[0, 0].diff()
    assert (steps >= 0).all() and steps.max() < 0.3


def test_a_picture_smaller_than_the_tile_is_painted_whole() -> None:
    given = {"hires_denoising_strength": 0.5}
    assert np.array_equal(made(hires_tile=256, **given), made(hires_tile=0, **given))


def test_a_picture_smaller_than_any_side_that_is_painted_is_enlarged(tmp_path: Path) -> None:
    photograph((20, 24)).save(tmp_path / "tiny.png")
    given = {"image_start": str(tmp_path / "tiny.png"), "denoising_strength": 0.0, "hires_scale": 2}
    assert made(**given, hires_denoising_strength=0.3).shape == (48, 40, 3)


def test_a_tile_that_is_no_multiple_is_one_sentence() -> None:
    with pytest.raises(UserError, match="tile came as 100; expected a multiple of 16, the nearest is 96"):
        processor(MINI).pipe(PROMPT, width=128, height=128, tile=100)


# ---- upscaling ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(131, 117), (1, 1), (16, 300)])
def test_any_size_comes_out_exactly_so_many_times_larger(size: tuple[int, int], tmp_path: Path) -> None:
    picture = photograph(size)
    picture.save(path := tmp_path / "any.png")
    larger = (round(size[0] * 2.5), round(size[1] * 2.5))
    for strength in (0.0, 0.4):
        model = models().model(MINI)
        given = upscale_settings(path, model, scale=2.5, strength=strength, tile=128, prompt=PROMPT)
        (image,) = run(settings(**given), [5]).images
        assert image.size == larger
        same = image.tobytes() == picture.resize(larger, LANCZOS).tobytes()
        assert same == (strength == 0)


class Unloadable(family_handler):
    @staticmethod
    def load_model(*args: Any, **options: Any) -> Any:
        raise AssertionError("a model is loaded")


def test_enlarging_alone_loads_no_model(photo: Path) -> None:
    host = ModelHost(HERE, handler_for=lambda architecture: Unloadable)
    given = settings(**upscale_settings(photo, models().model(MINI), scale=2))
    loaded = host.get(MINI, Silent(), given)
    silent = {"on_phase": lambda phase: None, "on_step": lambda *step: None, "interrupt": lambda: False}
    result = loaded.processor.generate(given, seeds=[1, 2], **silent)
    expected = photograph((131, 117)).resize((262, 234), LANCZOS)
    assert [image.tobytes() for image in result.images] == [expected.tobytes()] * 2
    with pytest.raises(AssertionError, match="a model is loaded"):
        host.get(MINI, Silent(), {**given, "hires_denoising_strength": 0.1})


def test_the_settings_of_the_picture_stay_but_its_pictures(tmp_path: Path) -> None:
    host = ModelHost(HERE)
    made_from = settings(hires_scale=1, seed=9, num_inference_steps=3)
    store = JobStore(tmp_path / "zgp.sqlite3")
    worker = Worker(store, host, tmp_path, tmp_path / "log")

    def job(given: dict[str, Any]) -> Path:
        job_id = store.submit(given, source="cli", output_dir=str(tmp_path), notes=[])
        worker.run_one()
        return Path(store.images(job_id)[0].path)

    first = job(made_from)
    model = models().model(MINI)
    given = upscale_settings(first, model, scale=1.5, strength=0.3, tile=128)
    assert (given["seed"], given["num_inference_steps"], given["prompt"]) == (9, 3, PROMPT)
    larger = job(settings(**given))
    again = metadata.settings_from(metadata.read(larger) or {})
    assert (again["hires_scale"], again["hires_tile"], again["hires_denoising_strength"]) == (1.5, 128, 0.3)
    repeated = job(settings(**{**again, "image_start": str(first)}))
    assert Image.open(repeated).tobytes() == Image.open(larger).tobytes()
    other = upscale_settings(first, models().model(BASE), scale=2)
    assert "num_inference_steps" not in other and other["prompt"] == PROMPT
    tile = upscale_settings(first, models().model("z_image_control2_1_tile"), scale=2)
    assert (tile["image_guide"], tile["control_preprocessor"]) == (str(first), "tile")


def test_what_is_too_large_is_one_sentence(tmp_path: Path) -> None:
    hires = Hires.of(settings(hires_scale=4))
    assert hires is not None
    with pytest.raises(UserError, match=r"3000x3000.* become 12000x12000.* 67 megapixels, so 2.7 or"):
        hires.size((3000, 3000))
    Image.new("RGB", (5000, 1000)).save(tmp_path / "wide.png")
    with pytest.raises(UserError, match="20000x4000, more than 67 megapixels"):
        upscale_settings(tmp_path / "wide.png", models().model(MINI), scale=4)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"hires_tile": 100}, "hires_tile came as 100; expected 0, or a multiple of 16"),
        ({"hires_tile": 32}, "multiple of 16 from 64 on"),
        ({"hires_scale": 0.5}, "number from 1 to 4"),
        ({"hires_scale": 3, "resolution": "4096x4096"}, "at most 67 megapixels, so 2 or less"),
        ({"hires_upscaler": "../../etc/passwd"}, "expected one of lanczos"),
        ({"outpaint": "0,0,64,0"}, "outpaint came without image_start"),
        ({"outpaint": "1,2,3", "image_start": "a.png"}, "left, top, right and bottom"),
        ({"outpaint": "-8,0,0,0", "image_start": "a.png"}, "left, top, right and bottom"),
    ],
    ids=str,
)
def test_what_cannot_be_used_is_one_sentence(values: dict, words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        settings(**values)


def test_the_plan_counts_the_larger_picture() -> None:
    def needs(**values: Any) -> Any:
        return family_handler.query_memory("z_image", {}, {"resolution": "1024x1024", **values}, HERE)

    hires = {"hires_scale": 2, "hires_upscaler": "lanczos", "hires_denoising_strength": 0.4}
    hires |= {"hires_steps": 8, "hires_tile": 0}
    plain, large, both = needs(), needs(resolution="2048x2048", image_start="x"), needs(**hires)
    assert (both.denoise, both.decode) == (large.denoise, large.decode)
    assert needs(**hires, batch_size=2).denoise == large.denoise  # the second pass paints one at a time
    tiled = needs(**{**hires, "hires_tile": 1024})
    assert plain.denoise <= tiled.denoise < 1.2 * plain.denoise and tiled.decode == both.decode
    assert needs(**{**hires, "hires_denoising_strength": 0}).denoise < 1.2 * plain.denoise


def test_sizes_of_passes(photo: Path) -> None:
    assert run_sizes(settings(hires_scale=1, batch_size=3)) == ([(128, 128, 3)], (128, 128))
    given = settings(hires_scale=2, hires_tile=192, batch_size=3)
    assert run_sizes(given) == ([(128, 128, 3), (192, 192, 1)], (256, 256))
    given = settings(**upscale_settings(photo, models().model(MINI), scale=2, strength=0.2))
    assert run_sizes(given) == ([(262, 234, 1)], (262, 234))
    extended = settings(hires_scale=1, image_start=str(photo), outpaint="0,0,50%,10")
    assert run_sizes(extended)[1] == (192, 138)


# ---- upscaler models ---------------------------------------------------------------------------------------


def test_without_spandrel_there_is_lanczos_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / FOLDERS[0]).mkdir()
    (tmp_path / FOLDERS[0] / "2x.safetensors").touch()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    folders = Folders(tmp_path, tmp_path)
    assert upscalers(folders) == {}
    with pytest.raises(UserError, match="pip install spandrel"):
        upscaler("2x.safetensors", folders)


@pytest.fixture
def tiny(tmp_path: Path) -> Folders:
    """Folders with a 2x model of random weights, and with files that are none."""
    pytest.importorskip("spandrel", reason="the optional package spandrel is not installed")
    from safetensors.torch import save_file
    from spandrel.architectures.Compact import Compact

    torch.manual_seed(0)
    model = Compact(num_feat=8, num_conv=2, upscale=2)
    place = tmp_path / "comfy" / FOLDERS[1]
    place.mkdir(parents=True)
    save_file(model.state_dict(), place / "2x-tiny.safetensors")
    save_file({"weight": torch.zeros(3)}, place / "other.safetensors")
    (place / "cut.safetensors").write_bytes((place / "2x-tiny.safetensors").read_bytes()[:-8])
    (place / "2x-pickled.pth").touch()
    return Folders(tmp_path, tmp_path / "ckpts", (tmp_path / "comfy",))


def test_a_model_enlarges_in_tiles_as_it_does_whole(tiny: Folders) -> None:
    from safetensors.torch import load_file
    from spandrel.architectures.Compact import Compact

    assert set(upscalers(tiny)) == {"2x-tiny.safetensors", "other.safetensors", "cut.safetensors"}
    model = Compact(num_feat=8, num_conv=2, upscale=2)
    model.load_state_dict(load_file(upscalers(tiny)["2x-tiny.safetensors"]))
    picture = photograph((400, 270))  # more than one tile
    x = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 255
    with torch.inference_mode():
        whole = (model(x)[0].clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    enlarge = upscaler("2x-tiny.safetensors", tiny, "cpu")
    by_us = enlarge(picture, (800, 540), lambda: False)
    assert np.abs(np.asarray(by_us).astype(int) - whole).max() <= 1
    other = enlarge(picture, (700, 473), lambda: False)
    assert other.tobytes() == by_us.resize((700, 473), LANCZOS).tobytes()
    twice = enlarge(picture.crop((0, 0, 40, 30)), (150, 111), lambda: False)
    assert twice.size == (150, 111)
    with pytest.raises(Cancelled):
        enlarge(picture, (800, 540), lambda: True)


def test_files_that_are_no_upscalers_are_one_sentence(tiny: Folders) -> None:
    for name, words in (("other", "no upscaler model"), ("cut", "its header says")):
        with pytest.raises(UserError, match=words):
            upscaler(f"{name}.safetensors", tiny, "cpu")


def test_a_job_uses_the_model_that_is_named(tiny: Folders) -> None:
    info = catalog(ROOT, tiny.ckpts, others=tiny.others).model(MINI)
    assert "2x-tiny.safetensors" in info.capabilities["upscalers"]
    given = {"model_type": MINI, "prompt": "x", "hires_scale": 2, "hires_upscaler": "2x-tiny.safetensors"}
    assert catalog(ROOT, tiny.ckpts, others=tiny.others).validate(given).settings["hires_scale"] == 2


# ---- extending ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("card", [MINI, TWIN, CONTROL])
def test_an_extended_picture_keeps_every_pixel(card: str, photo: Path) -> None:
    given = {"image_start": str(photo), "resolution": "128x112", "denoising_strength": 1, "hires_scale": 1}
    extended = made(card, outpaint="10%,0,40,21", **given)
    assert extended.shape == (117 + 21, 131 + 13 + 40, 3)
    original = np.asarray(photograph((131, 117)))
    assert np.array_equal(extended[:117, 13 : 13 + 131], original)
    assert extended[:, :8].std() > 0
    assert not np.array_equal(extended, made(card, seed=6, outpaint="10%,0,40,21", **given))


def test_a_mask_goes_with_it(photo: Path, tmp_path: Path) -> None:
    mask = white(tmp_path / "mask.png", (131, 117), (0, 0, 30, 117))
    given = {
        "image_start": str(photo), "image_mask": str(mask), "resolution": "128x112", "mask_feather": 0,
        "denoising_strength": 1, "hires_scale": 1, "outpaint": "0,0,0,43",
    }  # fmt: skip
    extended, original = made(**given), np.asarray(photograph((131, 117)))
    assert np.array_equal(extended[:117, 30:], original[:, 30:])
    assert (extended[:117, :30] != original[:, :30]).mean() > 0.5


def test_larger_pictures_are_brought_to_the_resolution_first(tmp_path: Path) -> None:
    photograph((512, 512)).save(path := tmp_path / "large.png")
    extended = made(image_start=str(path), outpaint="0,0,25%,0", hires_scale=1, denoising_strength=1)
    fitted = photograph((512, 512)).resize((128, 128), LANCZOS)
    assert np.array_equal(extended[:, :128], np.asarray(fitted)) and extended.shape == (128, 160, 3)


def test_an_extended_picture_is_enlarged(photo: Path) -> None:
    given = {"image_start": str(photo), "resolution": "128x112", "denoising_strength": 1, "hires_scale": 2}
    assert made(outpaint="0,0,29,0", **given).shape == (234, 320, 3)


SENT = {"image_guide": "a.png", "video_prompt_type": "V"}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"video_guide_outpainting": "10 0 25 5", "image_start": "a.png"}, "25%,10%,5%,0%"),
        ({"video_guide_outpainting": "10 0 25 5", **SENT}, "25%,10%,5%,0%"),
        ({"video_guide_outpainting": "#10 0 25 5", "image_start": "a.png"}, ""),
        ({"video_guide_outpainting": "0 0 0 0", "image_start": "a.png"}, ""),
        ({"video_guide_outpainting": "10 0 25 5"}, ""),
    ],
    ids=str,
)
def test_wan2gps_name_of_it(values: dict, expected: str) -> None:
    """Its order: top, bottom, left, right."""
    validated = models().validate({"model_type": CONTROL, "prompt": "x", **values})
    assert validated.settings["outpaint"] == expected
    if expected:
        assert validated.settings["image_start"] == "a.png" and not validated.settings["image_guide"]


def test_wan2gps_lanczos() -> None:
    found = models().validate({"prompt": "x", "spatial_upsampling": "lanczos1.5"})
    assert (found.settings["hires_scale"], found.settings["hires_denoising_strength"]) == (1.5, 0)
    assert "spatial_upsampling" in models().validate({"prompt": "x", "spatial_upsampling": "vae2"}).ignored
