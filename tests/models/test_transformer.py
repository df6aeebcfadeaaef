"""Our S3-DiT against diffusers' ZImageTransformer2DModel on the same random weights."""

import numpy as np
import pytest
import torch

from models.z_image.transformer_z_image import (
    ZImageConfig,
    ZImageTransformer2DModel,
    apply_rope,
    apply_rope_to_both,
    dit_time,
    modulated,
    patchify,
    positions,
    unpatchify,
)
from shared.errors import Cancelled, UserError
from tests.support.transformers import SIZES, inputs, pair


@torch.no_grad()
def both(size: str, shapes: list[tuple[int, int, int]], t: list[float], dtype: torch.dtype = torch.float32):
    reference, ours = pair(size, dtype)
    latents, captions = ([x.to(dtype) for x in xs] for xs in inputs(size, shapes))
    theirs = reference([x[:, None] for x in latents], torch.tensor(t), captions, return_dict=False)[0]
    prepared = [ours.prepare(c, x.shape[1], x.shape[2]) for x, c in zip(latents, captions, strict=True)]
    mine = ours(latents, torch.tensor(t), prepared)
    return [x[:, 0].float() for x in theirs], [x.float() for x in mine]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "shapes",
    [
        [(16, 16, 5)],  # 64 image tokens, caption padded to 32
        [(6, 10, 32)],  # 15 image tokens padded to 32, caption exactly 32
        [(14, 22, 45)],  # 77 image tokens padded to 96
        [(8, 8, 7), (8, 8, 7)],
        [(8, 8, 3), (8, 8, 40), (8, 8, 100)],  # captions of different padded lengths in one batch
        [(8, 8, 9), (12, 6, 9)],  # images of different sizes in one batch
    ],
)
def test_fp32_equals_diffusers(size: str, shapes: list[tuple[int, int, int]]) -> None:
    t = [0.0, 0.37, 0.999][: len(shapes)]
    theirs, mine = both(size, shapes, t)
    for a, b in zip(theirs, mine, strict=True):
        assert (a - b).abs().max() < 1e-4


@pytest.mark.parametrize("size", SIZES)
def test_bf16_is_as_close_as_bf16_allows(size: str) -> None:
    """The two round differently: ours may be at most half again as far from fp32 as diffusers' is."""
    shapes, t = [(14, 22, 45)], [0.4]
    (exact,), _ = both(size, shapes, t)
    (theirs,), (mine,) = both(size, shapes, t, torch.bfloat16)
    assert (mine - exact).norm() <= 1.5 * (theirs - exact).norm()
    assert (mine - exact).norm() <= 0.05 * exact.norm()  # eleven bf16 blocks: some percent


def rounded(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return x.to(dtype).double()


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_scale_inside_the_norms_weight_is_as_exact_as_one_after_it(dtype: torch.dtype) -> None:
    """Against fp64; the reference rounds as diffusers does: norm, 1 + scale, product."""
    g = torch.Generator().manual_seed(2)
    x, weight, scale = (torch.randn(*shape, generator=g).to(dtype) for shape in ((1, 64, 96), (96,), (96,)))
    norm = torch.nn.RMSNorm(96, eps=1e-5).to(dtype)
    norm.weight.copy_(weight)
    normed = x.double() * (x.double().square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight.double()
    exact = normed * (1 + scale.double())
    reference = rounded(rounded(normed, dtype) * rounded(1 + scale.double(), dtype), dtype)
    error = (modulated(norm, x, scale[None, None]).double() - exact).norm() / exact.norm()
    assert error <= 1.05 * (reference - exact).norm() / exact.norm() + torch.finfo(torch.float32).eps


@torch.no_grad()
def test_a_block_takes_a_batch_with_a_time_for_each() -> None:
    """As the training runs it."""
    _, ours = pair("odd")
    g = torch.Generator().manual_seed(4)
    x, temb = torch.randn(3, 32, 96, generator=g), torch.randn(3, 96, generator=g)
    rope = ours.rope(positions(32, 0, 0), x.device)
    alone = [ours.layers[0](x[i : i + 1].clone(), rope, temb[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(ours.layers[0](x.clone(), rope, temb), torch.cat(alone), rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_queries_and_keys_turned_together_are_each_turned_alone(dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(3)
    q, k = (torch.randn(1, 8, 3, 32, generator=g).to(dtype) for _ in range(2))
    rope = torch.polar(torch.ones(1, 8, 1, 16), torch.randn(1, 8, 1, 16, generator=g))
    before = q.clone(), k.clone()
    both = apply_rope_to_both(q, k, rope)
    for turned, x in zip(both, before, strict=True):
        assert turned.dtype == dtype and torch.equal(turned, apply_rope(x, rope))
    assert torch.equal(q, before[0]) and torch.equal(k, before[1])


@torch.no_grad()
def test_a_sequence_is_bit_identical_alone_and_in_any_batch() -> None:
    _, ours = pair("odd")
    latents, captions = inputs("odd", [(8, 8, 3), (12, 6, 40), (8, 8, 3)])
    prepared = [ours.prepare(c, x.shape[1], x.shape[2]) for x, c in zip(latents, captions, strict=True)]
    t = torch.tensor([0.3])
    together = ours(latents, t, prepared)
    for x, c, out in zip(latents, prepared, together, strict=True):
        assert torch.equal(ours([x], t, [c])[0], out)


def test_gradients_equal_inference_and_flow() -> None:
    """The in-place path of inference and the plain path of training compute the same."""
    _, ours = pair("odd")
    latents, captions = inputs("odd", [(8, 8, 3)])
    t = torch.tensor([0.3])
    with torch.no_grad():
        expected = ours(latents, t, [ours.prepare(captions[0], 8, 8)])[0]
    out = ours(latents, t, [ours.prepare(captions[0], 8, 8)])[0]
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)  # same operations, other kernels
    out.square().mean().backward()
    assert all(p.grad is not None for name, p in ours.named_parameters() if name != "x_pad_token")


@torch.no_grad()
def test_forward_leaves_its_inputs_alone() -> None:
    _, ours = pair("odd")
    latents, captions = inputs("odd", [(8, 8, 3)])
    c = ours.prepare(captions[0], 8, 8)
    before = (latents[0].clone(), captions[0].clone(), c.caption.clone())
    first = ours(latents, torch.tensor([0.3]), [c])[0]
    assert all(torch.equal(a, b) for a, b in zip(before, (latents[0], captions[0], c.caption), strict=True))
    assert torch.equal(first, ours(latents, torch.tensor([0.3]), [c])[0])


@torch.no_grad()
def test_interrupt_stops_between_layers() -> None:
    _, ours = pair("odd")
    latents, captions = inputs("odd", [(8, 8, 3)])
    c = ours.prepare(captions[0], 8, 8)
    asked = []
    with pytest.raises(Cancelled):
        ours(latents, torch.tensor([0.3]), [c], interrupt=lambda: len(asked) >= 3 or asked.append(1))
    assert len(asked) == 3  # two refiner layers and one main layer ran


def test_patchify_is_channel_fastest_and_inverts() -> None:
    x = torch.arange(3 * 4 * 6).view(3, 4, 6)
    tokens = patchify(x, 2)
    assert tokens[0].tolist() == [x[c, h, w].item() for h in (0, 1) for w in (0, 1) for c in range(3)]
    assert tokens[1].tolist() == [x[c, h, w].item() for h in (0, 1) for w in (2, 3) for c in range(3)]
    assert torch.equal(unpatchify(tokens, 2, 3, 2), x)


def test_positions_follow_the_model_card() -> None:
    ids = positions(32, 2, 3).tolist()
    assert ids[:7] == [[33, 0, 0], [33, 0, 1], [33, 0, 2], [33, 1, 0], [33, 1, 1], [33, 1, 2], [0, 0, 0]]
    assert ids[32] == [1, 0, 0] and ids[-1] == [32, 0, 0] and len(ids) == 64


def test_full_size_names_match_the_checkpoint() -> None:
    """521 tensors and 6,154,908,736 parameters, as in the published index."""
    with torch.device("meta"):
        state = ZImageTransformer2DModel().state_dict()
    assert len(state) == 521 and sum(p.numel() for p in state.values()) == 6_154_908_736


@pytest.mark.parametrize(
    "config", [{"dimm": 3}, {"qk_norm": False}, {"all_patch_size": [4]}, {"n_kv_heads": 2}]
)
def test_a_config_it_cannot_compute_is_refused(config: dict) -> None:
    with pytest.raises(UserError, match=next(iter(config))):
        ZImageConfig.from_dict(config)


def test_attention_backend_errors_name_the_choice() -> None:
    _, ours = pair("odd")
    with pytest.raises(UserError, match="sdpa"):
        ours.set_attention_backend("fastest")


def twin(second: bool, dtype: torch.dtype = torch.float32) -> ZImageTransformer2DModel:
    _, plain = pair("odd", dtype)
    model = ZImageTransformer2DModel(plain.config, second_time_embedder=second)
    torch.manual_seed(3)
    model.load_state_dict(model.state_dict() | plain.state_dict())
    return model.to(dtype).eval()


def reference_embedding(embedder: torch.nn.Module, t: float) -> torch.Tensor:
    """The sinusoid of 256 values, cosines first, then the two linears: written out, in fp64."""
    frequencies = torch.exp(-np.log(10000.0) * torch.arange(128, dtype=torch.float64) / 128)
    sinusoid = torch.cat(((t * frequencies).cos(), (t * frequencies).sin()))
    a, b = embedder.mlp[0], embedder.mlp[2]
    h = a.weight.double() @ sinusoid + a.bias.double()
    return b.weight.double() @ (h * h.sigmoid()) + b.bias.double()


@torch.no_grad()
@pytest.mark.parametrize("second", [True, False])
@pytest.mark.parametrize(
    ("t", "tt", "m_t", "m_tt"),
    [
        (0.999, 0.0, 0.001, 0.0),  # sign(0) = 0: the image as a target is 0, not 1
        (0.6, 0.2, 0.4, 0.8),
        (0.5, 0.5, 0.5, 0.5),  # no way to go: the second embedder has no part in it
        (-0.7, 0.7, -0.3, 0.3),  # the twin trajectory
    ],
)
def test_twin_time_follows_the_formula(second: bool, t: float, tt: float, m_t: float, m_tt: float) -> None:
    model = twin(second)
    times = dit_time(torch.tensor([t, tt], dtype=torch.float64))
    assert times.tolist() == pytest.approx([m_t, m_tt], abs=1e-12) and times.dtype == torch.float64
    other = model.t_embedder_2 if second else model.t_embedder
    expected = reference_embedding(model.t_embedder, 1000 * abs(m_t))
    expected = expected + reference_embedding(other, 1000 * (m_tt - m_t)) * abs(m_t - m_tt)
    given = model.embed_twin_time(times[:1], times[1:])
    torch.testing.assert_close(given[0].double(), expected, rtol=1e-4, atol=1e-4)
    batch = model.embed_twin_time(times, times.flip(0))
    torch.testing.assert_close(batch[:1], given, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_a_target_changes_the_prediction_and_its_absence_nothing() -> None:
    _, plain = pair("odd")
    model = twin(True)
    latents, captions = inputs("odd", [(8, 8, 3)])
    c = model.prepare(captions[0], 8, 8)
    t = torch.tensor([0.3])
    assert torch.equal(model(latents, t, [c])[0], plain(latents, t, [c])[0])
    aimed = model(latents, t, [c], target_t=torch.tensor([0.9]))[0]
    assert not torch.allclose(aimed, plain(latents, t, [c])[0], atol=1e-3)
    here = model(latents, t, [c], target_t=t)[0]
    torch.testing.assert_close(here, plain(latents, t, [c])[0], rtol=1e-5, atol=1e-5)
