"""The Mini LoRA: how it is trained, its file, and what it does to Mini Base's pictures."""

import argparse
import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from models.z_image.transformer_z_image import ZImageConfig, ZImageTransformer2DModel
from tests.support.mini import ROOT
from training.grammar import held_out
from training.lora import STROKE, TRIGGER, add_lora, export, lora_parameters, merge, velocity_loss
from training.lora import train as run
from training.networks import TRANSFORMER, forward_batch
from training.render import draw
from training.score import judge, silhouette, summarize
from training.style import measure, paint, style

SHIPPED = ROOT / "loras" / "z_image" / "mini" / "mini_outlines.safetensors"
TINY = ZImageConfig(dim=32, n_layers=4, n_refiner_layers=1, n_heads=2, cap_feat_dim=16, axes_dims=(4, 6, 6))
WORDS = (torch.linspace(-1, 1, 2 * 32 * 16).view(2, 32, 16), torch.tensor([5, 32]))


def tiny() -> ZImageTransformer2DModel:
    torch.manual_seed(0)
    model = ZImageTransformer2DModel(TINY)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def train(model: ZImageTransformer2DModel, steps: int) -> list[float]:
    """The losses of `steps` steps, all on the same pictures, noise and noise levels."""
    latents = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        torch.manual_seed(2)
        loss = velocity_loss(model, latents, WORDS)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def predict(model: ZImageTransformer2DModel) -> torch.Tensor:
    x = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return forward_batch(model, x, torch.tensor([0.2, 0.7]), *WORDS)[0]


# ---------------------------------------------------------------- training


def test_the_loss_is_the_velocitys_squared_error(monkeypatch) -> None:
    """From what the model is given: x = (1 - sigma) latents + sigma noise at time 1 - sigma."""
    torch.manual_seed(4)
    latents, answer, seen = torch.randn(3, 16, 8, 8), torch.randn(3, 16, 8, 8), {}

    def forward(model, x, t, features, lengths):
        seen.update(x=x, sigma=1 - t[:, None, None, None])
        return answer, None

    monkeypatch.setattr("training.lora.forward_batch", forward)
    loss = velocity_loss(tiny(), latents, WORDS)
    noise = (seen["x"] - (1 - seen["sigma"]) * latents) / seen["sigma"]
    towards_the_picture = latents - noise
    torch.testing.assert_close(loss, ((answer - towards_the_picture) ** 2).mean(), rtol=1e-3, atol=1e-3)


def test_training_starts_at_the_base_and_lowers_the_loss() -> None:
    model, base = tiny(), tiny()
    add_lora(model, 4)
    assert torch.equal(predict(model), predict(base))
    losses = train(model, 30)
    assert losses[-1] < 0.8 * losses[0]


def test_only_the_thin_matrices_of_the_main_layers_learn() -> None:
    model, base = tiny(), tiny().state_dict()
    add_lora(model, 4)
    train(model, 2)
    learned = lora_parameters(model)
    assert {name.split(".")[0] for name in learned} == {"layers"}
    assert len(learned) == 2 * 8 * TINY.n_layers  # q, k, v, out, w1, w2, w3 and the modulation
    for name, value in model.state_dict().items():
        if name not in learned:
            assert torch.equal(value, base[name.replace(".base.", ".")]), name


def test_the_file_merged_into_the_base_is_the_trained_model(tmp_path) -> None:
    model, base = tiny(), tiny()
    add_lora(model, 4)
    train(model, 10)
    export(model, tmp_path / "it.safetensors", "a test")
    lora = load_file(tmp_path / "it.safetensors")
    untouched = predict(base)
    merge(base, lora, 1.0)
    torch.testing.assert_close(predict(base), predict(model), rtol=2e-3, atol=2e-3)
    assert (untouched - predict(base)).abs().max() > 0.02


def test_merging_adds_strength_times_b_a() -> None:
    model, name = tiny(), "layers.1.feed_forward.w2"
    before = model.get_submodule(name).weight.clone()
    a, b = torch.randn(3, before.shape[1]), torch.randn(before.shape[0], 3)
    merge(model, {f"diffusion_model.{name}.lora_{k}.weight": x for k, x in (("A", a), ("B", b))}, 0.5)
    expected = before + 0.5 * torch.einsum("or,ri->oi", b, a)
    torch.testing.assert_close(model.get_submodule(name).weight, expected)


@pytest.mark.slow
def test_a_stopped_training_goes_on(tmp_path) -> None:
    args = argparse.Namespace(out=tmp_path, seconds=1000.0, stop_after=2.0, batch=4, rank=4, lr=1e-3)
    states = []
    for _ in range(2):
        run(args, "cpu")
        states.append(torch.load(tmp_path / "lora.pt"))
    first, second = states
    assert 0 < first["step"] < second["step"] and first["elapsed"] < second["elapsed"]
    optimizer_steps = {int(s["step"]) for s in second["optimizer"]["state"].values()}
    assert optimizer_steps == {second["step"]}
    assert {f.name for f in tmp_path.iterdir()} == {
        "lora.pt",
        "mini_outlines.safetensors",
        "mini_outlines.png",
    }


# ---------------------------------------------------------------- the style score


def test_the_style_of_rendered_truth() -> None:
    """Jittered drawings, filled and as outlines; the worst are stars that the picture's edge cuts."""
    scenes = held_out(60, seed=21)
    plain, styled = (
        [style(draw(s, 128, seed=i, stroke=stroke), s) for i, s in enumerate(scenes)]
        for stroke in (0, STROKE)
    )
    assert np.mean(plain) < 0.02 and max(plain) < 0.1
    assert np.mean(styled) > 0.98 and min(styled) > 0.7


def test_half_the_objects_hollow_is_half_the_style() -> None:
    scene = next(s for s in held_out(50) if s.layout in ("left of", "right of"))
    filled, hollow = draw(scene), draw(scene, stroke=STROKE)
    half = np.concatenate((filled[:, :64], hollow[:, 64:]), axis=1)
    assert style(half, scene) == pytest.approx(0.5, abs=0.02)


def test_an_empty_picture_has_no_style() -> None:
    scene = held_out(1)[0]
    empty = np.broadcast_to(draw(scene)[2, 2], (128, 128, 3))
    assert style(empty, scene) == 0


def test_silhouettes_of_outlines_have_the_shape() -> None:
    """On rendered truth; without filling them the classifier is lost."""
    scenes = held_out(60, seed=22)
    pictures = [draw(s, 128, seed=i, stroke=STROKE) for i, s in enumerate(scenes)]
    assert measure(pictures, scenes)[1].everything >= 0.98
    plain = summarize([judge(p, s) for p, s in zip(pictures, scenes, strict=True)])
    assert plain.shape < 0.9


def test_a_silhouette_fills_holes_and_nothing_else() -> None:
    mask = np.zeros((24, 24), bool)
    mask[2:9, 2:9] = True
    mask[4:7, 4:7] = False  # a hole
    mask[14:22, 12:20] = True
    mask[15:21, 13:19] = False
    mask[21, 15] = False  # the line round this hole is broken
    mask[12:24, 2:4] = True
    closed = mask.copy()
    closed[4:7, 4:7] = True
    assert (silhouette(mask, gap=0) == closed).all()
    closed[14:21, 12:20] = True  # the break itself stays
    assert (silhouette(mask)[:, 8:] == closed[:, 8:]).all()


# ---------------------------------------------------------------- the shipped file


def test_the_shipped_file_is_an_ordinary_lora_of_the_mini() -> None:
    shapes = {n: p.shape for n, p in ZImageTransformer2DModel(TRANSFORMER).named_parameters()}
    with safe_open(SHIPPED, "pt") as file:
        metadata, names = file.metadata(), set(file.keys())
        assert SHIPPED.stat().st_size < 1_500_000
        for name in names:
            stem, kind, _ = name.rsplit(".", 2)
            out, into = shapes[stem.removeprefix("diffusion_model.") + ".weight"]
            rank = file.get_slice(f"{stem}.lora_A.weight").get_shape()[0]
            assert file.get_slice(name).get_shape() == ([rank, into] if kind == "lora_A" else [out, rank])
    assert "diffusion_model.layers.0.attention.to_q.lora_A.weight" in names
    assert metadata["ss_base_model_version"] == "zimage"
    assert metadata["modelspec.trigger_phrase"] == TRIGGER
    assert json.loads(metadata["software"])["name"] == "ZGP training/lora.py"


def test_the_preview_lies_beside_it() -> None:
    preview = SHIPPED.with_suffix(".png")
    assert preview.stat().st_size < 60_000 and Image.open(preview).width >= 128


@pytest.mark.slow
def test_style_rises_with_strength() -> None:
    """Merged into Mini Base's weights. docs/mini.md has the scores over more prompts."""
    scenes = held_out(12, seed=23)
    results = [
        measure(paint("z_image_mini_base", scenes, SHIPPED, w, {"num_inference_steps": 12}), scenes)
        for w in (0.0, 0.5, 1.0)
    ]
    styles = [hollow for hollow, _ in results]
    assert styles[0] < 0.15 and styles[2] > 0.8, styles
    assert styles[0] < styles[1] < styles[2], styles
    assert results[2][1].shape >= 0.7 and results[2][1].background >= 0.9, results[2]
