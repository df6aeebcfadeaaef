"""Every setting that is shown for a model changes its picture or its file; one without a proof here fails.

The whole way of a job: catalog, engine, queue, worker, handler, pipeline, file. The worker's code runs in
this process, on the built-in models.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw

from models.z_image import loading as z_image_loading
from shared.engine.configuration import EngineConfig
from shared.engine.engine import Engine
from shared.gpu import machine
from shared.settings.table import SETTINGS, SettingsError, idle
from shared.worker import worker
from shared.worker.model_manager import ModelHost
from tests.support import mini
from tests.support.lora_writers import WRITERS, save
from tests.support.mini_loras import mini_factors

ROOT = mini.ROOT
CARDS = ("z_image_mini", "z_image_mini_base", "z_image_mini_twinflow", "z_image_mini_control2_1")
PLAIN = {"prompt": "a red circle on a white background", "resolution": "64x64", "seed": 3}
STEPS = {"num_inference_steps": 2}


@dataclass(frozen=True)
class Proof:
    """Two values that make different pictures beside `needed`; {name} stands for a file of the test."""

    one: Any
    other: Any
    needed: Mapping[str, Any] = field(default_factory=dict)


GUIDED = {"guidance_scale": 4.0, "NAG_scale": 4.0}
NAG = {"NAG_scale": 4.0, "negative_prompt": "blue"}
GUIDANCE = {"guidance_scale": 4.0}
PICTURE = {"image_start": "{picture}"}
MASK = {**PICTURE, "image_mask": "{mask}"}
GUIDE = {"image_guide": "{picture}"}
MANY = {"num_inference_steps": 4}

PROOFS = {
    "model_type": Proof("z_image_mini", "z_image_mini_base"),
    "prompt": Proof("a red circle on a white background", "a blue star on a yellow background"),
    "negative_prompt": Proof("", "a red circle", GUIDED),
    "resolution": Proof("64x64", "80x64"),
    "num_inference_steps": Proof(2, 3),
    "seed": Proof(1, 2),
    "batch_size": Proof(1, 2),
    "guidance_scale": Proof(1.0, 4.0),
    "flow_shift": Proof(3.0, 6.0),
    "cfg_normalization": Proof(0.0, 0.5, GUIDANCE),
    "cfg_truncation": Proof(1.0, 0.1, GUIDANCE),
    "NAG_scale": Proof(1.0, 4.0, {"negative_prompt": "blue"}),
    "NAG_tau": Proof(1.0, 5.0, NAG),
    "NAG_alpha": Proof(0.2, 0.8, NAG),
    "seed_variety": Proof(0.0, 2.0),
    "seed_variety_share": Proof(20.0, 100.0, {"seed_variety": 2.0}),
    "seed_variety_until": Proof(10.0, 100.0, {"seed_variety": 2.0}),
    "hires_scale": Proof(1.0, 1.5),
    "hires_denoising_strength": Proof(0.0, 0.6, {"hires_scale": 1.5}),
    "hires_steps": Proof(2, 6, {"hires_scale": 1.5, "hires_denoising_strength": 0.6}),
    "hires_tile": Proof(0, 64, {"hires_scale": 2.0, "hires_denoising_strength": 0.6}),
    "outpaint": Proof("", "0,0,32,0", PICTURE),
    "sample_solver": Proof("unified_2s", "unified_4s"),
    "sampling_style": Proof("few", "mul"),
    "stochast_ratio": Proof("0", "1"),
    "extrapol_ratio": Proof(0.0, 0.8, MANY),
    "sampling_order": Proof(1, 2, MANY),
    "time_dist_ctrl": Proof("1,1,1", "2,1,1"),
    "rfba_gap_steps": Proof("0.001,0.6", "0.1,0.3"),
    "image_start": Proof("", "{picture}"),
    "denoising_strength": Proof(0.4, 0.9, PICTURE),
    "image_mask": Proof("", "{mask}", PICTURE),
    "mask_expand": Proof(0, 10, MASK),
    "mask_feather": Proof(0.0, 12.0, MASK),
    "mask_only": Proof(False, True, MASK),
    "mask_margin": Proof(0, 32, {**MASK, "mask_only": True}),
    "image_guide": Proof("", "{picture}"),
    "control_preprocessor": Proof("canny", "gray", GUIDE),
    "control_parameters": Proof("", "low=900, high=1000", GUIDE),
    "control_net_weight": Proof(0.3, 1.2, GUIDE),
    "control_start": Proof(0.0, 50.0, GUIDE),
    "control_end": Proof(50.0, 100.0, GUIDE),
    "activated_loras": Proof([], ["style.safetensors"]),
    "loras_multipliers": Proof("0.5", "1", {"activated_loras": ["style.safetensors"]}),
    "loras_optional": Proof(False, True, {"activated_loras": ["absent.safetensors"]}),
    "image_format": Proof("png", "webp"),
}
#: settings that are refused without their companion
REFUSED = ("image_mask", "outpaint")
#: settings that change no picture by themselves here, with the tests that prove them
SAME_PICTURE = {
    "override_attention": "gpu/test_attention.py",  # another way to the same picture
    "multi_prompts_gen_type": "prompts/test_prompts.py",  # other jobs
    "prompt_template": "prompts/test_prompts.py",  # what a prompt was drawn from
    "negative_prompt_template": "prompts/test_prompts.py",
    "precision": "library/test_outlook.py",  # the Minis have one file each
    "hires_upscaler": "imaging/test_hires.py",  # one of them without the package spandrel
}


class Bench:
    """A project folder with the Mini models, an engine, and its worker in this process."""

    def __init__(self, root: Path):
        self.root = root
        config = EngineConfig.at(root)
        self.engine = Engine(config)
        host = ModelHost(config.folders, machine=lambda: machine.survey("cpu"))
        self.worker = worker.Worker(self.engine.store, host, root / "outputs", root / "zgp.log")
        self.known: dict[str, str] = {}

    def outcome(self, settings: Mapping[str, Any]) -> str:
        """What a job leaves: kinds, sizes and pixels of its files, or that it is refused."""
        given = {name: self.filled(value) for name, value in settings.items()}
        key = json.dumps(self.complete(given), sort_keys=True)
        if key not in self.known:
            self.known[key] = self._outcome(given)
        return self.known[key]

    def filled(self, value: Any) -> Any:
        is_file = isinstance(value, str) and value.startswith("{")
        return str(self.root / f"{value.strip('{}')}.png") if is_file else value

    def complete(self, given: Mapping[str, Any]) -> dict[str, Any]:
        return {**given, **self.engine.catalog.validate({**given, "loras_optional": True}).settings, **given}

    def _outcome(self, given: Mapping[str, Any]) -> str:
        try:
            job_id, _ = self.engine.submit(given)
        except SettingsError as error:
            return f"refused: {error}"
        assert self.worker.run_one()
        job = self.engine.store.job(job_id)
        assert (job.status, job.error) == ("done", None), (given, job.error)
        found = []
        for record in self.engine.store.images(job_id):
            with Image.open(record.path) as image:
                found.append(
                    (image.format, image.size, hashlib.sha256(image.convert("RGB").tobytes()).hexdigest())
                )
        return repr(found)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    root = tmp_path_factory.mktemp("project")
    for folder in ("defaults", "finetunes", "loras/z_image"):
        (root / folder).mkdir(parents=True)
    for card in CARDS:
        shutil.copy(ROOT / "defaults" / f"{card}.json", root / "defaults")
    (root / "models").symlink_to(ROOT / "models")
    save(root / "loras" / "z_image" / "style.safetensors", WRITERS["ai-toolkit"][0](mini_factors()))
    picture = Image.new("RGB", (128, 128), (40, 120, 200))
    ImageDraw.Draw(picture).polygon([(64, 12), (116, 116), (12, 116)], fill=(240, 220, 60), outline="black")
    picture.save(root / "picture.png")
    mask = Image.new("L", (128, 128))
    ImageDraw.Draw(mask).rectangle((40, 40, 87, 87), fill=255)
    mask.save(root / "mask.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(z_image_loading, "default_device", lambda: torch.device("cpu"))
        yield Bench(root)


def shown(bench: Bench, card: str) -> list[str]:
    return [name for name in bench.engine.catalog.model(card).settings if name not in SAME_PICTURE]


def base(card: str) -> dict[str, Any]:
    return {"model_type": card, **PLAIN, **STEPS}


def test_every_setting_has_a_proof() -> None:
    assert set(PROOFS) | set(SAME_PICTURE) == set(SETTINGS)
    for test in SAME_PICTURE.values():
        assert (ROOT / "tests" / test).is_file()


@pytest.mark.parametrize("card", CARDS)
def test_every_setting_that_is_shown_acts(bench: Bench, card: str) -> None:
    silent = []
    for name in shown(bench, card):
        proof = PROOFS[name]
        pair = [{**base(card), **proof.needed, name: value} for value in (proof.one, proof.other)]
        if bench.outcome(pair[0]) == bench.outcome(pair[1]):
            silent.append(name)
    assert silent == []


@pytest.mark.parametrize("card", CARDS)
def test_what_is_called_idle_changes_nothing_and_what_changes_nothing_is_called_idle(
    bench: Bench, card: str
) -> None:
    """Beside the model's own defaults: there, the page says of a control whether it does anything now."""
    wrong = []
    for name in shown(bench, card):
        proof = PROOFS[name]
        pair = [{**base(card), name: value} for value in (proof.one, proof.other)]
        said = idle(bench.engine.catalog.validate({**pair[1], **dict.fromkeys(REFUSED, "")}).settings)
        acts = name not in REFUSED and bench.outcome(pair[0]) != bench.outcome(pair[1])
        if acts == (name in said):
            wrong.append((name, acts, said.get(name)))
    assert wrong == []


@pytest.mark.parametrize("solver", ["unified_2s", "unified_4s"])
def test_a_preset_with_its_own_steps_makes_the_number_of_steps_idle(bench: Bench, solver: str) -> None:
    settings = {**base("z_image_mini_twinflow"), "sample_solver": solver}
    assert bench.outcome({**settings, **STEPS}) == bench.outcome({**settings, "num_inference_steps": 9})
    assert list(idle({**settings, **STEPS})) == ["num_inference_steps"]


@pytest.mark.parametrize(
    ("name", "one", "other", "order", "fewest"),
    [("stochast_ratio", "0", "1", order, order + 1) for order in (1, 2, 3)]
    + [("extrapol_ratio", 0.0, 0.8, order, 3 * order + 1) for order in (1, 2, 3)],
)
def test_fresh_noise_and_extrapolation_rest_where_the_order_leaves_them_nothing_to_do(
    bench: Bench, name: str, one: Any, other: Any, order: int, fewest: int
) -> None:
    settings = {**base("z_image_mini_twinflow"), "sampling_order": order}
    for steps in (fewest - 1, fewest):
        pair = [{**settings, "num_inference_steps": steps, name: value} for value in (one, other)]
        acts = bench.outcome(pair[0]) != bench.outcome(pair[1])
        said = idle(bench.engine.catalog.validate(pair[1]).settings)
        assert acts == (steps == fewest)
        assert (name in said) == (steps < fewest)
    assert f"from {fewest} steps on" in idle({**settings, "num_inference_steps": 1, name: other})[name]
