"""Control networks against the official semantics, put together from diffusers' own blocks."""

from pathlib import Path

import pytest
import torch
from diffusers import ZImageTransformer2DModel as Reference
from torch import Tensor, nn

from models.z_image import control
from models.z_image.checkpoints import weight_names as names
from models.z_image.checkpoints.control_layout import ControlLayout, is_control
from models.z_image.control import ControlSchedule, Hints, ZImageControlModel, context, step_of
from models.z_image.nag import Nag
from models.z_image.transformer_z_image import ZImageConfig, ZImageTransformer2DModel, padded, patchify
from shared.errors import Cancelled, UserError
from shared.gpu.placement import Placement
from shared.weights.loading import save_quantized
from shared.weights.quantized import Int8Linear
from tests.support.cards import Card
from tests.support.control_nets import GENERATIONS, networks, saved

SCALE = 0.75


def ours(
    generation: str, base: Reference, net: nn.Module
) -> tuple[ZImageTransformer2DModel, ZImageControlModel]:
    config = ZImageConfig.from_dict(dict(base.config))
    model = ZImageTransformer2DModel(config)
    model.load_state_dict(base.state_dict())
    channels, places, refiner = GENERATIONS[generation]
    kinds = {None: control.PLAIN, "control_layers": control.SHARED, "control_noise_refiner": control.OWN}
    mine = ZImageControlModel(config, ControlLayout(channels, tuple(places), kinds[refiner]))
    mine.load_state_dict(net.state_dict())
    return model.eval(), mine.eval()


@torch.no_grad()
def official(base, net, latent: Tensor, t: float, caption: Tensor, given: Tensor, scale: float) -> Tensor:
    """One sample's prediction as VideoX-Fun computes it: every step written out with diffusers' blocks."""
    height, width = latent.shape[1:]
    count, length = height * width // 4, padded(len(caption))
    n = padded(count)
    grid = [[1 + length, r, c] for r in range(height // 2) for c in range(width // 2)]
    image_ids = torch.tensor(grid + [[0, 0, 0]] * (n - count), dtype=torch.int32)
    caption_ids = torch.tensor([[1 + j, 0, 0] for j in range(length)], dtype=torch.int32)
    rope_x, rope_c = base.rope_embedder(image_ids)[None], base.rope_embedder(caption_ids)[None]
    rope = torch.cat((rope_x, rope_c), 1)
    temb = base.t_embedder(torch.tensor([t]) * 1000.0)

    def embedded(embedder: nn.Module, x: Tensor) -> Tensor:
        tokens = embedder(patchify(x, 2))
        return torch.cat((tokens, base.x_pad_token.expand(n - count, -1)))[None]

    x = embedded(base.all_x_embedder["2-1"], latent)
    c = embedded(net.control_all_x_embedder["2-1"], given)
    cap = torch.cat((base.cap_embedder(caption), base.cap_pad_token.expand(length - len(caption), -1)))[None]
    for block in base.context_refiner:
        cap = block(cap, None, rope_c)
    refiner_hints = []
    if net.add_control_noise_refiner is None:
        for block in net.control_noise_refiner:
            c = block(c, None, rope_x, temb)
    else:
        own = net.add_control_noise_refiner == "control_noise_refiner"
        for block in net.control_noise_refiner if own else net.control_layers:
            c = block(c, x, None, rope_x, temb)
        *refiner_hints, c = torch.unbind(c)
    for i, block in enumerate(base.noise_refiner):
        x = block(x, None, rope_x, temb)
        if refiner_hints:
            x = x + scale * refiner_hints[i]
    u, c = torch.cat((x, cap), 1), torch.cat((c, cap), 1)
    for block in net.control_layers:
        c = block(c, u, None, rope, temb)
    hints = dict(zip(net.control_layers_places, torch.unbind(c)[:-1], strict=True))
    for i, block in enumerate(base.layers):
        u = block(u, None, rope, temb)
        if i in hints:
            u = u + scale * hints[i]
    out = base.all_final_layer["2-1"](u, c=temb)[:, :count]
    return base.unpatchify([out[0]], [(1, height, width)], 2, 1)[0][:, 0]


def inputs(generation: str, shape=(12, 20), lengths=(37, 70)) -> tuple[list[Tensor], list[Tensor], Tensor]:
    g = torch.Generator().manual_seed(3)
    latents = [torch.randn(16, *shape, generator=g) for _ in lengths]
    captions = [torch.randn(n, 40, generator=g) for n in lengths]
    return latents, captions, torch.randn(GENERATIONS[generation][0], *shape, generator=g)


@torch.no_grad()
def run(model, net, latents, captions, given, scale=SCALE, t=(0.35,), **how) -> list[Tensor]:
    prepared = [model.prepare(c, *x.shape[1:]) for x, c in zip(latents, captions, strict=True)]
    hints = Hints(net, [net.embed(given, model.x_pad_token)] * len(latents), scale)
    return model(latents, torch.tensor(t), prepared, control=hints, **how)


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize(
    ("shape", "lengths"),
    [
        ((12, 20), (37,)),  # 60 image tokens padded to 64, caption to 64
        ((16, 16), (64,)),  # 64 image tokens and 64 of the caption: no padding anywhere
        ((12, 20), (37, 70)),  # a batch of captions of different lengths
        ((16, 16), (5, 5, 33)),
    ],
)
def test_equals_the_official_semantics(generation: str, shape, lengths) -> None:
    base, net = networks(generation)
    latents, captions, given = inputs(generation, shape, lengths)
    t = [0.35, 0.9, 0.1][: len(lengths)]
    mine = run(*ours(generation, base, net), latents, captions, given, t=t)
    plain = run(*ours(generation, base, net), latents, captions, given, t=t, scale=0.0)
    for i, out in enumerate(mine):
        expected = official(base, net, latents[i], t[i], captions[i], given, SCALE)
        assert (out - expected).abs().max() < 1e-4
        assert (out - plain[i]).abs().max() > 1e-2  # and the network does something


def small(generation: str = "2.1") -> tuple[ZImageTransformer2DModel, ZImageControlModel]:
    return ours(generation, *networks(generation))


@pytest.mark.parametrize("generation", GENERATIONS)
def test_a_scale_of_zero_is_the_base_bit_for_bit(generation: str) -> None:
    model, net = small(generation)
    latents, captions, given = inputs(generation)
    prepared = [model.prepare(c, 12, 20) for c in captions]
    with torch.no_grad():
        plain = model(latents, torch.tensor([0.35]), prepared)
    assert all(map(torch.equal, plain, run(model, net, latents, captions, given, scale=0.0)))


@pytest.mark.parametrize("generation", GENERATIONS)
def test_a_sequence_is_bit_identical_alone_and_in_any_batch(generation: str) -> None:
    model, net = small(generation)
    latents, captions, given = inputs(generation, lengths=(37, 70, 5))
    together = run(model, net, latents, captions, given)
    for x, caption, out in zip(latents, captions, together, strict=True):
        assert torch.equal(run(model, net, [x], [caption], given)[0], out)


@pytest.mark.parametrize("generation", GENERATIONS)
def test_bf16_is_as_close_as_bf16_allows(generation: str) -> None:
    """Our fp32 is the measure; an error of ours (a cast too many) would be far above these few percent."""
    model, net = small(generation)
    latents, captions, given = inputs(generation, lengths=(37,))
    (exact,) = run(model, net, latents, captions, given)
    halves = [[x.bfloat16() for x in xs] for xs in (latents, captions)]
    (rounded,) = run(model.bfloat16(), net.bfloat16(), *halves, given)
    assert (rounded.float() - exact).norm() <= 0.06 * exact.norm()


@pytest.mark.parametrize("generation", GENERATIONS)
def test_fp16_weights_compute_in_range(generation: str) -> None:
    model, net = small(generation)
    latents, captions, given = inputs(generation, lengths=(37,))
    (exact,) = run(model, net, latents, captions, given)
    with torch.no_grad():
        model.half(), net.half()
        model.x_pad_token.mul_(300)  # such activations are finite only where the states are wide
        (wide,) = run(model, net, latents, captions, given * 300)
        model.x_pad_token.div_(300)
    (rounded,) = run(model, net, latents, captions, given)
    assert torch.isfinite(wide).all()
    assert (rounded.float() - exact).norm() <= 0.02 * exact.norm()


@torch.no_grad()
@pytest.mark.parametrize("generation", ["v1", "2.1"])
def test_with_nag_that_changes_nothing_control_is_what_it_is_without(generation: str) -> None:
    """alpha 0 takes nothing of the guidance; the negative caption's rows must not reach the image's."""
    model, net = small(generation)
    latents, captions, given = inputs(generation, lengths=(37,))
    negative = [model.prepare(torch.randn(70, 40), 12, 20)]
    (plain,) = run(model, net, latents, captions, given)
    (same,) = run(model, net, latents, captions, given, negatives=negative, nag=Nag(4.0, alpha=0.0))
    (other,) = run(model, net, latents, captions, given, negatives=negative, nag=Nag(4.0))
    torch.testing.assert_close(same, plain, rtol=1e-4, atol=1e-5)
    assert (other - plain).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("generation", GENERATIONS)
def test_gradients_equal_inference_and_reach_every_weight(generation: str) -> None:
    model, net = small(generation)
    latents, captions, given = inputs(generation, lengths=(37,))
    (expected,) = run(model, net, latents, captions, given)
    with torch.enable_grad():
        prepared = [model.prepare(captions[0], 12, 20)]
        hints = Hints(net, [net.embed(given, model.x_pad_token)], SCALE)
        (out,) = model(latents, torch.tensor([0.35]), prepared, control=hints)
        out.square().mean().backward()
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    assert all(p.grad is not None for p in net.parameters())


@torch.no_grad()
@pytest.mark.parametrize("generation", GENERATIONS)
def test_its_inputs_stay_as_they_are_and_interrupts_reach_its_blocks(generation: str) -> None:
    model, net = small(generation)
    latents, captions, given = inputs(generation, lengths=(5,))
    embedded, c = net.embed(given, model.x_pad_token), model.prepare(captions[0], 12, 20)
    before = embedded.clone()
    asked: list[int] = []
    how = dict(control=Hints(net, [embedded], 1))
    model(latents, torch.tensor([0.3]), [c], lambda: bool(asked.append(1)), **how)
    assert torch.equal(embedded, before)
    _, places, refiner = GENERATIONS[generation]
    first = len(places) if refiner == "control_layers" else 2
    assert len(asked) == 2 + 12 + first + len(places)
    with pytest.raises(Cancelled):
        model(latents, torch.tensor([0.3]), [c], lambda: True, **how)


@torch.no_grad()
@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("resident", [0, 2])
def test_the_same_bits_streamed_or_resident(card: Card, generation: str, resident: int) -> None:
    model, net = small(generation)
    latents, captions, given = inputs(generation)
    expected = run(model, net, latents, captions, given)
    residency = card.watched([*model.layers, *net.control_layers, *net.control_noise_refiner])
    for part in (model, net):
        residency.place(part, Placement(resident_blocks=resident))
    for _ in range(2):
        with residency.use(model), residency.use(net):
            given_back = run(model, net, latents, captions, given)
        assert all(map(torch.equal, expected, given_back))
    residency.evict()
    assert card.live == 0


# ---- files -------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("generation", GENERATIONS)
def test_the_keys_tell_the_generation_and_the_file_computes_the_same(generation: str, tmp_path: Path) -> None:
    model, net = small(generation)
    path = saved(tmp_path, generation)
    loaded = control.load(path, model.config, torch.float32)
    assert loaded.layout == net.layout and is_control(path)
    latents, captions, given = inputs(generation, lengths=(37,))
    expected, mine = (run(model, n, latents, captions, given)[0] for n in (net, loaded))
    torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-5)  # mapped memory is aligned otherwise


@torch.no_grad()
@pytest.mark.parametrize("generation", ["v1", "2.0", "2.1"])
def test_int8_files_load_like_the_others(generation: str, tmp_path: Path) -> None:
    model, _ = small(generation)
    net = control.load(saved(tmp_path, generation), model.config, torch.float32)
    save_quantized(net, tmp_path / "int8.safetensors", names.CONTROL)
    quantized = control.load(tmp_path / "int8.safetensors", model.config, torch.float32)
    assert quantized.layout == net.layout
    assert isinstance(quantized.control_layers[0].after_proj, Int8Linear)
    latents, captions, given = inputs(generation, lengths=(37,))
    expected, mine = (run(model, n, latents, captions, given)[0] for n in (net, quantized))
    assert 0 < (expected - mine).norm() < 0.03 * expected.norm()


def test_full_size_parameters_are_the_published_ones() -> None:
    """control.md: 1.551, 3.356 - 0.406 dead, 3.356 and 1.008 billion; 136, 295 and 91 tensors."""
    published = {
        (16, 5, control.PLAIN): (1.551, 136),
        (33, 2, control.SHARED): (2.950, 259),
        (33, 2, control.OWN): (3.356, 295),
        (33, 10, control.OWN): (1.008, 91),
    }
    for (channels, step, refiner), (billions, count) in published.items():
        with torch.device("meta"):
            layout = ControlLayout(channels, tuple(range(0, 30, step)), refiner)
            net = ZImageControlModel(ZImageConfig(), layout)
        state = net.state_dict()
        assert len(state) == count
        assert sum(x.numel() for x in state.values()) / 1e9 == pytest.approx(billions, abs=1e-3)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: {n: x for n, x in s.items() if "control_layers.3." not in n}, "control layers"),
        (lambda s: {n: x for n, x in s.items() if "_x_embedder" not in n}, "not a Z-Image control network"),
        (lambda s: s | {"control_all_x_embedder.2-1.weight": torch.zeros(96, 80)}, "20 channels"),
        (lambda s: {n: x for n, x in s.items() if n != "control_layers.0.before_proj.bias"}, "before_proj"),
    ],
    ids=["a block is missing", "no embedder", "other channels", "a tensor is missing"],
)
def test_other_files_are_refused_in_one_sentence(change, words: str, tmp_path: Path) -> None:
    model, _ = small()
    with pytest.raises(UserError, match=words):
        control.load(saved(tmp_path, "2.1", change), model.config, torch.float32)


# ---- the context, and when control acts --------------------------------------------------------------------


def test_the_table_of_contexts() -> None:
    g = torch.Generator().manual_seed(0)
    lines, kept = (torch.randn(16, 2, 3, generator=g) for _ in range(2))
    mask = torch.zeros(16, 24, dtype=torch.bool)
    mask[:8, 8:] = True  # the upper row of the latent, but for its first place, is repainted
    keep = torch.tensor([[[1.0, 0, 0], [1, 1, 1]]])
    none = torch.zeros(17, 2, 3)
    assert torch.equal(context(16, lines), lines)
    assert torch.equal(context(33, lines), torch.cat((lines, none)))
    assert torch.equal(context(33, None, kept, mask), torch.cat((torch.zeros(16, 2, 3), keep, kept)))
    assert torch.equal(context(33, lines, kept, mask), torch.cat((lines, keep, kept)))
    everything = torch.ones(16, 24, dtype=torch.bool)  # as if there were no picture: so it was trained
    assert torch.equal(context(33, lines, kept, everything), torch.cat((lines, none)))
    picture = torch.rand(3, 16, 24)
    grey = control.without_painted(picture, mask)
    assert (grey[:, mask] == 0.5).all() and torch.equal(grey[:, ~mask], picture[:, ~mask])


def test_the_mask_takes_the_nearest_pixel() -> None:
    mask = torch.zeros(16, 16, dtype=torch.bool)
    mask[0, 8] = mask[15, 15] = True  # the first pixel of a place counts, as torch's own nearest has it
    found = context(33, None, torch.ones(16, 2, 2), mask)[16]
    assert found.tolist() == [[1, 0], [1, 1]]


@pytest.mark.parametrize(
    ("share", "steps"),
    [
        (ControlSchedule(), [0, 1, 2, 3]),
        (ControlSchedule(end=0.5), [0, 1]),
        (ControlSchedule(start=0.5), [2, 3]),
        (ControlSchedule(start=0.25, end=0.75), [1, 2]),
        (ControlSchedule(start=0.3, end=0.8), [2]),
        (ControlSchedule(start=0.0, end=0.0), []),
        (ControlSchedule(scale=0.0), []),
    ],
)
def test_the_steps_that_control_acts_on(share: ControlSchedule, steps: list[int]) -> None:
    assert sorted(share.steps(4)) == steps


@pytest.mark.parametrize("numbers", [{"scale": 2.1}, {"scale": -1}, {"start": 1.5}, {"end": -0.1}])
def test_numbers_out_of_range_are_refused(numbers: dict) -> None:
    with pytest.raises(UserError, match="expected a number from 0 to"):
        ControlSchedule(**numbers)


def test_the_step_of_a_noise_level() -> None:
    levels = [1.0, 0.9, 0.75, 0.0]
    assert [step_of(levels, x) for x in (1.0, 0.95, 0.9, 0.8, 0.75, 0.1)] == [0, 0, 1, 1, 2, 2]
