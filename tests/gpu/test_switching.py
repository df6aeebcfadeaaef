"""Jobs of different models in turn, through the worker's host, with weights moved by either engine.

The card is not there (tests/support/cards.py): the pictures have to be those of the CPU, bit for bit.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw

from models.z_image import loading
from shared.gpu.planner import GIB, PROFILES, Machine, Overrides
from shared.library.catalog import catalog
from shared.weights.files import Folders
from shared.worker.model_manager import ModelHost, Silent
from tests.support.cards import Card
from tests.support.mini import ROOT

FOLDERS = Folders(ROOT, ROOT / "ckpts")
CPU = Machine("CPU", 64 * GIB, 60 * GIB)
CARD = Machine("Card", 64 * GIB, 60 * GIB, 8 * GIB, int(7.5 * GIB), (8, 6))
STYLE = "mini/mini_outlines.safetensors"

#: what one picture after the other is made with: other models, guidance, NAG, LoRAs that come, change and go
JOBS: tuple[dict[str, Any], ...] = (
    {"model_type": "z_image_mini"},
    {"model_type": "z_image_mini", "NAG_scale": 3.0, "negative_prompt": "blue"},
    {"model_type": "z_image_mini_base"},
    {"model_type": "z_image_mini", "activated_loras": [STYLE], "loras_multipliers": "1"},
    {"model_type": "z_image_mini", "activated_loras": [STYLE], "loras_multipliers": "0.3"},
    {"model_type": "z_image_mini_twinflow"},
    {"model_type": "z_image_mini_control2_1", "image_guide": "guide"},
    {"model_type": "z_image_mini"},
)


def pictures(host: ModelHost, jobs: tuple[dict[str, Any], ...]) -> list[bytes]:
    """Each job's picture; the prompts differ, so that the text encoder comes in between."""
    models, made = catalog(ROOT, FOLDERS.ckpts), []
    for number, job in enumerate(jobs):
        given = {"prompt": f"a red circle on {('white', 'yellow')[number % 2]}", "seed": 3, **job}
        settings = models.validate({"num_inference_steps": 2, **given}).settings
        model = host.get(settings["model_type"], Silent(), settings)
        model.pipe.prompt_cache = loading.PromptCache(None)
        done = model.processor.generate(
            settings, seeds=[3], on_phase=lambda _: None, on_step=lambda *_: None, interrupt=lambda: False
        )
        made.append(done.images[0].tobytes())
    return made


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], ...]:
    guide = Image.new("RGB", (128, 128), "white")
    ImageDraw.Draw(guide).ellipse((30, 30, 90, 90), outline="black", width=4)
    path = tmp_path_factory.mktemp("guide") / "guide.png"
    guide.save(path)
    return tuple(job | ({"image_guide": str(path)} if "image_guide" in job else {}) for job in JOBS)


@pytest.fixture(scope="module")
def expected(jobs: tuple[dict[str, Any], ...]) -> list[bytes]:
    return pictures(ModelHost(FOLDERS, gpu="cpu", machine=lambda: CPU), jobs)


@pytest.mark.parametrize("profile", ["", *PROFILES])
def test_every_model_draws_what_it_draws_in_ram(
    card: Card,
    profile: str,
    jobs: tuple[dict[str, Any], ...],
    expected: list[bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever came before it, at every profile; nothing is left on the card."""
    residency = card.residency()
    monkeypatch.setattr(loading, "default_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(loading, "Residency", lambda *_, **__: residency)
    host = ModelHost(FOLDERS, machine=lambda: CARD, overrides=Overrides(card.engine, profile))
    chosen = slice(None) if profile in ("", "4") else slice(2, 6)  # all of them take long
    assert pictures(host, jobs[chosen]) == expected[chosen]
    assert card.moved > 0 and len(residency.status().on_card) >= 3
    host.release()
    assert card.live == 0 and residency.status().on_card == {}
