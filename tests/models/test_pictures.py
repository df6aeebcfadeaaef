"""Image to image, repainting and control in the pipeline and in jobs, on the Mini models."""

import copy
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from models.z_image import control
from models.z_image.checkpoints.control_layout import ControlLayout
from models.z_image.control import ZImageControlModel
from models.z_image.job.job import ZImageProcessor
from models.z_image.pipeline_z_image import ZImagePipeline
from models.z_image.sampling import make_sigmas
from models.z_image.z_image_handler import family_handler
from shared.errors import UserError
from shared.gpu import attention
from shared.gpu.offloading import Residency
from shared.gpu.placement import Placement
from shared.library.catalog import catalog
from shared.worker.component_cache import PartStore
from tests.support import mini
from tests.support.cards import Card
from tests.support.counting import CountingTransport

PROMPT = "a red circle on a blue background"
CARDS = ("z_image_mini", "z_image_mini_base", "z_image_mini_twinflow")
GUIDED = {"z_image_mini_base": {"guidance_scale": 2.5}}
CONTROLS = {"v1": (16, control.PLAIN), "2.0": (33, control.SHARED), "2.1": (33, control.OWN)}


@functools.cache
def picture() -> np.ndarray:
    """[128, 128, 3]: another prompt's, which the Mini VAE knows, with noise that it cannot paint."""
    how = dict(height=128, width=128, generator=torch.Generator().manual_seed(3))
    (drawn,) = mini.load()[1]("a large green star on a yellow background", **how).images
    noise = np.random.default_rng(0).integers(-8, 8, (128, 128, 3))
    return (np.asarray(drawn).astype(int) + noise).clip(0, 255).astype(np.uint8)


@functools.cache
def mask() -> np.ndarray:
    """[128, 128] bool: a rectangle that does not follow the latent's grid."""
    white = np.zeros((128, 128), bool)
    white[37:91, 50:123] = True
    return white


IMAGE = Image.fromarray(picture())
MASK = Image.fromarray(np.where(mask(), 255, 0).astype(np.uint8))


@functools.cache
def pipeline(card: str, generation: str = "") -> ZImagePipeline:
    """A Mini with (or without) a control network of random weights."""
    _, loaded = mini.load(card)
    pipe = copy.copy(loaded)
    if generation:
        channels, refiner = CONTROLS[generation]
        torch.manual_seed(4)
        config = pipe.transformer.config
        layout = ControlLayout(channels, tuple(range(0, config.n_layers, 2)), refiner)
        net = ZImageControlModel(config, layout)
        pipe.control = net.eval().requires_grad_(False)
    return pipe


def draw(card: str = "z_image_mini", generation: str = "", seed: Any = 5, **how: Any) -> np.ndarray:
    """The pixels of one picture, or of one for each seed."""
    seeds = seed if isinstance(seed, list) else [seed]
    settings = dict(height=128, width=128, num_inference_steps=2, num_images_per_prompt=len(seeds))
    generators = [torch.Generator().manual_seed(s) for s in seeds]
    images = pipeline(card, generation)(
        PROMPT, generator=generators, **(settings | GUIDED.get(card, {}) | how)
    ).images
    pixels = [np.asarray(image) for image in images]
    return np.stack(pixels) if isinstance(seed, list) else pixels[0]


# ---- image to image ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("card", CARDS)
def test_a_strength_of_one_is_text_to_image_and_zero_the_picture_bit_for_bit(card: str) -> None:
    plain = draw(card)
    assert np.array_equal(draw(card, image=IMAGE, denoising_strength=1.0), plain)
    assert np.array_equal(draw(card, image=IMAGE, denoising_strength=0.0), picture())
    half = draw(card, image=IMAGE, denoising_strength=0.5)
    assert not np.array_equal(half, plain) and not np.array_equal(half, picture())


@pytest.mark.parametrize("card", CARDS)
def test_less_strength_stays_nearer_to_the_picture(card: str) -> None:
    how = dict(image=IMAGE, num_inference_steps=4)
    distances = [
        np.abs(draw(card, denoising_strength=s, **how).astype(int) - picture()).mean()
        for s in (0.05, 0.4, 0.9)
    ]
    assert distances == sorted(distances) and distances[0] < 0.6 * distances[2]


def test_strengths_between_the_steps_act() -> None:
    drawn = [draw(image=IMAGE, denoising_strength=s, num_inference_steps=2) for s in (0.6, 0.7)]
    assert not np.array_equal(*drawn)


@pytest.mark.parametrize("shift", [3.0, 6.0])
def test_the_schedule_of_a_strength_is_the_rest_of_the_whole_one(shift: float) -> None:
    """At k / N of the way, the last k of N steps, as diffusers starts from pictures; otherwise in between."""
    whole = make_sigmas(8, {"shift": shift}, 64)
    for k in (2, 4, 8):
        assert make_sigmas(8, {"shift": shift}, 64, strength=k / 8) == pytest.approx(whole[8 - k :], abs=1e-6)
    between = make_sigmas(8, {"shift": shift}, 64, strength=0.45)
    assert len(between) == 5 and whole[5] < between[0] < whole[4] and between[-1] == 0


def test_what_comes_back_unchanged_has_every_form() -> None:
    pipe = pipeline("z_image_mini")
    how = dict(height=128, width=128, image=IMAGE, denoising_strength=0.0, num_images_per_prompt=2)
    (tensor, latent) = (pipe(PROMPT, output_type=kind, **how).images for kind in ("pt", "latent"))
    assert tensor.shape == (2, 3, 128, 128) and latent.shape == (2, 16, 16, 16)
    assert np.array_equal((tensor[1].permute(1, 2, 0) * 255).round().byte().numpy(), picture())


def test_a_picture_of_another_size_is_fitted() -> None:
    wide = Image.fromarray(np.repeat(picture(), 2, axis=1))
    out = pipeline("z_image_mini")(PROMPT, height=128, width=128, image=wide, denoising_strength=0.0)
    assert out.images[0].size == (128, 128) and any("cut off" in note for note in out.notes)


# ---- repainting --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strength", [1.0, 0.6])
@pytest.mark.parametrize(
    ("card", "generation"), [*((card, "") for card in CARDS), *(("z_image_mini", g) for g in CONTROLS)]
)
def test_unpainted_pixels_stay_and_painted_ones_change(card: str, generation: str, strength: float) -> None:
    drawn = draw(card, generation, image=IMAGE, inpaint_mask=MASK, denoising_strength=strength)
    assert np.array_equal(drawn[~mask()], picture()[~mask()])
    assert (drawn[mask()] != picture()[mask()]).any(-1).mean() > 0.9


@pytest.mark.parametrize(
    ("card", "how"),
    [
        *((card, {}) for card in CARDS),
        *(("z_image_mini_twinflow", {"unified_sampler_config": {"sampling_order": k}}) for k in (2, 3)),
    ],
)
def test_the_known_part_is_held_while_the_rest_is_painted(card: str, how: dict) -> None:
    """The latents show it: where nothing is painted they are the picture's own, not only its pixels."""
    pipe = pipeline(card)
    how = dict(
        height=128, width=128, num_inference_steps=4, output_type="latent", **GUIDED.get(card, {}), **how
    )
    given = dict(image=IMAGE, inpaint_mask=MASK)
    (latent,) = pipe(PROMPT, generator=torch.Generator().manual_seed(1), **how, **given).images
    (own,) = pipe(PROMPT, image=IMAGE, denoising_strength=0.0, **how).images
    cells = torch.from_numpy(mask()).view(16, 8, 16, 8).any(3).any(1)
    torch.testing.assert_close(latent[:, ~cells], own[:, ~cells], rtol=1e-4, atol=1e-4)
    assert (latent[:, cells] - own[:, cells]).abs().mean() > 0.1


def test_the_known_part_shapes_what_is_painted() -> None:
    other = Image.fromarray(255 - picture())
    drawn = [draw(image=x, inpaint_mask=MASK, num_inference_steps=4)[mask()] for x in (IMAGE, other)]
    assert np.abs(np.subtract(*drawn, dtype=int)).mean() > 1


def test_a_soft_edge_fades_inside_of_the_mask_only() -> None:
    hard, soft = (draw(image=IMAGE, inpaint_mask=MASK, mask_feather=f) for f in (0, 16))
    assert np.array_equal(soft[~mask()], picture()[~mask()])
    assert np.array_equal(soft[60:68, 80:90], hard[60:68, 80:90])  # deep inside: nothing is mixed
    edge = np.s_[37:40, 60:110]
    near = [np.abs(x[edge].astype(int) - picture()[edge]).mean() for x in (hard, soft)]
    assert near[1] < 0.5 * near[0]


def test_masks_count_as_white_from_half_on_and_may_be_tensors() -> None:
    expected = draw(image=IMAGE, inpaint_mask=MASK)
    grey = Image.fromarray(np.where(mask(), 128, 127).astype(np.uint8))
    tensor = torch.from_numpy(mask()).float()
    for given in (grey, tensor, tensor[None, None]):
        assert np.array_equal(draw(image=IMAGE, inpaint_mask=given), expected)


# ---- control -----------------------------------------------------------------------------------------------


LINES = Image.fromarray(np.where(mask()[..., None], 255, np.zeros((128, 128, 3))).astype(np.uint8))


@pytest.mark.parametrize("generation", CONTROLS)
@pytest.mark.parametrize("card", CARDS)
def test_control_acts_and_at_nothing_is_the_base_bit_for_bit(card: str, generation: str) -> None:
    plain = draw(card)
    assert not np.array_equal(draw(card, generation, control_image=LINES), plain)
    for off in ({"control_context_scale": 0.0}, {"control_start": 0.0, "control_end": 0.0}):
        assert np.array_equal(draw(card, generation, control_image=LINES, **off), plain)
    assert np.array_equal(draw(card, generation), plain)  # without a picture, too


def test_strength_start_and_end_act() -> None:
    how = dict(card="z_image_mini", generation="2.1", control_image=LINES, num_inference_steps=4)
    kinds = [{}, {"control_context_scale": 1.5}, {"control_start": 0.5}, {"control_end": 0.5}]
    drawn = [draw(**how, **kind) for kind in kinds]
    assert all(not np.array_equal(a, b) for i, a in enumerate(drawn) for b in drawn[:i])


def test_steps_outside_cost_nothing() -> None:
    pipe = pipeline("z_image_mini", "2.1")
    calls: list[int] = []
    hook = pipe.control.control_layers[0].register_forward_hook(lambda *x: calls.append(1))
    try:
        draw("z_image_mini", "2.1", control_image=LINES, num_inference_steps=8, control_end=0.25)
    finally:
        hook.remove()
    assert len(calls) == 2


@pytest.mark.parametrize("generation", CONTROLS)
@pytest.mark.parametrize("card", CARDS)
def test_the_same_pixels_alone_and_in_a_batch(card: str, generation: str) -> None:
    how = dict(card=card, generation=generation, control_image=LINES, image=IMAGE, inpaint_mask=MASK)
    together = draw(seed=[7, 8], **how)
    assert np.array_equal(draw(seed=8, **how), together[1])
    assert not np.array_equal(together[0], together[1])


def test_the_same_pixels_streamed(card: Card) -> None:
    expected = draw("z_image_mini", "2.1", control_image=LINES)
    pipe = copy.copy(pipeline("z_image_mini", "2.1"))
    pipe.residency = card.residency()
    for name in ("transformer", "control"):
        pipe.residency.place(pipe[name], Placement(resident_blocks=0))
    generator = torch.Generator().manual_seed(5)
    out = pipe(PROMPT, height=128, width=128, num_inference_steps=2, generator=generator, control_image=LINES)
    assert np.array_equal(np.asarray(out.images[0]), expected)
    assert card.moved > 2 * sum(p.nbytes for p in pipe.control.control_layers.parameters())
    pipe.residency.forget()


@pytest.mark.parametrize("generation", ["2.0", "2.1"])
def test_newer_networks_are_told_what_is_repainted(generation: str) -> None:
    """Their own channels say it: the mask's neighbourhood changes what is painted though nothing is held."""
    how = dict(card="z_image_mini", generation=generation, image=IMAGE, inpaint_mask=MASK)
    told, held = draw(**how), draw(**how | {"generation": ""})
    assert not np.array_equal(told, held)
    assert not np.array_equal(told, draw(**how, control_image=LINES))


def test_the_mapping_has_control_where_it_is() -> None:
    assert list(pipeline("z_image_mini")) == ["transformer", "text_encoder", "vae"]
    pipe = pipeline("z_image_mini", "v1")
    assert list(pipe) == ["transformer", "text_encoder", "vae", "control"] and len(pipe) == 4
    assert isinstance(pipe["control"], ZImageControlModel)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"control_image": LINES}, "no control network"),
        ({"inpaint_mask": MASK}, "without a picture"),
        ({"image": IMAGE, "inpaint_mask": Image.new("L", (128, 128))}, "all black"),
        ({"image": IMAGE, "inpaint_mask": Image.new("L", (128, 64), 255)}, "shape of its picture"),
        ({"image": IMAGE, "denoising_strength": 1.2}, "from 0 to 1"),
        ({"image": torch.zeros(3, 64, 64)}, r"\(3, 128, 128\)"),
        ({"image": IMAGE, "inpaint_mask": torch.zeros(64, 64)}, r"\(128, 128\)"),
        ({"control_end": 2}, "control_end"),
        ({"image": "nowhere.png"}, "does not exist"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else None,
)
def test_what_cannot_be_used_gets_one_sentence(arguments: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        draw(**arguments)


def test_what_was_done_is_said() -> None:
    how = dict(height=128, width=128, num_inference_steps=1, output_type="latent")
    pipe = pipeline("z_image_mini", "2.1")
    assert any("no control picture" in note for note in pipe(PROMPT, **how).notes)
    with_none, without = (
        pipe(PROMPT, generator=torch.Generator().manual_seed(1), **control, **how)
        for control in ({"control_image": LINES, "control_context_scale": 0}, {})
    )
    assert any("control weight is 0" in note for note in with_none.notes)
    assert torch.equal(with_none.images, without.images)
    notes = pipe(PROMPT, control_image=LINES, inpaint_mask=MASK, **how).notes
    assert any("was repainted" in note for note in notes)


# ---- jobs --------------------------------------------------------------------------------------------------


SETTINGS = {
    "prompt": PROMPT, "resolution": "128x128", "num_inference_steps": 2, "denoising_strength": 0.75,
    "mask_expand": 0, "mask_feather": 0.0, "control_preprocessor": "canny", "control_parameters": "",
    "control_net_weight": 0.75, "control_start": 0.0, "control_end": 100.0,
}  # fmt: skip


def job(folder: Path, generation: str = "2.1", **settings: Any) -> np.ndarray:
    for name, image in (("picture", IMAGE), ("mask", MASK), ("lines", LINES)):
        image.save(folder / f"{name}.png")
    processor, _ = mini.load()
    mine = ZImageProcessor(pipeline("z_image_mini", generation), processor.latent_rgb)
    paths = {name: str(folder / x) for name, x in settings.items() if str(x).endswith(".png")}
    silent = dict(on_phase=lambda phase: None, on_step=lambda *step: None, interrupt=lambda: False)
    return np.asarray(mine.generate({**SETTINGS, **settings, **paths}, seeds=[5], **silent).images[0])


def test_a_jobs_settings_are_the_pipelines_arguments(tmp_path: Path) -> None:
    given = job(tmp_path, image_start="picture.png", image_mask="mask.png", denoising_strength=0.5)
    how = dict(generation="2.1", image=IMAGE, denoising_strength=0.5)
    assert np.array_equal(given, draw(inpaint_mask=MASK, **how))
    as_it_is = job(tmp_path, image_guide="lines.png", control_preprocessor="as_it_is", control_end=50.0)
    assert np.array_equal(as_it_is, draw(generation="2.1", control_image=LINES, control_end=0.5))
    assert np.array_equal(job(tmp_path), draw())


@pytest.mark.parametrize(
    ("base", "change"),
    [
        ({"image_start": "picture.png"}, {"denoising_strength": 0.5}),
        ({"image_start": "picture.png", "image_mask": "mask.png"}, {"mask_expand": 12}),
        ({"image_start": "picture.png", "image_mask": "mask.png"}, {"mask_feather": 12.0}),
        ({"image_guide": "lines.png"}, {"control_preprocessor": "gray"}),
        ({"image_guide": "picture.png"}, {"control_parameters": "low=900, high=1000"}),
        ({"image_guide": "lines.png"}, {"control_net_weight": 1.5}),
        ({"image_guide": "lines.png"}, {"control_start": 50.0}),
        ({"image_guide": "lines.png"}, {"control_end": 50.0}),
    ],
    ids=str,
)
def test_every_setting_changes_the_picture(base: dict, change: dict, tmp_path: Path) -> None:
    assert not np.array_equal(job(tmp_path, **base), job(tmp_path, **base, **change))


def test_a_plan_places_the_control_network_with_the_transformer() -> None:
    """The plan counts control's blocks in front of the transformer's: they are the first to be streamed."""
    processor, _ = mini.load()
    pipe = copy.copy(pipeline("z_image_mini", "2.1"))
    pipe.residency = Residency(torch.device("cpu"), transport=CountingTransport())
    mine = ZImageProcessor(pipe, processor.latent_rgb)
    blocks = sum(len(getattr(pipe.transformer, stack)) for stack in pipe.transformer.streamed_blocks)
    for resident, expected in ((None, (None, None)), (3, (3, 0)), (blocks + 2, (blocks, 2))):
        mine.apply_plan(plan := FakePlan(resident))
        placed = [pipe.placements[part].resident_blocks for part in ("transformer", "control")]
        assert tuple(placed) == expected and pipe.vae_tile == plan.vae_tile


@dataclass(frozen=True)
class FakePlan:
    resident: int | None
    vae_tile: int | None = 64
    compile: bool = False

    def placements(self) -> dict[str, dict[str, Any]]:
        return {"transformer": {"resident_blocks": self.resident}}


def save_network(folder: Path, generation: str = "2.1") -> Path:
    path = folder / "control.safetensors"
    save_file(pipeline("z_image_mini", generation).control.state_dict(), path)
    return path


def test_a_control_file_is_loaded_beside_the_base_which_stays(tmp_path: Path) -> None:
    card, path = mini.model_def("z_image_mini"), save_network(tmp_path)
    store, base = PartStore(), mini.ROOT / card["URLs"][0]
    load = functools.partial(
        family_handler.load_model, model_def=card, device="cpu", prompt_cache=None, share=store.share
    )
    _, plain = load(base, "z_image")
    _, mine = load([base, path], "z_image_control2_1")
    assert mine.transformer is plain.transformer and mine.vae is plain.vae and plain.control is None
    _, again = load([path, base], "z_image_control2_1")  # the keys tell which is which
    assert again.control is mine.control
    how = dict(height=128, width=128, num_inference_steps=2, control_image=LINES, control_context_scale=0.75)
    drawn = mine(PROMPT, generator=torch.Generator().manual_seed(5), **how).images[0]
    expected = draw("z_image_mini", "2.1", control_image=LINES, control_context_scale=0.75)
    saved, loaded = pipeline("z_image_mini", "2.1").control.state_dict(), mine.control.state_dict()
    assert saved.keys() == loaded.keys() and all(torch.equal(loaded[name], saved[name]) for name in saved)
    off = np.abs(np.asarray(drawn).astype(int) - expected)  # mapped memory is aligned otherwise
    assert off.max() <= 4 and off.mean() < 0.5
    store.retain([base, mini.ROOT / card["VAE_URLs"][0]])
    assert store.share("control", [path], None, lambda: "anew") == "anew"


def test_files_that_make_no_control_model_are_refused(tmp_path: Path) -> None:
    card, path = mini.model_def("z_image_mini"), save_network(tmp_path)
    base = mini.ROOT / card["URLs"][0]
    other = tmp_path / "other.safetensors"
    other.write_bytes(path.read_bytes())
    for files, words in (
        ([base], "needs a control network"),
        ([base, path, other], "two control networks"),
        ([path], "network alone"),
    ):
        with pytest.raises(UserError, match=words):
            family_handler.load_model(files, "z_image_control2_1", card, device="cpu", prompt_cache=None)


# ---- cards -------------------------------------------------------------------------------------------------


def test_the_types_are_the_documented_ones() -> None:
    types = ["z_image", "z_image_base", "z_image_control", "z_image_control2", "z_image_control2_1"]
    assert family_handler.query_supported_types() == types


#: as published: strength, steps, size, guidance (the Base networks need 4)
PUBLISHED = {
    "z_image_control": (0.75, 8, "1024x1024", None),
    "z_image_control2": (0.75, 25, "1024x1024", None),
    "z_image_control2_1": (0.65, 25, "1920x1088", None),
    "z_image_control2_1_8s": (0.9, 8, "1024x1024", None),
    "z_image_control2_1_lite": (0.9, 8, "1024x1024", None),
    "z_image_control2_1_tile": (0.85, 8, "1024x1024", None),
    "z_image_control2_1_tile_lite": (0.85, 8, "1024x1024", None),
    "z_image_base_control": (0.9, 25, "1024x1024", 4.0),
    "z_image_base_control_lite": (0.9, 25, "1024x1024", 4.0),
    "z_image_base_control_tile": (0.9, 25, "1024x1024", 4.0),
}


def test_the_cards_have_the_published_values() -> None:
    models = catalog(mini.ROOT, mini.ROOT / "nowhere").models
    for name, (strength, steps, size, guidance) in PUBLISHED.items():
        card = models[name]
        assert card.capabilities["control"] and card.capabilities["inpaint"]
        assert sum(one.role.startswith("module") for one in card.required) == 1
        defaults = card.defaults
        assert (defaults["control_net_weight"], defaults["num_inference_steps"]) == (strength, steps)
        assert defaults["resolution"] == size and defaults.get("guidance_scale") == guidance
        assert ("tile" in name) == (defaults["control_preprocessor"] == "tile")
        bases = [one.alternatives for one in models["z_image_base" if guidance else "z_image"].required]
        assert all(one in [x.alternatives for x in card.required] for one in bases)
    assert not models["z_image"].capabilities["control"]
    assert {name for name, model in models.items() if model.capabilities["control"]} == {
        *PUBLISHED,
        "z_image_mini_control2_1",
    }


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"image_mask": "m.png"}, "image_mask came without image_start"),
        ({"control_start": 60.0, "control_end": 40.0}, "control_start is 60 and control_end 40"),
        ({"image_guide": "a.png", "control_parameters": "lo=5"}, "no parameter 'lo'"),
        ({"image_guide": "a.png", "control_parameters": "low=5000"}, "from 0 to 1000"),
        ({"image_guide": "a.png", "control_parameters": "low"}, "expected pairs"),
    ],
    ids=str,
)
def test_settings_that_do_not_go_together_are_one_sentence(settings: dict, words: str) -> None:
    said = family_handler.validate_generative_settings("z_image_control2_1", {}, {**SETTINGS, **settings})
    assert said is not None and words in said


def test_the_network_computes_as_the_base_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same attention and, where the base is compiled, compiled once."""
    compiled: list[Any] = []
    monkeypatch.setattr(torch, "compile", lambda f, **options: compiled.append(options) or f)
    pipe = pipeline("z_image_mini", "2.1")
    base, net = copy.deepcopy(pipe.transformer), copy.deepcopy(pipe.control)
    base.attention_backend = "_native"
    monkeypatch.setitem(attention.BACKENDS, "_native", attention.BACKENDS["sdpa"])
    base.compile(mode="default")
    before = len(compiled)
    for _ in range(2):
        net.follow(base)
    assert len(compiled) - before == len(net.control_layers) + len(net.control_noise_refiner)
    assert net.control_layers[0].attention.attend is attention.BACKENDS["_native"].attend
