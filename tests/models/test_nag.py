"""Normalized attention guidance against a slow reference, and what it does to the Mini's pictures."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from models.z_image.nag import Nag, NagAttend
from models.z_image.pipeline_inputs import DEFAULT_NEGATIVE_PROMPT
from models.z_image.transformer_z_image import (
    Conditioning,
    ZImageTransformer2DModel,
    apply_rope,
    patchify,
    unpatchify,
)
from shared.errors import UserError
from shared.gpu import attention
from tests.support import mini
from tests.support.transformers import inputs, pair

PROMPT = "a red circle on a white background"


def softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[T, heads, head_dim] -> [T, heads * head_dim], the matrix of weights written out, in fp64."""
    q, k, v = (x.double() for x in (q, k, v))
    weights = (torch.einsum("thd,shd->hts", q, k) / q.shape[-1] ** 0.5).softmax(-1)
    return torch.einsum("hts,shd->thd", weights, v).flatten(1)


@pytest.mark.parametrize(
    ("scale", "tau", "alpha"), [(1.5, 3.5, 0.5), (5, 1.0, 0.5), (20, 10, 1.0), (4, 2.5, 0)]
)
def test_attention_equals_both_attentions_materialised(scale: float, tau: float, alpha: float) -> None:
    n, p, m = 12, 5, 9  # image rows, and captions of different lengths
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, n + p + m, 3, 8, generator=g) for _ in range(3))
    out = NagAttend(Nag(scale, tau, alpha), attention.sdpa, n, p)(q, k, v)[0]

    plus_rows, minus_rows = list(range(n + p)), [*range(n), *range(n + p, n + p + m)]
    plus = softmax_attention(q[0, plus_rows], k[0, plus_rows], v[0, plus_rows])
    minus = softmax_attention(q[0, minus_rows], k[0, minus_rows], v[0, minus_rows])
    guided = scale * plus[:n] - (scale - 1) * minus[:n]
    for row in range(n):
        ratio = guided[row].abs().sum() / plus[row].abs().sum()
        guided[row] *= min(ratio, tau) / ratio
    expected = torch.cat((alpha * guided + (1 - alpha) * plus[:n], plus[n:], minus[n:]))
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)


def slow_forward(
    model: ZImageTransformer2DModel, x: Tensor, t: Tensor, pos: Tensor, neg: Tensor, nag: Nag
) -> Tensor:
    """The whole model with three separate streams; the image is rotated anew for each caption's place."""
    rows, columns = x.shape[1] // 2, x.shape[2] // 2
    n = rows * columns
    a, b = (model.prepare(c, x.shape[1], x.shape[2]) for c in (pos, neg))
    temb = model.embed_time(t)

    image = model.all_x_embedder["2-1"](patchify(x, 2))[None]
    for block in model.noise_refiner:
        image = block(image, a.rope[:, :n], temb)
    streams = [image, a.caption.clone(), b.caption.clone()]
    for block in model.layers:
        scale_msa, gate_msa, scale_mlp, gate_mlp = block.adaLN_modulation(temb).unsqueeze(1).chunk(4, dim=2)
        core = block.attention

        def project(
            stream: Tensor, rope: Tensor, block=block, core=core, scale_msa=scale_msa
        ) -> list[Tensor]:
            h = block.attention_norm1(stream) * (1 + scale_msa)
            q, k, v = (to(h).unflatten(-1, (core.heads, -1)) for to in (core.to_q, core.to_k, core.to_v))
            return [apply_rope(core.norm_q(q), rope)[0], apply_rope(core.norm_k(k), rope)[0], v[0]]

        def answers(c: Conditioning, caption: Tensor, project=project, image=streams[0]) -> Tensor:
            parts = zip(project(image, c.rope[:, :n]), project(caption, c.rope[:, n:]), strict=True)
            return softmax_attention(*(torch.cat(pair) for pair in parts)).float()

        plus, minus = answers(a, streams[1]), answers(b, streams[2])
        mixed = [nag.combine(plus[:n][None], minus[:n][None]), plus[None, n:], minus[None, n:]]
        for i, out in enumerate(mixed):
            s = streams[i] + gate_msa.tanh() * block.attention_norm2(core.to_out(out))
            h = block.feed_forward(block.ffn_norm1(s) * (1 + scale_mlp))
            streams[i] = s + gate_mlp.tanh() * block.ffn_norm2(h)
    return unpatchify(model.all_final_layer["2-1"](streams[0], temb)[0], rows, columns, 2)


@torch.no_grad()
@pytest.mark.parametrize("lengths", [(5, 5), (5, 70), (40, 3)], ids=str)
def test_model_equals_three_streams_written_out(lengths: tuple[int, int]) -> None:
    """Also with captions of different lengths: each lies where it does in a picture of its own."""
    _, model = pair("odd")
    latents, captions = inputs("odd", [(16, 8, lengths[0]), (16, 8, lengths[1])])
    prepared = [model.prepare(c, 16, 8) for c in captions]
    t, nag = torch.tensor([0.4]), Nag(4, 2.5, 0.5)
    out = model(latents[:1], t, prepared[:1], negatives=prepared[1:], nag=nag)[0]
    expected = slow_forward(model, latents[0], t, captions[0], captions[1], nag)
    torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(out, model(latents[:1], t, prepared[:1])[0], atol=1e-3)


def draw(seeds: range | list[int], **how) -> list[np.ndarray]:
    _, pipe = mini.load()
    settings = dict(height=128, width=128, num_inference_steps=8, negative_prompt="red", prompt=PROMPT) | how
    generators = [torch.Generator().manual_seed(s) for s in seeds]
    images = pipe(num_images_per_prompt=len(generators), generator=generators, **settings).images
    return [np.asarray(image) for image in images]


def test_scale_one_is_bit_identical_to_none_and_tau_and_alpha_act_above() -> None:
    plain = draw([3], negative_prompt=None, num_inference_steps=2)
    off = draw([3], NAG_scale=1.0, NAG_tau=5.0, NAG_alpha=0.9, num_inference_steps=2)
    assert np.array_equal(plain[0], off[0])
    made = [
        draw([3], NAG_scale=6.0, num_inference_steps=2, **how)[0]
        for how in ({}, {"NAG_tau": 1.0}, {"NAG_alpha": 0.9}, {"negative_prompt": "blue"})
    ]
    made += [plain[0], draw([3], NAG_scale=4.0, num_inference_steps=2)[0]]
    assert len({image.tobytes() for image in made}) == len(made)


def test_it_is_off_while_guidance_is_on() -> None:
    how = dict(guidance_scale=3.0, num_inference_steps=2)
    assert np.array_equal(draw([3], **how)[0], draw([3], NAG_scale=6.0, **how)[0])


def test_same_picture_alone_and_in_a_batch() -> None:
    batch = draw([7, 8, 9, 10], NAG_scale=4.0, num_inference_steps=2)
    assert all(
        np.array_equal(draw([seed], NAG_scale=4.0, num_inference_steps=2)[0], image)
        for seed, image in zip((7, 8, 9, 10), batch, strict=True)
    )


def test_an_empty_negative_prompt_becomes_the_default_with_a_note() -> None:
    _, pipe = mini.load()
    how = dict(height=128, width=128, num_inference_steps=1, output_type="latent", NAG_scale=4.0)
    how["latents"] = torch.zeros(1, 16, 16, 16)
    empty, given = pipe(PROMPT, "", **how), pipe(PROMPT, DEFAULT_NEGATIVE_PROMPT, **how)
    assert torch.equal(empty.images, given.images)
    assert DEFAULT_NEGATIVE_PROMPT in empty.notes[0] and given.notes == []


@pytest.mark.slow
def test_a_negative_colour_changes_the_colour_of_the_object() -> None:
    from training.score import NAMES, label

    def colour_of_the_circle(image: np.ndarray) -> str:
        return NAMES[int(np.bincount(label(image)[54:74, 54:74].ravel()).argmax())]

    how = dict(prompt="a red circle on a blue background", NAG_tau=10.0, NAG_alpha=1.0)
    off, on = (
        draw(range(16), NAG_scale=scale, **how) + draw(range(16, 32), NAG_scale=scale, **how)
        for scale in (1.0, 6.0)
    )
    assert [colour_of_the_circle(image) for image in off] == ["red"] * 32
    assert sum(colour_of_the_circle(image) != "red" for image in on) > 24


@pytest.mark.parametrize(
    ("name", "value"), [("NAG_scale", 0.5), ("NAG_scale", 21), ("NAG_tau", 0), ("NAG_alpha", float("nan"))]
)
def test_bad_values_get_one_sentence(name: str, value: float) -> None:
    with pytest.raises(UserError, match=f"{name} came as .* from"):
        draw([0], **{name: value})
