"""Seed variety: what its noise is, and what it does to the built-in models' pictures."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from models.z_image.seed_variety import SeedVariety
from shared.errors import UserError
from tests.support import mini

PROMPT = "a red circle above a blue square on a yellow background"
FEATURES = torch.randn(40, 2000, generator=torch.Generator().manual_seed(1)) * torch.linspace(0.1, 9, 2000)


def pictures(card="z_image_mini", seeds=(5,), **options):
    _, pipe = mini.load(card)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    made = pipe(
        PROMPT, height=128, width=128, num_inference_steps=options.pop("steps", 4), output_type="pt",
        num_images_per_prompt=len(seeds), generator=generators, **options,
    )  # fmt: skip
    return [image.numpy() for image in made.images]


def test_the_noise_has_each_features_own_size_and_the_share_that_was_asked_for():
    noise = SeedVariety(0.5, 0.3).apply(FEATURES, 7) - FEATURES
    assert float((noise != 0).float().mean()) == pytest.approx(0.3, abs=0.01)
    sizes = torch.tensor([x[x != 0].square().mean().sqrt() for x in noise.T])
    assert float((sizes / torch.linspace(0.1, 9, 2000)).mean()) == pytest.approx(0.5, rel=0.1)


def test_one_token_of_another_kind_does_not_set_the_size():
    odd = FEATURES.clone()
    odd[0] = 10_000.0
    noise = (SeedVariety(1, 1).apply(odd, 7) - odd)[1:]
    assert float(noise.square().mean().sqrt()) == pytest.approx(float(FEATURES.std()), rel=0.2)


def test_the_noise_is_the_seeds_own_and_not_its_start_noise():
    variety = SeedVariety(1, 1)
    assert torch.equal(variety.apply(FEATURES, 7), variety.apply(FEATURES, 7))
    noise = (variety.apply(FEATURES, 7) - FEATURES).flatten()
    other = (variety.apply(FEATURES, 8) - FEATURES).flatten()
    numbers = torch.Generator().manual_seed(7)
    start = [draw(FEATURES.numel(), generator=numbers) for draw in (torch.rand, torch.randn)]
    first = torch.randn(FEATURES.numel(), generator=torch.Generator().manual_seed(7))
    for stranger in (other, first, *start):
        assert abs(float(torch.corrcoef(torch.stack([noise, stranger]))[0, 1])) < 0.02
    assert variety.apply(FEATURES.bfloat16(), 7).dtype == torch.bfloat16


def test_each_picture_of_each_prompt_has_the_noise_of_its_generator():
    variety, texts = SeedVariety(1, 1), [FEATURES, FEATURES + 1]
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4, 5, 6)]
    expected = [variety.apply(texts[i // 2], seed) for i, seed in enumerate((3, 4, 5, 6))]
    for ours, theirs in zip(variety.for_each(texts, 2, generators), expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    "until, steps, acting",
    [(1, 4, [0, 1, 2, 3]), (0.5, 4, [0, 1]), (0.5, 2, [0]), (0.05, 4, [0]), (0, 4, [])],
)
def test_it_ends_where_it_was_asked_to(until, steps, acting):
    assert [i for i in range(steps) if SeedVariety(1, 0.5, until).acts_at(i, steps)] == acting


def test_values_out_of_range_are_one_sentence():
    with pytest.raises(UserError, match="seed_variety came as 3.0; expected a number from 0 to 2"):
        pictures(seed_variety=3)


@pytest.mark.parametrize("card", ["z_image_mini", "z_image_mini_base", "z_image_mini_twinflow"])
def test_off_is_bit_for_bit_what_it_was_and_on_is_another_picture(card):
    [before] = pictures(card)
    for off in ({"seed_variety": 0.0}, {"seed_variety": 1, "seed_variety_share": 0}):
        np.testing.assert_array_equal(pictures(card, **off)[0], before)
    assert np.abs(pictures(card, seed_variety=1)[0] - before).mean() > 0.001
    early = pictures(card, seed_variety=1, seed_variety_until=0.25)[0]
    assert np.abs(early - before).mean() > 0.0005
    assert np.abs(early - pictures(card, seed_variety=1)[0]).mean() > 0.0005


@pytest.mark.parametrize("card", ["z_image_mini", "z_image_mini_twinflow"])
def test_a_picture_is_the_same_alone_and_in_a_batch(card):
    options = {"seed_variety": 1.0, "seed_variety_until": 0.5}
    batch = pictures(card, (5, 6, 7), **options)
    for seed, picture in zip((5, 6, 7), batch, strict=True):
        [alone] = pictures(card, (seed,), **options)
        assert np.abs(alone - picture).max() < 2e-3  # another batch size sums in another order
        np.testing.assert_array_equal(pictures(card, (seed,), **options)[0], alone)


def test_seeds_differ_more_with_it():
    def distance(**options):
        made = pictures(seeds=range(6), steps=8, **options)
        return np.mean([np.abs(a - b).mean() for a, b in itertools.combinations(made, 2)])

    assert distance(seed_variety=1.0, seed_variety_until=1.0) > 1.2 * distance()
