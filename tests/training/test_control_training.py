"""The Mini's control network: how it is trained, its file, and how closely pictures follow edges."""

import argparse
import random
import re

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from models.z_image.checkpoints import weight_names
from models.z_image.control import OWN, ControlLayout, Hints
from models.z_image.transformer_z_image import ZImageConfig, ZImageTransformer2DModel
from shared.weights import formats
from tests.support.mini import ROOT
from training import control
from training.control import control_loss, export, hints, make_control
from training.control_score import ControlPainter, cases, judge, summary
from training.grammar import SHAPES, held_out, sample
from training.lessons import Lesson, Lessons, draw_lesson, draw_pictures, misnamed, warp
from training.networks import TRANSFORMER, forward_batch
from training.sampling import CardPainter, to_pictures
from training.score import NAMES, label

CARD = "z_image_mini_control2_1"
SHIPPED = ROOT / "models" / "z_image" / "mini" / "control.safetensors"
TINY = ZImageConfig(dim=32, n_layers=6, n_refiner_layers=1, n_heads=2, cap_feat_dim=16, axes_dims=(4, 6, 6))
WORDS = (torch.linspace(-1, 1, 2 * 32 * 16).view(2, 32, 16), torch.tensor([32, 32]))
LATENTS = torch.randn(2, 16, 8, 16, generator=torch.Generator().manual_seed(1))
CONTEXTS = torch.randn(2, 33, 8, 16, generator=torch.Generator().manual_seed(2))


def tiny() -> ZImageTransformer2DModel:
    torch.manual_seed(0)
    model = ZImageTransformer2DModel(TINY)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model.requires_grad_(False)


def train(net, base, steps: int) -> list[float]:
    """The losses of `steps` steps, all on the same pictures, noise, noise levels and strength."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=5e-3)
    losses = []
    for _ in range(steps):
        torch.manual_seed(3)
        random.seed(3)
        loss = control_loss(net, base, LATENTS, WORDS, CONTEXTS)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


# ---------------------------------------------------------------- training


def test_training_starts_at_the_base_and_lowers_the_loss_around_it() -> None:
    base, t = tiny(), torch.tensor([0.2, 0.7])
    before = {name: x.clone() for name, x in base.state_dict().items()}
    net = make_control(base, TINY, 3)
    alone, _ = forward_batch(base, LATENTS, t, *WORDS)
    assert torch.equal(
        forward_batch(base, LATENTS, t, *WORDS, control=hints(net, base, CONTEXTS, 1))[0], alone
    )
    losses = train(net, base, 30)
    assert losses[-1] < 0.8 * losses[0]
    assert all(torch.equal(x, before[name]) for name, x in base.state_dict().items())
    moved = forward_batch(base, LATENTS, t, *WORDS, control=hints(net, base, CONTEXTS, 1))[0]
    assert (moved - alone).abs().max() > 0.05


def test_blocks_start_as_copies_of_those_they_stand_beside() -> None:
    base = tiny()
    net = make_control(base, TINY, 3)
    pairs = [(net.control_layers[n], base.layers[2 * n]) for n in range(3)]
    for block, source in (*pairs, (net.control_noise_refiner[0], base.noise_refiner[0])):
        own = block.state_dict()
        assert all(torch.equal(own[name], x) for name, x in source.state_dict().items())


def test_the_training_forward_is_the_programs() -> None:
    """The batch with its hints, and each picture alone through the program's own forward."""
    base = tiny()
    net = make_control(base, TINY, 3)
    train(net, base, 5)
    t = torch.tensor([0.2, 0.7])
    with torch.no_grad():
        batch, _ = forward_batch(base, LATENTS, t, *WORDS, control=hints(net, base, CONTEXTS, 0.8))
        for i in range(2):
            prepared = [base.prepare(WORDS[0][i], 8, 16)]
            alone = Hints(net, [net.embed(CONTEXTS[i], base.x_pad_token)], 0.8)
            (one,) = base([LATENTS[i]], t[i : i + 1], prepared, control=alone)
            torch.testing.assert_close(batch[i], one, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_a_stopped_training_goes_on(tmp_path) -> None:
    args = argparse.Namespace(out=tmp_path, seconds=1000.0, stop_after=2.0, batch=2, lr=1e-3)
    states = []
    for _ in range(2):
        control.train(args, "cpu")
        states.append(torch.load(tmp_path / "control.pt"))
    first, second = states
    assert 0 < first["step"] < second["step"] and first["elapsed"] < second["elapsed"]
    assert {f.name for f in tmp_path.iterdir()} == {"control.pt", "control.safetensors", "control.png"}


# ---------------------------------------------------------------- lessons


def test_words_are_true_where_no_edges_contradict_them() -> None:
    rng = random.Random(0)
    lessons = [lesson for _ in range(2000) if (lesson := draw_lesson(rng)) is not None]
    told = [lesson for lesson in lessons if lesson.caption]
    assert all(not lesson.scene.held_out for lesson in lessons)
    assert all(x.caption == x.scene.caption and x.form == "drawn" for x in told if not x.edges)
    with_edges = [lesson for lesson in told if lesson.edges]
    untrue = [lesson for lesson in with_edges if lesson.caption != lesson.scene.caption]
    assert 0.4 < len(untrue) / len(with_edges) < 0.65
    assert all(lesson.scene.things[0].colour in lesson.caption.lower() for lesson in untrue)


def test_misnamed_captions_keep_everything_but_the_shapes() -> None:
    rng, shapes = random.Random(1), "|".join((*SHAPES, "shape", "thing"))
    for scene in (sample(rng) for _ in range(50)):
        wrong = misnamed(scene.caption, rng)
        assert re.sub(shapes, "_", wrong) == re.sub(shapes, "_", scene.caption)


def test_warped_pictures_keep_their_colours() -> None:
    image = torch.full((4, 3, 32, 48), -1.0)
    image[:, 0, 8:24, 12:36] = 1.0
    torch.manual_seed(0)
    warped = warp(image)
    assert warped.shape == image.shape and (warped[:, 1:] + 1).abs().max() < 1e-5
    assert warped[:, 0].amin() < -0.99 and warped[:, 0].amax() > 0.99
    assert (warped != image).flatten(1).any(1).all()


def test_doodles_are_drawn_in_a_scenes_colours() -> None:
    rng, lessons = random.Random(6), []
    while len(lessons) < 12:
        lesson = draw_lesson(rng)
        if lesson is not None and lesson.form == "doodled":
            lessons.append(lesson)
    pictures = to_pictures(draw_pictures(lessons, 64, 96, rng, "cpu"))
    shares = []
    for image, lesson in zip(pictures, lessons, strict=True):
        found = label(image)
        assert found.shape == (64, 96)
        colours = lesson.scene.background, lesson.scene.things[0].colour
        shares.append([(found == NAMES.index(colour)).mean() for colour in colours])
    background, things = np.array(shares).T
    assert 0.05 < np.mean(things) < np.mean(background) and min(background + things) > 0.9


def test_contexts_hold_what_a_lesson_shows() -> None:
    """Channels 0-15 the edges' latents, 16 one where the picture is kept, 17-32 what is kept; else zeros."""
    lessons = Lessons(4, 0, "cpu")
    lessons.rng.seed(4)  # a hole that is not everything
    kinds = [(True, False), (False, True), (True, True), (False, False)]
    shown = [Lesson(sample(random.Random(5), 1), "", edges, hole, "drawn") for edges, hole in kinds]
    images = torch.full((4, 3, 64, 64), -0.5)
    images[:, :, 20:40, 20:40] = 0.5
    made = lessons.contexts(shown, images)
    assert made.shape == (4, 33, 8, 8)
    for context, (edges, hole) in zip(made, kinds, strict=True):
        assert bool(context[:16].any()) == edges
        assert set(context[16].unique().tolist()) == ({0.0, 1.0} if hole else {0.0})
        assert bool(context[17:].any()) == hole


def test_the_minis_vae_keeps_edges_apart() -> None:
    """White lines on black are strange to it; a line's place must still be in its latents."""
    maps = torch.full((2, 3, 64, 64), -1.0)
    maps[0, :, :, 26], maps[1, :, :, 29] = 1, 1
    empty, first, second = Lessons(2, 0, "cpu").encode(torch.cat((torch.full_like(maps[:1], -1), maps)))
    there = (first - empty)[..., 3].square().mean().sqrt()  # the column of cells that holds the line
    moved = (first - second)[..., 3].square().mean().sqrt()
    assert there > 0.5 and moved > 0.5


# ---------------------------------------------------------------- the score


def test_the_score_of_rendered_truth() -> None:
    asked = list(cases(12, seed=3))
    verdicts = [judge(case.picture, case) for case in asked]
    assert min(verdict.overlap for verdict in verdicts) > 0.85
    assert np.mean([v.looks_like == case.shape for v, case in zip(verdicts, asked, strict=True)]) > 0.95
    assert "12 cases" in summary(verdicts, asked)


def test_the_score_of_a_picture_without_the_shape() -> None:
    case = next(cases(1))
    empty = np.broadcast_to(case.picture[0, 0], case.picture.shape)
    verdict = judge(empty, case)
    assert verdict.overlap == 0 and verdict.looks_like == ""


# ---------------------------------------------------------------- the shipped file


def published_shapes(config: ZImageConfig, layers: int, channels: int) -> dict[str, list[int]]:
    """The published files' names, and their shapes at these dimensions."""
    dim, head, inner = config.dim, config.dim // config.n_heads, int(config.dim / 3 * 8)
    block = {
        **{f"attention.{name}.weight": [dim, dim] for name in ("to_q", "to_k", "to_v", "to_out.0")},
        **{f"attention.{name}.weight": [head] for name in ("norm_q", "norm_k")},
        **{f"feed_forward.{name}.weight": [inner, dim] for name in ("w1", "w3")},
        "feed_forward.w2.weight": [dim, inner],
        **{f"{part}_norm{i}.weight": [dim] for part in ("attention", "ffn") for i in (1, 2)},
        "adaLN_modulation.0.weight": [4 * dim, min(dim, 256)],
        "adaLN_modulation.0.bias": [4 * dim],
        "after_proj.weight": [dim, dim],
        "after_proj.bias": [dim],
    }
    before = {"before_proj.weight": [dim, dim], "before_proj.bias": [dim]}
    key = f"control_all_x_embedder.{config.key}"
    shapes = {f"{key}.weight": [dim, 4 * channels], f"{key}.bias": [dim]}
    for name, count in (("control_layers", layers), ("control_noise_refiner", config.n_refiner_layers)):
        for i in range(count):
            own = {**block, **before} if i == 0 else block
            shapes |= {f"{name}.{i}.{inside}": shape for inside, shape in own.items()}
    return shapes


def test_an_exported_file_has_the_published_names(tmp_path) -> None:
    file = tmp_path / "it.safetensors"
    export(make_control(tiny(), TINY, 3), file, "a test")
    with safe_open(file, "pt") as found:
        shapes = {name: found.get_slice(name).get_shape() for name in found.keys()}
    assert shapes == published_shapes(TINY, 3, 33)


def test_the_shipped_file_is_a_2_1_control_network_of_the_mini() -> None:
    with safe_open(SHIPPED, "pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}
        assert {file.get_slice(name).get_dtype() for name in shapes} == {"F16"}
    assert shapes == published_shapes(TRANSFORMER, 3, 33)
    assert SHIPPED.stat().st_size < 8_000_000
    layout = ControlLayout.of(formats.inspect([SHIPPED], weight_names.CONTROL), TRANSFORMER)
    assert layout == ControlLayout(33, (0, 2, 4), OWN)


@pytest.mark.slow
def test_pictures_follow_edges_against_the_words() -> None:
    painter, asked = ControlPainter(CARD, None), list(cases(16, seed=1))
    verdicts = [judge(*pair) for pair in zip(painter.paint(asked, 0.9), asked, strict=True)]
    assert np.mean([verdict.overlap for verdict in verdicts]) >= 0.7, summary(verdicts, asked)
    like = [v.looks_like == case.shape for v, case in zip(verdicts, asked, strict=True)]
    assert np.mean(like) >= 0.7, summary(verdicts, asked)


@pytest.mark.slow
def test_at_strength_0_the_picture_is_the_minis() -> None:
    asked = list(cases(2))
    with_network, without = ControlPainter(CARD, None), ControlPainter("z_image_mini", None)
    without.pipe.control = None
    plain = [without._draw(case, seed, 0.0) for seed, case in enumerate(asked)]
    for a, b in zip(with_network.paint(asked, 0.0), plain, strict=True):
        assert np.array_equal(a, b)


@pytest.mark.slow
def test_a_job_with_a_picture_of_a_square_draws_a_square(tmp_path) -> None:
    """The settings of a job: the program finds the edges in the picture itself."""
    scene = next(s for s in held_out(400) if s.layout == "centre" and s.things[0].shape == "star")
    black = np.zeros((128, 128, 3), np.uint8)
    black[38:90, 38:90] = 255
    Image.fromarray(black).save(tmp_path / "square.png")
    painter = CardPainter(CARD, {})
    made = painter.processor.generate(
        painter.settings
        | {
            "prompt": scene.caption,
            "image_guide": str(tmp_path / "square.png"),
            "control_preprocessor": "canny",
            "control_parameters": "",
            "control_net_weight": 1.0,
            "control_start": 0,
            "control_end": 100,
        },
        seeds=list(range(6)),
        on_phase=lambda phase: None,
        on_step=lambda step, total, previews: None,
        interrupt=lambda: False,
    )
    square, close = black[..., 0] > 0, 0
    for image in made.images:
        drawn = label(np.asarray(image)) == NAMES.index(scene.things[0].colour)
        close += (drawn & square).sum() / (drawn | square).sum() >= 0.7
    assert close >= 4
