"""The grammar, the drawings and the adherence score that the Mini models were made and measured with."""

import random
from collections import Counter

import numpy as np
import pytest
import torch

from models.z_image.transformer_z_image import ZImageTransformer2DModel
from training.grammar import COLOURS, SHAPES, held_out, sample
from training.networks import TRANSFORMER, forward_batch
from training.render import draw, outline, polygon_distance
from training.score import score


def test_the_score_is_right_on_rendered_truth() -> None:
    """Jittered drawings of the scenes themselves: the classifier must be right in at least 98 %."""
    result = score(lambda scenes: [draw(s, 128, seed=i) for i, s in enumerate(scenes)], 150)
    assert min(result.background, result.colour_and_place, result.shape) >= 0.98


def test_the_score_of_other_pictures_is_near_chance() -> None:
    result = score(lambda scenes: [draw(s, 128, seed=1) for s in [*scenes[1:], scenes[0]]], 100)
    assert result.background < 0.3 and result.shape < 0.2 and result.everything < 0.05


def test_the_score_sees_a_wrong_shape_and_only_that() -> None:
    from dataclasses import replace

    def other_shapes(scenes):
        following = {a: b for a, b in zip(SHAPES, SHAPES[1:] + SHAPES[:1], strict=True)}
        changed = [
            replace(s, things=tuple(replace(t, shape=following[t.shape]) for t in s.things)) for s in scenes
        ]
        return [draw(s, 128, seed=3) for s in changed]

    result = score(other_shapes, 60)
    assert result.background == 1 and result.colour_and_place > 0.95 and result.shape < 0.05


def test_polygon_distance_of_a_square_is_exact() -> None:
    points = np.array([(0.0, 0.0), (0.5, 0.0), (1.86, 0.0), (1.86, 1.86)])
    distance = polygon_distance(points, outline("square"))
    assert distance == pytest.approx([-0.86, -0.36, 1.0, np.sqrt(2)])


def test_captions_name_what_is_drawn() -> None:
    rng = random.Random(0)
    for scene in (sample(rng) for _ in range(500)):
        caption = scene.caption.lower()
        for thing in scene.things:
            assert f"{thing.colour} {thing.shape}" in caption
        assert (scene.background in caption.replace("-", " ")) or not scene.names_background


def test_all_words_appear_and_a_tenth_is_held_out() -> None:
    rng = random.Random(0)
    scenes = [sample(rng) for _ in range(3000)]
    assert {t.shape for s in scenes for t in s.things} == set(SHAPES)
    assert {s.background for s in scenes} == set(COLOURS)
    assert set(Counter(len(s.things) for s in scenes)) == {1, 2, 3}
    assert 0.07 < np.mean([s.held_out for s in scenes]) < 0.13
    assert all(s.held_out for s in held_out(50))


def test_the_training_forward_is_the_models_forward() -> None:
    torch.manual_seed(0)
    model = ZImageTransformer2DModel(TRANSFORMER)
    latents, t = torch.randn(3, 16, 16, 24), torch.tensor([0.1, 0.5, 0.9])
    captions = [torch.randn(n, TRANSFORMER.cap_feat_dim) for n in (5, 20, 32)]
    wide = torch.nn.utils.rnn.pad_sequence(captions, batch_first=True)
    with torch.no_grad():
        batched, _ = forward_batch(model, latents, t, wide, torch.tensor([5, 20, 32]))
        prepared = [model.prepare(c, 16, 24) for c in captions]
        single = model(list(latents), t, prepared)
    torch.testing.assert_close(batched, torch.stack(single), rtol=1e-4, atol=1e-4)
