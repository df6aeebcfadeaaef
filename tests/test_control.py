"""Control networks against the official semantics, put together from diffusers' own blocks."""


import pytest
import torch
from diffusers import ZImageControlNetModel as ReferenceControl
from diffusers import ZImageTransformer2DModel as Reference
from torch import Tensor, nn

from models.z_image import control
from models.z_image.control import Hints, Layout, ZImageControlModel
from models.z_image.transformer_z_image import ZImageConfig, ZImageTransformer2DModel, padded, patchify

CONFIG = dict(
    dim=96, n_heads=3, axes_dims=[8, 12, 12], axes_lens=[256, 64, 64], n_layers=12, n_refiner_layers=2,
    cap_feat_dim=40,
)  # fmt: skip
#: name -> (channels, hinted layers, diffusers' name of the refiner's kind)
GENERATIONS = {
    "v1": (16, [0, 5, 10], None),
    "2.0": (33, [0, 2, 4, 6, 8, 10], "control_layers"),
    "2.1": (33, [0, 2, 4, 6, 8, 10], "control_noise_refiner"),
    "lite": (33, [0, 6], "control_noise_refiner"),
}
SCALE = 0.75


def spread(model: nn.Module, seed: int) -> None:
    """Random weights for all that a new model has as zeros or ones."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 1 or "pad_token" in name or "_proj" in name:
                p.add_(torch.randn(p.shape, generator=g) * (0.05 if p.ndim == 2 else 0.3))


def networks(generation: str) -> tuple[Reference, ReferenceControl]:
    channels, places, refiner = GENERATIONS[generation]
    torch.manual_seed(0)
    base = Reference(**CONFIG, n_kv_heads=3)
    names = ("dim", "n_refiner_layers", "n_heads")
    net = ReferenceControl(
        control_layers_places=places,
        control_refiner_layers_places=[0, 1] if refiner else None,
        control_in_dim=channels,
        add_control_noise_refiner=refiner,
        n_kv_heads=3,
        **{name: CONFIG[name] for name in names},
    )
    spread(base, 1)
    spread(net, 2)
    return base.eval(), net.eval()


def ours(
    generation: str, base: Reference, net: nn.Module
) -> tuple[ZImageTransformer2DModel, ZImageControlModel]:
    config = ZImageConfig.from_dict(dict(base.config))
    model = ZImageTransformer2DModel(config)
    model.load_state_dict(base.state_dict())
    channels, places, refiner = GENERATIONS[generation]
    kinds = {None: control.PLAIN, "control_layers": control.SHARED, "control_noise_refiner": control.OWN}
    mine = ZImageControlModel(config, Layout(channels, tuple(places), kinds[refiner]))
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
