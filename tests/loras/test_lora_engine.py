"""LoRAs in jobs, through the real engine and the built-in models, against weights with the deltas merged in.

The worker's code runs in this process. A reference picture is made by the plain pipeline whose transformer's
weights were changed by what the file's writer knows, never by what our reader read.
"""

import copy
import hashlib
import json
import shutil
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from models.z_image import loading as z_image_loading
from models.z_image.checkpoints import weight_names
from models.z_image.z_image_handler import family_handler
from shared.engine.configuration import EngineConfig
from shared.engine.engine import Engine
from shared.gpu import machine
from shared.gpu.offloading import Residency
from shared.gpu.placement import Placement
from shared.imaging import metadata
from shared.loras.strengths import parse
from shared.settings.table import SettingsError
from shared.weights.loading import save_quantized
from shared.worker import worker
from shared.worker.model_manager import ModelHost
from tests.support import mini, packers
from tests.support.cards import Card
from tests.support.lora_web import Web
from tests.support.lora_writers import SHAPES, WRITERS, deltas, factors, lycoris_oft, save
from tests.support.mini_loras import DIM, HIDDEN, MINI_SHAPES, mini_factors

ROOT = mini.ROOT
STRENGTH = 0.5
BASE = {"model_type": "z_image_mini_base", "num_inference_steps": 2, "guidance_scale": 2.5}
WAYS = {
    "guided": BASE,
    "NAG": {"model_type": "z_image_mini", "num_inference_steps": 2, "NAG_scale": 4.0},
    "plain": {"model_type": "z_image_mini", "num_inference_steps": 4},
    "TwinFlow": {"model_type": "z_image_mini_twinflow", "num_inference_steps": 2},
}
COMMON = {"prompt": "a red circle on a white background", "seed": 3, "resolution": "64x64"}


@dataclass
class Bench:
    """A project folder with the Mini models and a LoRA folder, an engine, and its worker in this process."""

    root: Path
    engine: Engine
    host: ModelHost
    worker: worker.Worker

    @property
    def loras(self) -> Path:
        return self.root / "loras" / "z_image"

    def run(self, **settings: Any) -> tuple[Any, np.ndarray]:
        """(the finished job, its first picture's pixels)."""
        job_id, _ = self.engine.submit({**COMMON, **settings})
        return self.finish(job_id)

    def finish(self, job_id: int) -> tuple[Any, Any]:
        assert self.worker.run_one()
        images = self.engine.store.images(job_id)
        return self.engine.store.job(job_id), np.asarray(Image.open(images[0].path)) if images else None

    def picture(self, **settings: Any) -> np.ndarray:
        job, pixels = self.run(**settings)
        assert (job.status, job.error) == ("done", None)
        return pixels

    def write(self, name: str, content: Any) -> str:
        (self.loras / name).parent.mkdir(parents=True, exist_ok=True)
        save(self.loras / name, content)
        return name


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    root = tmp_path_factory.mktemp("project")
    for folder in ("defaults", "finetunes"):
        (root / folder).mkdir()
    for card in (ROOT / "defaults").glob("z_image_mini*.json"):
        shutil.copy(card, root / "defaults")
    (root / "models").symlink_to(ROOT / "models")
    styled = json.loads((ROOT / "defaults" / "z_image_mini.json").read_text("utf-8"))
    styled["model"] |= {"name": "Styled", "loras": ["styled.safetensors"], "loras_multipliers": ["0.5"]}
    (root / "finetunes" / "styled.json").write_text(json.dumps(styled), "utf-8")
    config = EngineConfig.at(root)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(z_image_loading, "default_device", lambda: torch.device("cpu"))
        engine = Engine(config)
        host = ModelHost(config.folders, machine=lambda: machine.survey("cpu"))
        yield Bench(root, engine, host, worker.Worker(engine.store, host, root / "outputs", root / "zgp.log"))


def reference(settings: Mapping[str, Any], changed: Mapping[str, Tensor]) -> np.ndarray:
    """The picture of a plain pipeline whose weights are W + changed."""
    settings = {**COMMON, **settings}
    model_def = mini.model_def(settings["model_type"])
    processor, pipe = family_handler.load_model(
        model_def["URLs"][0], model_def["architecture"], model_def, device="cpu"
    )
    with torch.no_grad():
        for name, delta in changed.items():
            pipe.transformer.get_submodule(name).weight += delta
    return generate(processor, settings)


def generate(processor: Any, settings: Mapping[str, Any]) -> np.ndarray:
    card = json.loads((ROOT / "defaults" / f"{settings['model_type']}.json").read_text("utf-8"))
    known = {name: value for name, value in card.items() if name != "model"}
    made = processor.generate(
        {**known, **settings},
        seeds=[settings["seed"]],
        on_phase=lambda phase: None,
        on_step=lambda *step: None,
        interrupt=lambda: False,
    )
    return np.asarray(made.images[0])


def apart(one: np.ndarray, other: np.ndarray) -> int:
    return int(np.abs(one.astype(int) - other.astype(int)).max())


# -- what LoRAs do to pictures ----------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_a_lora_makes_the_picture_of_merged_weights(bench: Bench, way: str) -> None:
    """Logic: with guidance, NAG, TwinFlow and none, from the settings of a job."""
    given = mini_factors()
    name = bench.write("style.safetensors", WRITERS["ai-toolkit"][0](given))
    plain = bench.picture(**WAYS[way])
    styled = bench.picture(**WAYS[way], activated_loras=[name], loras_multipliers=str(STRENGTH))
    merged = reference(WAYS[way], {module: STRENGTH * delta for module, delta in deltas(given).items()})
    assert apart(plain, reference(WAYS[way], {})) <= 1
    assert apart(styled, merged) <= 2 and apart(styled, plain) > 20


def test_strength_0_and_no_lora_are_bit_identical_and_the_model_stays(bench: Bench) -> None:
    name = bench.write("style.safetensors", WRITERS["musubi"][0](mini_factors()))
    plain = bench.picture(**BASE)
    model = bench.host.get(BASE["model_type"], worker.Silent())
    weights = {n: x.clone() for n, x in model.pipe.transformer.state_dict().items()}
    styled = bench.picture(**BASE, activated_loras=[name])
    assert apart(styled, plain) > 20
    assert np.array_equal(bench.picture(**BASE, activated_loras=[name], loras_multipliers="0"), plain)
    assert np.array_equal(bench.picture(**BASE, activated_loras=[name]), styled)
    assert np.array_equal(bench.picture(**BASE), plain)
    after = model.pipe.transformer.state_dict()
    assert weights.keys() == after.keys() and all(torch.equal(weights[n], after[n]) for n in weights)
    assert bench.host.get(BASE["model_type"], worker.Silent()).pipe is model.pipe


def test_a_strength_alone_changes_without_reading_the_file(bench: Bench, monkeypatch: Any) -> None:
    name = bench.write("style.safetensors", WRITERS["musubi"][0](mini_factors()))
    first = bench.picture(**BASE, activated_loras=[name])
    monkeypatch.setattr("shared.loras.apply.read", None)
    assert apart(bench.picture(**BASE, activated_loras=[name], loras_multipliers="0.6"), first) > 5
    assert np.array_equal(bench.picture(**BASE, activated_loras=[name]), first)


def test_a_replaced_file_of_the_same_name_is_read_again(bench: Bench) -> None:
    name = bench.write("style.safetensors", WRITERS["musubi"][0](mini_factors(1)))
    first = bench.picture(**BASE, activated_loras=[name])
    bench.write("style.safetensors", WRITERS["ai-toolkit"][0](mini_factors(2)))
    job, second = bench.run(**BASE, activated_loras=[name])
    assert apart(first, second) > 20
    [entry] = bench.engine.store.images(job.id)[0].metadata["zgp"]["loras"]
    assert entry["sha256"] == hashlib.sha256((bench.loras / name).read_bytes()).hexdigest()


def test_a_schedule_of_1_0_acts_in_the_first_half_only(bench: Bench) -> None:
    """Logic: against a run whose weights are merged and, after half of the steps, the old ones again."""
    given = mini_factors()
    name = bench.write("style.safetensors", WRITERS["ai-toolkit"][0](given))
    settings = {**COMMON, **WAYS["plain"]}
    scheduled = bench.picture(**settings, activated_loras=[name], loras_multipliers="1,0")
    processor, pipe = copy.copy(mini.load("z_image_mini")[0]), mini.load("z_image_mini")[1]
    weights = {module: pipe.transformer.get_submodule(module).weight for module in deltas(given)}
    before = {module: weight.clone() for module, weight in weights.items()}

    def step(number: int, total: int, previews: Any) -> None:
        if number == 2:
            for module, weight in weights.items():
                weight.data.copy_(before[module])

    try:
        for module, delta in deltas(given).items():
            weights[module].data += delta
        made = processor.generate(
            {**mini_defaults(), **settings},
            seeds=[3],
            on_phase=lambda phase: None,
            on_step=step,
            interrupt=lambda: False,
        )
    finally:
        for module, weight in weights.items():
            weight.data.copy_(before[module])
    assert apart(scheduled, np.asarray(made.images[0])) <= 2
    assert apart(scheduled, bench.picture(**settings, activated_loras=[name])) > 5
    assert apart(scheduled, bench.picture(**settings)) > 5


def mini_defaults() -> dict[str, Any]:
    card = json.loads((ROOT / "defaults" / "z_image_mini.json").read_text("utf-8"))
    return {name: value for name, value in card.items() if name != "model"}


def test_a_schedule_acts_on_the_captions_refinement_too(bench: Bench) -> None:
    """Logic: "0,1" is no LoRA up to half of the way, but the prompt is refined with it after that."""
    shapes = {"context_refiner.0.feed_forward.w1": (HIDDEN, DIM), "cap_embedder.1": (DIM, 96)}
    name = bench.write(
        "caption.safetensors", WRITERS["ai-toolkit"][0](mini_factors(scale=3.0, shapes=shapes))
    )
    settings = {**WAYS["plain"], "activated_loras": [name]}
    pictures = [
        bench.picture(**{**settings, "loras_multipliers": text}) for text in ("0", "1", "0,1", "1,0", "1,1")
    ]
    assert np.array_equal(pictures[1], pictures[4])
    for i, one in enumerate(pictures[:4]):
        assert all(apart(one, other) > 2 for other in pictures[:i])


def test_twelve_at_once_are_the_sum(bench: Bench) -> None:
    total: dict[str, Tensor] = {}
    names = []
    for i in range(12):
        given = mini_factors(seed=i, scale=0.1)
        names.append(bench.write(f"twelve/{i}.safetensors", list(WRITERS.values())[i][0](given)))
        for module, delta in deltas(given).items():
            total[module] = total.get(module, 0) + delta * (0.1 * i)
    strengths = " ".join(f"{0.1 * i:.1f}" for i in range(12))
    styled = bench.picture(**BASE, activated_loras=names, loras_multipliers=strengths)
    assert apart(styled, reference(BASE, total)) <= 2


@pytest.mark.parametrize("flavour", WRITERS)
def test_every_flavour_makes_the_same_picture(bench: Bench, flavour: str) -> None:
    """Logic: one set of factors, as each trainer writes it."""
    given = mini_factors()
    merged = merged_once(given)
    write = WRITERS[flavour][0]
    name = bench.write("flavour.safetensors", write(given))
    styled = bench.picture(**BASE, activated_loras=[name])
    assert apart(styled, merged) <= (40 if flavour == "bf16" else 2)


_merged: dict[str, np.ndarray] = {}


def merged_once(given: Any) -> np.ndarray:
    if not _merged:
        _merged["picture"] = reference(BASE, deltas(given))
    return _merged["picture"]


# -- quantized and streamed bases -------------------------------------------------------------------------


def latents(pipe: Any, **how: Any) -> Tensor:
    noise = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    arguments = dict(height=64, width=64, num_inference_steps=2, latents=noise, output_type="latent")
    return pipe("a red circle", **arguments, **how).images


def merged_dense(pipe: Any, changed: Mapping[str, Tensor]) -> Any:
    """The quantized pipe's transformer with plain linears in the place of those that change."""
    dense = copy.deepcopy(pipe.transformer)
    for name, delta in changed.items():
        parent, _, last = name.rpartition(".")
        old = dense.get_submodule(name)
        new = torch.nn.Linear(old.in_features, old.out_features, bias=False)
        new.weight = torch.nn.Parameter(old.dequantized() + delta, requires_grad=False)
        setattr(dense.get_submodule(parent), last, new)
    return dense


@pytest.fixture(params=["int8", "int4"])
def quantized(request: Any, tmp_path: Path) -> tuple[Any, Any, Any]:
    """(processor, pipe, shapes of the layers' linears) of a quantized model."""
    definition = mini.model_def("z_image_mini")
    if request.param == "int8":
        file, shapes = tmp_path / "int8.safetensors", MINI_SHAPES
        save_quantized(mini.load("z_image_mini")[1].transformer, file, weight_names.TRANSFORMER)
    else:
        tensors, _ = packers.nunchaku(packers.tiny_state(), packers.pack_svdq("int4"))
        file = packers.write(tmp_path / "svdq-int4.safetensors", tensors)
        dim = packers.TINY["dim"]
        sides = {96: dim, 256: int(dim / 3 * 8)}
        shapes = {name: tuple(sides[side] for side in shape) for name, shape in SHAPES.items()}
        definition = {**definition, "transformer_config": dict(packers.TINY)}
    processor, pipe = family_handler.load_model(
        file, "z_image", definition, device="cpu", dtype=torch.float32, prompt_cache=None
    )
    names = family_handler.query_lora_names("z_image", definition)
    return processor, pipe, (shapes, names)


def test_over_a_quantized_base(quantized: Any, tmp_path: Path) -> None:
    """Logic: int8 and Nunchaku int4 stay as they are; the LoRA is added beside them."""
    processor, pipe, (shapes, names) = quantized
    given = mini_factors(shapes=shapes)
    path = save(tmp_path / "a.safetensors", WRITERS["ai-toolkit"][0](given))
    plain = latents(pipe)
    expected = copy.copy(pipe)
    expected.transformer = merged_dense(pipe, deltas(given))
    expected.residency = Residency(torch.device("cpu"))
    theirs = latents(expected)
    assert processor.use_loras([path], parse("1", 1), names)
    ours = latents(pipe, lora_strengths=processor.multipliers.at)
    assert (ours - theirs).norm() < 2e-2 * (theirs - plain).norm()
    processor.use_loras([], parse("", 0), names)
    assert torch.equal(latents(pipe), plain)


@pytest.mark.parametrize("resident", [0, 3])
def test_a_quantized_base_streamed(card: Card, quantized: Any, resident: int, tmp_path: Path) -> None:
    """Logic: int8 and Nunchaku int4 through either engine are what they are in RAM, bit for bit, with a LoRA
    that comes, changes its strength and goes."""
    processor, pipe, (shapes, names) = quantized
    path = save(tmp_path / "a.safetensors", WRITERS["ai-toolkit"][0](mini_factors(shapes=shapes)))
    texts = ("", "1", "0.5,0", "")
    expected = []
    for residency in (Residency(torch.device("cpu")), card.residency()):
        pipe.residency = residency
        residency.place(pipe.transformer, Placement(resident))
        made = []
        for text in texts:
            processor.use_loras([path] if text else [], parse(text, 1 if text else 0), names)
            made.append(latents(pipe, lora_strengths=processor.multipliers.at))
        expected.append(made)
    plain, moved = expected
    assert all(map(torch.equal, plain, moved))
    assert torch.equal(plain[0], plain[3]) and not torch.equal(plain[1], plain[2])
    pipe.residency.forget()
    assert card.live == 0
    pipe.residency = Residency(torch.device("cpu"))


def test_streamed_is_resident(card: Card, tmp_path: Path) -> None:
    """Logic: either engine; the factors travel with their blocks, and are gone afterwards."""
    processor, pipe = mini.load("z_image_mini_base")
    names = family_handler.query_lora_names("z_image_base", mini.model_def("z_image_mini_base"))
    path = save(tmp_path / "a.safetensors", WRITERS["ai-toolkit"][0](mini_factors()))
    turned = lycoris_oft(shapes={name: shape for name, shape in MINI_SHAPES.items() if "attention" in name})
    oft = save(tmp_path / "b.safetensors", (turned.tensors, turned.metadata))
    plain = latents(pipe, guidance_scale=2.5)
    how = dict(guidance_scale=2.5)
    try:
        processor.use_loras([path, oft], parse("1,0.5 0.4", 2), names)
        styled = latents(pipe, **how, lora_strengths=processor.multipliers.at)
        processor.use_loras([], parse("", 0), names)
        pipe.residency = card.residency()
        pipe.residency.place(pipe.transformer, Placement(2))
        assert torch.equal(latents(pipe, **how), plain)
        assert processor.use_loras([path, oft], parse("1,0.5 0.4", 2), names)
        streamed = latents(pipe, **how, lora_strengths=processor.multipliers.at)
        assert torch.equal(streamed, styled) and not torch.equal(styled, plain)
        assert not processor.use_loras([path, oft], parse("0", 2), names)
        processor.use_loras([], parse("", 0), names)
        assert torch.equal(latents(pipe, **how), plain)
        pipe.residency.forget()
        assert card.live == 0 and (card.pinned == 0 or card.engine == "mmgp")
    finally:
        pipe.residency = Residency(torch.device("cpu"))
        processor.use_loras([], parse("", 0), names)


# -- what may not be used ---------------------------------------------------------------------------------


def bad_files(bench: Bench) -> dict[str, str]:
    """name -> words of the reason."""
    (bench.loras / "cut.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    (bench.loras / "page.safetensors").write_bytes(b"<!DOCTYPE html><html>Please log in</html>" * 20)
    bench.write(
        "large.safetensors", WRITERS["ai-toolkit"][0](factors({"layers.0.attention.to_q": (3840, 3840)}))
    )
    bench.write(
        "flux.safetensors",
        WRITERS["diffusers"][0](factors({"single_transformer_blocks.0.proj_out": (96, 96)})),
    )
    return {
        "cut.safetensors": "cut.safetensors",
        "page.safetensors": "web page",
        "large.safetensors": "does not fit Z-Image",
        "flux.safetensors": "Flux",
        "gone.safetensors": "is not in",
        "../outside.safetensors": "cannot be used",
        "https://example.com/x.safetensors|../up": "cannot be used",
        "http://example.com/x.safetensors": "https",
    }


def test_bad_files_are_refused_at_submit_and_the_queue_goes_on(bench: Bench) -> None:
    good = bench.write("style.safetensors", WRITERS["musubi"][0](mini_factors()))
    for name, reason in bad_files(bench).items():
        with pytest.raises(SettingsError, match=reason):
            bench.engine.submit({**COMMON, **BASE, "activated_loras": [good, name]})
    with pytest.raises(SettingsError, match="line 1, column 3"):
        bench.engine.submit({**COMMON, **BASE, "activated_loras": [good], "loras_multipliers": "1 x"})
    with pytest.raises(SettingsError, match="expected a list of texts"):
        bench.engine.submit({**COMMON, **BASE, "activated_loras": good})
    assert bench.picture(**BASE, activated_loras=[good]) is not None


def test_optional_loras_are_left_out_with_a_note(bench: Bench) -> None:
    bad = list(bad_files(bench))[:5]
    good = bench.write("style.safetensors", WRITERS["musubi"][0](mini_factors()))
    job, pixels = bench.run(
        **BASE,
        activated_loras=[bad[0], good, *bad[1:]],
        loras_multipliers="1 0.5 1 1 1 1 9",
        loras_optional=True,
    )
    left_out = [note for note in job.notes if "without the LoRA" in note]
    assert [note.split("'")[1] for note in left_out] == bad
    assert any("1 LoRA strengths more" in note for note in job.notes)
    assert np.array_equal(pixels, bench.picture(**BASE, activated_loras=[good], loras_multipliers="0.5"))


def test_a_file_that_goes_or_breaks_after_submit_fails_its_job_only(bench: Bench) -> None:
    given = mini_factors()
    first, second = (bench.write(f"{i}.safetensors", WRITERS["musubi"][0](given)) for i in "ab")
    poisoned = {name: (a * float("nan"), b, alpha) for name, (a, b, alpha) in given.items()}
    third = bench.write("nan.safetensors", WRITERS["musubi"][0](poisoned))  # a header does not show it
    jobs = [
        bench.engine.submit({**COMMON, **BASE, "activated_loras": [n]})[0] for n in (first, second, third)
    ]
    (bench.loras / first).unlink()
    (bench.loras / second).write_bytes(b"half")
    for job_id, reason in zip(jobs, ("is not in", "too short", "not numbers"), strict=True):
        job, pixels = bench.finish(job_id)
        assert job.status == "failed" and reason in job.error and pixels is None
    plain = bench.picture(**BASE)
    assert apart(plain, reference(BASE, {})) <= 1
    (bench.loras / second).unlink()
    (bench.loras / third).unlink()


def test_what_a_file_has_for_other_models_is_said(bench: Bench) -> None:
    tensors, meta = WRITERS["ai-toolkit"][0](mini_factors())
    tensors["lora_te1_text_model.lora_down.weight"] = torch.zeros(4, 8)
    tensors["lora_te1_text_model.lora_up.weight"] = torch.zeros(8, 4)
    name = bench.write("both.safetensors", (tensors, meta))
    job, _ = bench.run(**BASE, activated_loras=[name])
    assert any("both.safetensors is used in part" in note and "lora_te1" in note for note in job.notes)


# -- cards, addresses, metadata ---------------------------------------------------------------------------


def test_the_cards_own_loras_are_always_there_and_shed_when_the_model_changes(bench: Bench) -> None:
    """Logic: "styled" and "z_image_mini" share one transformer in memory."""
    given = mini_factors()
    bench.write("styled.safetensors", WRITERS["ai-toolkit"][0](given))
    other = mini_factors(seed=5)
    name = bench.write("other.safetensors", WRITERS["ai-toolkit"][0](other))
    bench.engine.reload_catalog()
    way = {**WAYS["plain"], "num_inference_steps": 2}
    plain = bench.picture(**way)
    half = {module: 0.5 * delta for module, delta in deltas(given).items()}
    both = {module: half[module] + 0.25 * delta for module, delta in deltas(other).items()}
    styled = {**way, "model_type": "styled"}
    assert apart(bench.picture(**styled), reference(way, half)) <= 2
    assert (
        apart(bench.picture(**styled, activated_loras=[name], loras_multipliers="0.25"), reference(way, both))
        <= 2
    )
    job, pixels = bench.run(**way)
    assert np.array_equal(pixels, plain)
    assert "loras" not in bench.engine.store.images(job.id)[0].metadata["zgp"]


def test_the_metadata_names_the_loras_and_makes_the_picture_again(bench: Bench) -> None:
    name = bench.write("people/a style.safetensors", WRITERS["musubi"][0](mini_factors()))
    job, pixels = bench.run(**BASE, activated_loras=[name], loras_multipliers="0.5,0.25 # soft")
    path = Path(bench.engine.store.images(job.id)[0].path)
    [entry] = metadata.read(path)["zgp"]["loras"]
    digest = hashlib.sha256((bench.loras / name).read_bytes()).hexdigest()
    assert entry == {"name": name, "strength": "0.5,0.25", "sha256": digest}
    text = Image.open(path).info["parameters"]
    assert text.startswith(f"{COMMON['prompt']} <lora:a style:0.5,0.25>\n")
    assert f'Lora hashes: "a style: {digest[:12]}"' in text
    again = metadata.settings_from(metadata.read(path))
    bench.picture(**BASE)
    assert np.array_equal(bench.picture(**again), pixels)


def test_an_address_is_fetched_when_its_job_runs(bench: Bench, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("shared.weights.downloads.check_request", lambda request: None)  # it is right here
    given = mini_factors()
    content = save(tmp_path / "x.safetensors", WRITERS["ai-toolkit"][0](given)).read_bytes()
    with Web() as web:
        threading.Thread(target=web.serve_forever, args=(0.02,), daemon=True).start()
        web.files["web.safetensors"] = content
        foreign = {"single_transformer_blocks.0.proj_out": (96, 96)}
        web.files["flux.safetensors"] = save(
            tmp_path / "y.safetensors", WRITERS["diffusers"][0](factors(foreign))
        ).read_bytes()
        job, pixels = bench.run(
            **BASE, activated_loras=[web.url("web.safetensors?type=Model&token=mine") + "|fetched"]
        )
        phases = [e.data["phase"] for e in bench.engine.store.events(0, job.id) if e.kind == "phase"]
        assert "Downloading web.safetensors" in phases and job.status == "done"
        assert apart(pixels, merged_once(given)) <= 2
        [image] = bench.engine.store.images(job.id)
        written = web.url("web.safetensors?type=Model|fetched")
        assert image.metadata["activated_loras"] == [written]
        assert b"token" not in Path(image.path).read_bytes()
        assert (bench.loras / "fetched/web.safetensors").read_bytes() == content
        job, _ = bench.run(**BASE, activated_loras=[web.url("flux.safetensors") + "|other"])
        assert job.status == "failed" and "not kept" in job.error
        web.shutdown()


def test_the_plan_counts_the_files(bench: Bench, monkeypatch: Any) -> None:
    names = [bench.write(f"{i}.safetensors", WRITERS["ai-toolkit"][0](mini_factors(i))) for i in range(2)]
    size = sum((bench.loras / name).stat().st_size for name in names)
    query, counted = family_handler.query_memory, []

    def counting(*arguments: Any, lora_bytes: int = 0) -> Any:
        counted.append(lora_bytes)
        return query(*arguments, lora_bytes=lora_bytes)

    monkeypatch.setattr(family_handler, "query_memory", counting)
    bench.picture(**BASE, activated_loras=names)
    bench.picture(**BASE)
    assert counted == [size, 0]


def test_models_without_loras_say_so(bench: Bench) -> None:
    library = bench.engine.loras("z_image_mini")
    assert library is bench.engine.loras("z_image_mini_base") and library.folder == bench.loras
    info = bench.engine.catalog.model("z_image_mini")
    without = copy.copy(info)
    object.__setattr__(without, "lora_folder", None)
    with pytest.raises(SettingsError, match="has no LoRAs"):
        without.loras()
