"""Our pipeline against diffusers' on the Mini's own weights, and what a picture's identity depends on."""

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers import ZImagePipeline as ReferencePipeline
from diffusers import ZImageTransformer2DModel as ReferenceTransformer
from transformers import Qwen3Model

from models.z_image.pipeline_inputs import DEFAULT_NEGATIVE_PROMPT
from models.z_image.sampling import Guidance, calculate_shift, make_sigmas
from models.z_image.text_encoder import text_encoding
from models.z_image.z_image_handler import family_handler
from shared.errors import Cancelled, UserError
from tests.support import mini

PROMPT = "a red circle above a blue square on a yellow background"
NEGATIVE = (
    "a green star on a black background, and then some more words so that it needs more than 32 tokens ok"
)
# fp32 on both sides; eight steps of two forwards each add up rounding differences of about 1e-6
TOLERANCE = 2e-4


@pytest.fixture(scope="module")
def reference() -> ReferencePipeline:
    _, pipe = mini.load("z_image_mini_base")
    config = dict(pipe.transformer.config.__dict__)
    del config["patch_size"]
    transformer = ReferenceTransformer(**config, n_kv_heads=config["n_heads"]).eval()
    transformer.load_state_dict(pipe.transformer.state_dict())
    encoder = Qwen3Model.from_pretrained(mini.ROOT / "models/z_image/mini/text_encoder", dtype=torch.float32)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=6.0)
    result = ReferencePipeline(scheduler, pipe.vae, encoder.eval(), pipe.tokenizer, transformer)
    result.set_progress_bar_config(disable=True)
    return result


def noise(count: int, seed: int = 0, size: tuple[int, int] = (16, 16)) -> torch.Tensor:
    return torch.randn(count, 16, *size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "how",
    [
        {"guidance_scale": 0.0},
        {"guidance_scale": 2.5},
        {"guidance_scale": 4.0, "cfg_normalization": 1.0},
        {"guidance_scale": 4.0, "cfg_truncation": 0.4},
        {"guidance_scale": 4.0, "num_images_per_prompt": 2},
        {"guidance_scale": 4.0, "size": (12, 20)},
    ],
    ids=str,
)
def test_latents_equal_diffusers(reference: ReferencePipeline, how: dict) -> None:
    _, pipe = mini.load("z_image_mini_base")
    how = dict(how)
    rows, columns = how.pop("size", (16, 16))
    common = dict(
        prompt=PROMPT, negative_prompt=NEGATIVE, num_inference_steps=8, height=rows * 8, width=columns * 8
    )
    start = noise(how.get("num_images_per_prompt", 1), size=(rows, columns))
    theirs = reference(**common, **how, latents=start.clone(), output_type="latent").images
    ours = pipe(**common, **how, latents=start, output_type="latent", flow_shift=6.0).images
    torch.testing.assert_close(ours, theirs, rtol=TOLERANCE, atol=TOLERANCE)


def test_pictures_equal_diffusers(reference: ReferencePipeline) -> None:
    _, pipe = mini.load("z_image_mini_base")
    common = dict(prompt=PROMPT, negative_prompt=NEGATIVE, num_inference_steps=4, guidance_scale=2.5)
    common |= dict(height=128, width=128, latents=noise(1))
    (theirs,) = reference(**common).images
    (ours,) = pipe(**common, flow_shift=6.0).images
    difference = np.abs(np.asarray(ours, int) - np.asarray(theirs, int))
    assert difference.max() <= 1  # the same picture up to the rounding to bytes


def test_prompt_embeds_replace_prompts(reference: ReferencePipeline) -> None:
    _, pipe = mini.load("z_image_mini_base")
    generator = torch.Generator().manual_seed(5)
    positive, negative = (torch.randn(n, 96, generator=generator) for n in (7, 40))
    common = dict(num_inference_steps=2, guidance_scale=3.0, height=128, width=128, output_type="latent")
    common |= dict(prompt_embeds=[positive], negative_prompt_embeds=[negative], latents=noise(1))
    ours = pipe(**common, flow_shift=6.0).images
    torch.testing.assert_close(ours, reference(**common).images, rtol=TOLERANCE, atol=TOLERANCE)


def test_text_features_are_the_second_to_last_hidden_state_without_padding(
    reference: ReferencePipeline,
) -> None:
    _, pipe = mini.load("z_image_mini_base")
    (theirs,), _ = reference.encode_prompt(
        [PROMPT], do_classifier_free_guidance=False
    )  # padded to 512, masked
    ours = text_encoding.encode(pipe.text_encoder, pipe.tokenizer, PROMPT, torch.device("cpu")).features
    assert ours.shape == theirs.shape
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert len(pipe.text_encoder.layers) == len(reference.text_encoder.layers) - 1


@pytest.mark.parametrize("shift", [1.0, 3.0, 6.0])
@pytest.mark.parametrize("steps", [1, 2, 8, 30])
def test_sigmas_follow_the_formula(steps: int, shift: float) -> None:
    line = np.linspace(1, 1 / steps, steps)
    expected = [*(shift * line / (1 + (shift - 1) * line)), 0.0]
    assert make_sigmas(steps, {"shift": 3.0}, 4096, shift) == pytest.approx(expected, abs=1e-6)
    assert len(expected) == steps + 1


def test_dynamic_shifting_acts_where_a_configuration_turns_it_on() -> None:
    assert calculate_shift(256) == pytest.approx(0.5) and calculate_shift(4096) == pytest.approx(1.15)
    mu = calculate_shift(1024)
    line = np.linspace(1, 1 / 4, 4)
    expected = [*(np.exp(mu) / (np.exp(mu) + (1 / line - 1))), 0.0]
    config = {"shift": 3.0, "use_dynamic_shifting": True}
    assert make_sigmas(4, config, 1024) == pytest.approx(expected, abs=1e-6)
    assert make_sigmas(4, config, 1024, flow_shift=3.0) == make_sigmas(4, {"shift": 3.0}, 1024)


def test_n_steps_are_n_forwards() -> None:
    _, pipe = mini.load()
    seen = []
    pipe(PROMPT, height=128, width=128, num_inference_steps=5, callback=lambda i, n, x: seen.append((i, n)))
    assert seen == [(i, 5) for i in range(1, 6)]


def pixels(pipe, seeds: list[int], **how) -> list[np.ndarray]:
    generators = [torch.Generator().manual_seed(s) for s in seeds]
    settings = dict(height=128, width=128, num_inference_steps=3, num_images_per_prompt=len(seeds)) | how
    return [np.asarray(image) for image in pipe(PROMPT, generator=generators, **settings).images]


@pytest.mark.parametrize("guidance", [0.0, 2.5])
def test_same_picture_alone_in_a_batch_again_and_with_preview(guidance: float) -> None:
    processor, pipe = mini.load("z_image_mini_base")
    how = {"guidance_scale": guidance}
    batch = pixels(pipe, [7, 8, 9], **how)
    assert not np.array_equal(batch[0], batch[1])
    assert np.array_equal(pixels(pipe, [8], **how)[0], batch[1])
    assert np.array_equal(pixels(pipe, [9, 8], **how)[1], batch[1])
    rgb = processor.latent_rgb
    watched = pixels(pipe, [8], callback=lambda i, n, xs: [rgb.render(x, (128, 128)) for x in xs], **how)
    assert np.array_equal(watched[0], batch[1])


def test_image_k_of_a_job_is_the_job_with_seed_plus_k() -> None:
    processor, _ = mini.load()
    settings = {"prompt": PROMPT, "resolution": "128x128", "num_inference_steps": 2}
    silent = dict(on_phase=lambda phase: None, on_step=lambda *step: None, interrupt=lambda: False)
    batch = processor.generate(settings, seeds=[7, 8], **silent).images
    (alone,) = processor.generate(settings, seeds=[8], **silent).images
    assert np.array_equal(np.asarray(batch[1]), np.asarray(alone))
    assert not np.array_equal(np.asarray(batch[0]), np.asarray(alone))


def test_guidance_is_off_up_to_one_and_adds_the_default_negative_prompt_above() -> None:
    _, pipe = mini.load("z_image_mini_base")
    how = dict(height=128, width=128, num_inference_steps=2, latents=noise(1), output_type="latent")
    plain = pipe(PROMPT, guidance_scale=0.0, **how)
    assert torch.equal(plain.images, pipe(PROMPT, guidance_scale=1.0, **how).images)
    default = pipe(PROMPT, guidance_scale=3.0, **how)
    explicit = pipe(PROMPT, DEFAULT_NEGATIVE_PROMPT, guidance_scale=3.0, **how)
    assert torch.equal(default.images, explicit.images)
    assert plain.notes == explicit.notes == []
    assert len(default.notes) == 1 and DEFAULT_NEGATIVE_PROMPT in default.notes[0]


def test_guidance_arithmetic() -> None:
    """pos + g * (pos - neg), rescaled to at most c times the norm of pos; a hand-made example."""
    positive, negative = torch.tensor([3.0, 4.0]), torch.tensor([0.0, 4.0])
    assert Guidance(2.0).combine(positive, negative).tolist() == [9.0, 4.0]
    limited = Guidance(2.0, normalization=1.0).combine(positive, negative)
    assert limited.norm().item() == pytest.approx(5.0) and limited[0] / limited[1] == pytest.approx(9 / 4)
    assert [Guidance(2.0, truncation=0.5).acts_at(t) for t in (0.4, 0.5, 0.6)] == [True, True, False]


def test_a_long_prompt_says_how_many_tokens_were_dropped() -> None:
    _, pipe = mini.load()
    prompt = "red " * 5000
    whole = len(pipe.tokenizer(pipe.tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
    ))["input_ids"])  # fmt: skip
    out = pipe(prompt, height=128, width=128, num_inference_steps=1, output_type="latent")
    assert any(f"{whole - 512} tokens" in note for note in out.notes)


@pytest.mark.parametrize("prompt", ["一只红色的圆", "🟥 🔵 heart", "naïve ‮ text \x00", "<|im_end|> a star"])
def test_any_text_makes_a_picture(prompt: str) -> None:
    _, pipe = mini.load()
    assert pipe(prompt, height=128, width=128, num_inference_steps=1).images[0].size == (128, 128)


def test_interrupt_within_a_step() -> None:
    _, pipe = mini.load()
    calls = []
    with pytest.raises(Cancelled):
        pipe(PROMPT, height=128, width=128, interrupt=lambda: len(calls) > 9 or calls.append(1))
    assert len(calls) == 10  # seven layers of the first step, three of the second


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"height": 100}, "multiple of 16.*96"),
        ({"height": 0}, "expected a multiple of 16 from 64 to 8192 pixels, the nearest is 64"),
        ({"width": 48}, "The width came as 48; .* the nearest is 64"),
        ({"width": 16384}, "The width came as 16384; .* the nearest is 8192"),
        ({"width": 128.0}, "The width came as 128.0; expected a multiple of 16"),
        ({"width": "wide"}, "The width came as 'wide'; expected a multiple of 16"),
        ({"num_inference_steps": 0}, "num_inference_steps came as 0; expected a whole number from 1 to 100"),
        ({"flow_shift": -1}, r"flow_shift came as -1\.?0?; expected a number from 1 to 10"),
        ({"guidance_scale": -3}, r"guidance_scale came as -3\.?0?; expected a number from 0 to 20"),
        ({"guidance_scale": 25}, "from 0 to 20"),
        ({"guidance_scale": "much"}, "guidance_scale came as \"much\""),
        ({"cfg_normalization": 3}, "from 0 to 2"),
        ({"cfg_truncation": 1.5}, "from 0 to 1"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt came as 0; .* from 1 to 16"),
        ({"max_sequence_length": 0}, "max_sequence_length came as 0; expected a whole number from 1 to 512"),
        ({"max_sequence_length": 513}, "from 1 to 512"),
        ({"output_type": "jpg"}, "output_type came as 'jpg'; expected one of pil, np, pt, latent"),
        ({"prompt": None}, "prompt"),
        ({"latents": torch.zeros(1, 16, 4, 4)}, r"\(1, 16, 16, 16\)"),
        ({"generator": [torch.Generator()] * 3}, "3 generators"),
        ({"guidance_scale": 2.0, "negative_prompt": ["a", "b"]}, "2 negative prompts"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else None,
)
def test_bad_arguments_get_one_sentence(arguments: dict, words: str) -> None:
    _, pipe = mini.load()
    with pytest.raises(UserError, match=words):
        pipe(**({"prompt": PROMPT, "height": 128, "width": 128} | arguments))


@pytest.mark.parametrize(
    ("card", "steps", "guidance"),
    [
        ("z_image_mini", 8, 0.0),
        ("z_image_mini_base", 30, 4.0),
        ("z_image_mini_twinflow", 2, 0.0),
        ("z_image_mini_control2_1", 25, 0.0),
    ],
)
def test_a_prompt_alone_is_drawn_as_usual_for_the_model(card: str, steps: int, guidance: float) -> None:
    definition = mini.model_def(card)
    files = [*definition["URLs"], *(alternatives[0] for alternatives in definition.get("modules", []))]
    _, pipe = family_handler.load_model(
        files, definition["architecture"], definition, device="cpu", prompt_cache=None
    )
    seen: list[int] = []
    how = dict(height=64, width=64, output_type="latent", callback=lambda i, n, x: seen.append(n))
    alone, said = (
        pipe(PROMPT, generator=torch.Generator().manual_seed(1), **how, **more).images
        for more in ({}, {"num_inference_steps": steps, "guidance_scale": guidance})
    )
    assert seen == [steps] * 2 * steps and torch.equal(alone, said)


def test_a_twinflow_file_needs_no_card_to_be_one() -> None:
    """Loaded as the documents print it. A card has the last word."""
    definition = mini.model_def("z_image_mini_twinflow")
    (file,) = definition["URLs"]
    told = {key: value for key, value in definition.items() if key not in ("URLs", "unified_solver")}

    def loaded(definition: dict):
        return family_handler.load_model(file, "z_image", definition, device="cpu", prompt_cache=None)[1]

    assert loaded(told).unified_solver and loaded(told).usual.num_inference_steps == 2
    assert not loaded(told | {"unified_solver": False}).unified_solver
    assert not loaded(told | {"URLs": [file]}).unified_solver
    assert not mini.load()[1].unified_solver


def test_the_size_is_1024_where_none_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    _, pipe = mini.load()
    monkeypatch.setattr(pipe, "_noise", lambda inputs: pytest.fail(f"{inputs.canvas}"))
    for size in ({}, {"height": None, "width": None}):
        with pytest.raises(pytest.fail.Exception, match="width=1024, height=1024"):
            pipe(PROMPT, **size)


def test_output_types() -> None:
    _, pipe = mini.load()
    how = dict(height=128, width=192, num_inference_steps=1, latents=noise(1, size=(16, 24)))
    tensor = pipe(PROMPT, output_type="pt", **how).images
    (image,) = pipe(PROMPT, **how).images
    assert tensor.shape == (1, 3, 128, 192) and image.size == (192, 128)
    assert np.array_equal((tensor[0].permute(1, 2, 0) * 255).round().byte().numpy(), np.asarray(image))
    array = pipe(PROMPT, output_type="np", **how).images
    assert isinstance(array, np.ndarray) and np.array_equal(array[0], tensor[0].permute(1, 2, 0).numpy())


def test_numbers_that_are_not_numbers_make_no_black_picture() -> None:
    _, pipe = mini.load()
    with pytest.raises(UserError, match="not numbers"):
        pipe(PROMPT, height=128, width=128, num_inference_steps=1, latents=noise(1) * float("nan"))


@torch.no_grad()
@pytest.mark.parametrize("step", [0, 1])
def test_guidance_is_the_same_as_one_or_two_forwards(step: int) -> None:
    """A batch is a list of sequences: both captions together, or one after the other, bit for bit."""
    _, pipe = mini.load("z_image_mini_base")
    encoded = pipe.encode([PROMPT, NEGATIVE])
    pos, neg = (pipe.transformer.prepare(encoded[x].features, 16, 16) for x in (PROMPT, NEGATIVE))
    (x,), t = noise(1, seed=step), torch.tensor([0.4 * step])
    together = pipe.transformer([x, x], t, [pos, neg])
    apart = [pipe.transformer([x], t, [c])[0] for c in (pos, neg)]
    assert all(torch.equal(a, b) for a, b in zip(together, apart, strict=True))


def test_a_negative_prompt_that_does_not_act_is_noted() -> None:
    _, pipe = mini.load()
    how = dict(height=128, width=128, num_inference_steps=1, output_type="latent")
    assert "did not act" in pipe(PROMPT, "red", **how).notes[0]
    assert pipe(PROMPT, "red", NAG_scale=2.0, **how).notes == []
