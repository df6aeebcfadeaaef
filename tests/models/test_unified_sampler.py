"""The unified sampler against its formulas written out in one line after the other, and its orders."""

import itertools
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from models.z_image.pipeline_z_image import ZImagePipeline
from models.z_image.unified_sampler import UnifiedConfig, is_unified, resolve, sample, time_grid
from models.z_image.z_image_handler import family_handler
from shared.errors import UserError
from shared.settings.table import SETTINGS
from shared.settings.validation import validate
from tests.support import mini

PRESETS = {1: "few", 2: "few", 3: "any", 4: "any", 5: "mul", 8: "mul"}


def field(x: Tensor, t: float, tt: float) -> Tensor:
    """Some velocity that depends on everything it may depend on."""
    return torch.sin(2 * x + 3 * t) + 0.5 * x * math.cos(5 * tt) + tt


def predict(xs: list[Tensor], t: float, tt: float) -> list[Tensor]:
    return [field(x, t, tt) for x in xs]


def transcription(noise: Tensor, seed: int, steps: int, style: str, order: int, r, e: float) -> Tensor:
    """Section by section: grid, prediction, correction, extrapolation, step; one sample."""
    gap = {"few": (0.001, 0.6), "any": (0.001, 0.5), "mul": (0.001, 0.0)}[PRESETS[steps]]
    n = math.ceil(steps / order)
    u = torch.linspace(gap[0], 1 - gap[1], n + (gap[1] == 0), dtype=torch.float64)[:n]
    times = [*(1 - u).tolist(), 0.0]
    generator = torch.Generator().manual_seed(seed)
    x, old_x, old_z = noise.double(), [], []
    for i in range(n):
        t, t_next = times[i], times[i + 1]
        f = field(x, t, {"few": 0.0, "any": t_next, "mul": t}[style])
        if order == 2 and t_next > 0:
            end = x + (t_next - t) * f
            f = (f + field(end, t_next, {"few": 0.0, "any": t_next, "mul": t_next}[style])) / 2
        x_hat, z_hat = x - t * f, x + (1 - t) * f
        result = x_hat
        old_x.append(x_hat)
        old_z.append(z_hat)
        if i >= 2:
            x_hat = x_hat + e * (x_hat - old_x[i - 1])
            z_hat = z_hat + e * (z_hat - old_z[i - 1])
        if t_next == 0:
            break
        ratio = min(max(abs(t_next - t) * 2 * t / t_next**2, 0), 1) if r == "SDE" else r
        e_noise = torch.randn(noise.shape, generator=generator) if ratio > 0 else torch.zeros(noise.shape)
        x = (1 - t_next) * x_hat + t_next * (
            z_hat * max(1 - ratio, 0) ** 0.5 + e_noise.double() * ratio**0.5
        )
    return result


@pytest.mark.parametrize("steps", PRESETS)
@pytest.mark.parametrize("order", [1, 2])
def test_every_configuration_follows_the_formulas(steps: int, order: int) -> None:
    noises = [torch.randn(3, 4, generator=torch.Generator().manual_seed(s)) for s in (0, 1)]
    for style, r, e in itertools.product(("few", "any", "mul"), (0, 0.5, 1, 2, "SDE"), (0, 0.3)):
        own = {"sampling_style": style, "sampling_order": order, "stochast_ratio": r, "extrapol_ratio": e}
        generators = [torch.Generator().manual_seed(s) for s in (8, 9)]
        out = sample(predict, noises, resolve("unified", steps, own), generators)
        for x, noise, seed in zip(out, noises, (8, 9), strict=True):
            expected = transcription(noise, seed, steps, style, order, r, e)
            torch.testing.assert_close(x, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("steps", "grid"),
    [
        (1, [0.999, 0]),
        (2, [0.999, 0.6, 0]),
        (3, [0.999, 0.7495, 0.5, 0]),
        (4, [0.999, 0.8327, 0.6663, 0.5, 0]),
        (5, [0.999, 0.7992, 0.5994, 0.3996, 0.1998, 0]),
    ],
)
def test_time_grids(steps: int, grid: list[float]) -> None:
    assert time_grid(resolve("unified", steps)) == pytest.approx(grid, abs=5e-5)


def test_the_curve_of_the_grid() -> None:
    config = resolve("unified", 4, {"time_dist_ctrl": "2, 0.5, 1.5", "rfba_gap_steps": [0.1, 0.1]})
    line = [0.1 + 0.8 * i / 3 for i in range(4)]
    expected = [1 - (1 - (1 - u**2) ** 0.5) ** 1.5 for u in line] + [0]
    assert time_grid(config) == pytest.approx(expected)


def test_presets_and_names() -> None:
    for steps, style in PRESETS.items():
        assert resolve("twinflow", steps).sampling_style == style
    assert resolve("unified_2s", 8).sampling_steps == 2 and resolve("unified_4s", 1).sampling_steps == 4
    assert resolve("unified_mul", 8) == resolve("unified", 8) == resolve("UNIFIED_anything", 8)
    for name in (" unified ", "Unified_Mul\n"):
        assert is_unified(name) and resolve(name, 4) == resolve("unified", 4)
    published = {"sampling_steps": 4, "stochast_ratio": 1.0, "rfba_gap_steps": [0.001, 0.5]}
    assert resolve("unified", 8, published).sampling_style == "any"  # that of its own steps
    plain = UnifiedConfig(4, 1.0, 0.0, 1, "any", (1.0, 1.0, 1.0), (0.001, 0.5))
    assert resolve("unified_4s") == plain
    assert resolve("unified", 4, {"stochast_ratio": "sde", "sampling_style": ""}).stochast_ratio == "SDE"
    assert [is_unified(x) for x in (None, "", "euler", "unified", "TwinFlow", "unified_9")] == [False] * 3 + [
        True
    ] * 3


MEAN, SPREAD = 0.7, 0.4


def gaussian(xs: list[Tensor], t: float, tt: float) -> list[Tensor]:
    """The exact velocity E[z - x | x_t] for data of mean MEAN and standard deviation SPREAD."""
    variance = t**2 + (1 - t) ** 2 * SPREAD**2
    return [(t - (1 - t) * SPREAD**2) / variance * (x - (1 - t) * MEAN) - MEAN for x in xs]


def exact(x: Tensor, t: float) -> Tensor:
    """Where the flow takes x_t at the end: its distance from the mean in standard deviations stays."""
    return MEAN + SPREAD * (x - (1 - t) * MEAN) / math.sqrt(t**2 + (1 - t) ** 2 * SPREAD**2)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_orders_converge_as_they_should(order: int) -> None:
    noise = torch.linspace(-2, 2, 9, dtype=torch.float64)
    errors = []
    for steps in (128 * order, 256 * order, 512 * order):
        own = {"sampling_style": "mul", "stochast_ratio": 0, "sampling_order": order}
        config = UnifiedConfig(**{**resolve("unified", 8, own).__dict__, "sampling_steps": steps})
        (out,) = sample(gaussian, [noise], config, [None])
        errors.append((out - exact(noise, time_grid(config)[0])).abs().max().item())
    slopes = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert order - 0.35 < slopes[-1] < order + 0.4, slopes


def test_step_noise_is_each_images_own() -> None:
    noises = [torch.randn(3, 4, generator=torch.Generator().manual_seed(s)) for s in range(4)]
    config = resolve("unified", 4)

    def run(which: list[int]) -> list[Tensor]:
        torch.manual_seed(len(which))  # the global generator has no part in it
        return sample(
            predict, [noises[i] for i in which], config, [torch.Generator().manual_seed(i) for i in which]
        )

    together = run([0, 1, 2, 3])
    assert all(torch.equal(run([i])[0], together[i]) for i in range(4))
    assert not torch.equal(run([0, 1])[0], sample(predict, noises[:1], config, [torch.Generator()])[0])


def test_predictions_per_step_and_previews() -> None:
    for order, calls in ((1, 6), (2, 5), (3, 6)):
        asked, shown = [], []
        sample(
            lambda xs, t, tt: (asked.append(t), predict(xs, t, tt))[1],  # noqa: B023
            [torch.zeros(2)],
            resolve("unified", 6, {"sampling_order": order}),
            [None],
            lambda i, n, xs: shown.append((i, n)),  # noqa: B023
        )
        assert len(asked) == calls and shown == [(i + 1, 6 // order) for i in range(6 // order)]


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("sampling_style", "xyz", "few, any, mul"),
        ("sampling_order", 4, "from 1 to 3"),
        ("sampling_order", 1.5, "whole number from 1 to 3"),
        ("stochast_ratio", "abc", "from 0 to 2, or SDE"),
        ("stochast_ratio", 2.1, "from 0 to 2, or SDE"),
        ("stochast_ratio", float("nan"), "from 0 to 2, or SDE"),
        ("extrapol_ratio", -0.1, "from 0 to 1"),
        ("extrapol_ratio", True, "from 0 to 1"),
        ("rfba_gap_steps", [0.9, 0.6], "less than 1 together"),
        ("rfba_gap_steps", "0.1", "two numbers"),
        ("rfba_gap_steps", 0.5, "two numbers"),
        ("time_dist_ctrl", [1, 1], "three numbers from 0.1 to 10"),
        ("time_dist_ctrl", "1,1,x", "three numbers from 0.1 to 10"),
        ("time_dist_ctrl", [1, 0, 1], "three numbers from 0.1 to 10"),
        ("sampling_steps", 0, "from 1 to 100"),
        ("stochastic_ratio", 1, "unknown key .*'stochast_ratio'"),
    ],
)
def test_bad_values_get_one_sentence(key: str, value: object, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        resolve("unified", 4, {key: value})
    assert key in str(caught.value) and str(caught.value).count(". ") == 0


@pytest.mark.parametrize("steps", [0, -1, 1000, "many", None])
def test_bad_step_counts(steps: object) -> None:
    with pytest.raises(UserError, match="num_inference_steps came as .* from 1 to 100"):
        resolve("unified", steps)


def test_grids_that_fall_together_are_refused() -> None:
    with pytest.raises(UserError, match="same time"):
        resolve("unified", 100, {"time_dist_ctrl": [10, 1, 10]})
    for order in (1, 2, 3):  # noise itself is a start like any other
        config = resolve("unified", 6, {"rfba_gap_steps": [0, 0.5], "sampling_order": order})
        assert time_grid(config)[0] == 1
        (out,) = sample(predict, [torch.ones(3)], config, [torch.Generator().manual_seed(1)])
        assert torch.isfinite(out).all()


# ---------------------------------------------------------------- in the pipeline


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory):
    """(processor, pipe) of a Mini with a second time embedder, under a card for the unified sampler."""
    definition = mini.model_def("z_image_mini_twinflow")
    stored = load_file(mini.ROOT / mini.model_def("z_image_mini")["URLs"][0])
    second = {k: 0.3 * v for k, v in stored.items() if k.startswith("t_embedder.")}
    stored |= {k.replace("t_embedder.", "t_embedder_2."): v for k, v in second.items()}
    file = tmp_path_factory.mktemp("twin") / "transformer.safetensors"
    save_file(stored, file)
    return family_handler.load_model(file, "z_image", definition, device="cpu")


def settings(**values) -> dict:
    definition = mini.model_def("z_image_mini_twinflow")
    capabilities = family_handler.query_model_def("z_image", definition)
    given = {"prompt": "a red circle", "resolution": "128x128", "num_inference_steps": 4, **values}
    complete = validate(given, {}, capabilities).settings
    assert family_handler.validate_generative_settings("z_image", definition, complete) is None
    return complete


def pictures(twin, seeds: list[int], preview: bool = False, **values) -> list[np.ndarray]:
    def watch(step: int, total: int, previews) -> None:
        if preview:
            assert len(previews()) == len(seeds)

    made = twin[0].generate(
        settings(**values), seeds=seeds, on_phase=lambda phase: None, on_step=watch, interrupt=lambda: False
    )
    return [np.asarray(image) for image in made.images]


def test_every_control_changes_the_picture(twin) -> None:
    changes = {
        "sample_solver": "unified_2s",
        "sampling_style": "mul",
        "stochast_ratio": "SDE",
        "extrapol_ratio": 0.5,
        "sampling_order": 2,
        "time_dist_ctrl": "1.5,1,1",
        "rfba_gap_steps": "0.1,0.2",
    }
    assert list(changes) == [name for name, setting in SETTINGS.items() if setting.group == "sampler"]
    made = [pictures(twin, [5], **{name: value})[0].tobytes() for name, value in changes.items()]
    made += [pictures(twin, [5], **more)[0].tobytes() for more in ({}, {"sampling_order": 3})]
    assert len(set(made)) == len(made)


def test_same_seed_same_pixels_again_in_a_batch_and_with_preview(twin) -> None:
    batch = pictures(twin, [3, 4, 5, 6])
    assert len({image.tobytes() for image in batch}) == 4
    torch.manual_seed(1)
    assert np.array_equal(pictures(twin, [5])[0], batch[2])
    assert np.array_equal(pictures(twin, [5])[0], batch[2])
    assert np.array_equal(pictures(twin, [5, 3], preview=True)[0], batch[2])


@torch.no_grad()
def test_the_model_is_asked_as_the_formula_says(twin) -> None:
    """F = -model output, at m(t) = 1 - t with the target m(tt), sign(0) = 0."""
    pipe: ZImagePipeline = twin[1]
    noise = torch.randn(1, 16, 16, 16, generator=torch.Generator().manual_seed(2))
    how = dict(height=128, width=128, output_type="latent", latents=noise, num_inference_steps=1)
    out = pipe("a red circle", **how).images[0]
    features = pipe.encode(["a red circle"])["a red circle"].features
    c = pipe.transformer.prepare(features, 16, 16)
    temb = pipe.transformer.embed_twin_time(torch.tensor([0.001]).double(), torch.tensor([0.0]).double())
    pipe.transformer.embed_time, before = lambda t: temb, pipe.transformer.embed_time
    try:
        velocity = -pipe.transformer([noise[0]], torch.zeros(1), [c])[0]
    finally:
        pipe.transformer.embed_time = before
    torch.testing.assert_close(out, noise[0] - 0.999 * velocity, rtol=1e-5, atol=1e-5)


def test_names_and_flags_choose_the_sampler(twin) -> None:
    pipe, (_, plain) = twin[1], mini.load()
    how = dict(height=128, width=128, output_type="latent", num_inference_steps=2)
    how["latents"] = torch.randn(1, 16, 16, 16, generator=torch.Generator().manual_seed(2))

    def run(pipe: ZImagePipeline, **more):
        return pipe("a red circle", generator=torch.Generator().manual_seed(0), **how | more)

    assert torch.equal(run(pipe).images, run(pipe, sample_solver="twinflow").images)
    assert not torch.equal(run(pipe).images, run(pipe, sample_solver="euler").images)
    assert run(pipe).notes == []
    fallback = run(plain, sample_solver="unified")
    assert len(fallback.notes) == 1 and "no second time embedder" in fallback.notes[0]
    forced = run(pipe, sample_solver="unified_2s", num_inference_steps=8)
    assert torch.equal(forced.images, run(pipe).images) and "takes 2 steps" in forced.notes[0]
    guided = run(pipe, guidance_scale=4.0, NAG_scale=5.0, negative_prompt="blue")
    assert torch.equal(guided.images, run(pipe).images)
    assert [note.split()[0] for note in guided.notes] == ["guidance_scale", "NAG_scale", "The"]
    own = run(pipe, unified_sampler_config={"sampling_steps": 1})
    assert torch.equal(own.images, run(pipe, num_inference_steps=1, unified_sampler_config={}).images)


def test_what_does_nothing_at_so_few_levels_is_said_in_one_note(twin) -> None:
    """The first is the example of the TwinFlow document: one level, and so one prediction."""
    printed = {"stochast_ratio": 0.8, "extrapol_ratio": 0.1, "sampling_order": 2}
    how = dict(height=64, width=64, output_type="latent", num_inference_steps=2)

    def run(config: dict):
        generator = torch.Generator().manual_seed(0)
        return twin[1]("a star", generator=generator, **how, unified_sampler_config=config)

    made = run(printed)
    assert made.notes == [
        "With 2 steps and order 2 the sampler visits 1 noise level, where sampling_order, stochast_ratio, "
        "extrapol_ratio change nothing: more steps let them act."
    ]
    assert torch.equal(made.images, run({"sampling_steps": 1}).images)
    assert "extrapol_ratio changes nothing" in run({"extrapol_ratio": 0.1}).notes[0]
    assert run({"sampling_order": 3}).notes == run({"stochast_ratio": 0}).notes == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"sample_solver": "euler9"}, "sample_solver came as 'euler9'"),
        ({"unified_sampler_config": {"sampling_style": "xyz"}}, "few, any, mul"),
        ({"unified_sampler_config": {"style": "few"}}, "unknown key 'style'"),
        ({"sample_solver": "euler", "unified_sampler_config": {"sampling_order": 2}}, "set that too"),
        ({"num_inference_steps": 0}, "from 1 to 100"),
        ({"num_inference_steps": 1000}, "from 1 to 100"),
    ],
)
def test_bad_arguments_get_one_sentence(twin, arguments: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        twin[1](**{"prompt": "a star", "height": 128, "width": 128} | arguments)
