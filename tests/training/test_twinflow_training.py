"""TwinFlow's training targets against straight transcriptions of their formulas, row by row."""

import math

import numpy as np
import pytest
import torch

from models.z_image.transformer_z_image import ZImageConfig, ZImageTransformer2DModel
from training.export import half
from training.grammar import COLOURS
from training.twinflow import (
    DELTA,
    Parts,
    TwinModel,
    cleanness,
    draw_times,
    loss_rows,
    mix,
    rcgm_target,
    rectification,
    saved,
    time_weight,
)

TINY = ZImageConfig(dim=32, n_layers=5, n_refiner_layers=1, n_heads=2, cap_feat_dim=16, axes_dims=(4, 6, 6))


def tiny() -> TwinModel:
    torch.manual_seed(0)
    return TwinModel(ZImageTransformer2DModel(TINY, second_time_embedder=True))


def bent(x: torch.Tensor, t: torch.Tensor, tt: torch.Tensor) -> torch.Tensor:
    """A field that depends on everything it is given."""
    return torch.sin(x) * (1 + t[:, None, None, None]) + tt[:, None, None, None] ** 2


@pytest.mark.parametrize("order", [1, 2])
def test_the_rcgm_target_is_its_formula(order: int) -> None:
    torch.manual_seed(1)
    x, f, v = 0.3 * torch.randn(3, 5, 16, 4, 4).double()
    t = torch.tensor([1.0, 0.8, 0.7, 0.5, 0.3]).double()
    tt = torch.tensor([0.0, 0.35, 0.695, 0.5, 0.29]).double()
    got = rcgm_target(bent, f, x, t, tt, v, order)
    for i in range(5):
        a, b = t[i].item(), tt[i].item()
        if a - b < DELTA:
            disagreement = f[i] - v[i]
        else:
            y, s, integral = x[i] - 0.01 * v[i], a - 0.01, torch.zeros_like(x[i])
            for k in range(order):
                s_next = s + (b - s) / (order - k)  # the rest in equal parts
                field = torch.sin(y) * (1 + s) + s_next**2
                integral = integral + (s - s_next) * field
                y, s = y - (s - s_next) * field, s_next
            disagreement = f[i] * 100 * (a - b) - 100 * integral - v[i]
        torch.testing.assert_close(got[i], f[i] - disagreement.clamp(-1, 1))


def test_a_field_that_is_right_is_its_own_target() -> None:
    """Straight paths: the mean velocity is the velocity everywhere, nothing is left to correct."""
    v = torch.randn(4, 16, 4, 4).double()
    x, t = torch.randn_like(v), torch.tensor([1.0, 0.6, 0.4, 0.2]).double()
    target = rcgm_target(lambda *_: v, v, x, t, t / 2, v, 2)
    torch.testing.assert_close(target, v)


def test_a_target_of_the_image_is_asked_for_exactly() -> None:
    asked: list[torch.Tensor] = []

    def field(x: torch.Tensor, t: torch.Tensor, tt: torch.Tensor) -> torch.Tensor:
        asked.append(tt)
        return x

    x, t = torch.randn(3, 16, 4, 4), torch.tensor([1.0, 0.7, 0.3])
    rcgm_target(field, x, x, t, torch.zeros(3), x, 2)
    assert (asked[-1] == 0).all() and (asked[0] > 0).all()


@pytest.mark.parametrize("count", [4, 7, 24])
def test_times_of_the_four_parts(count: int) -> None:
    torch.manual_seed(2)
    parts = Parts.of(count)
    for _ in range(50):
        t, tt = draw_times(count, (2.0, 1.0, 0.9))
        assert (t[parts.e2e] == 1).all() and (tt[parts.e2e] == 0).all()
        near, far, twin = (t - tt)[parts.mul], tt[parts.any], slice(parts.real.stop, None)
        assert (near >= 0).all() and (near <= 0.05 * t[parts.mul] + 1e-6).all()
        assert (far >= 0).all() and (far <= t[parts.any]).all()
        assert (t[twin] < 0).all() and (tt[twin] == t[twin]).all()
        assert (t[parts.mul].abs() <= 0.9).all()
    sizes = [len(range(count)[s]) for s in (parts.e2e, parts.mul, parts.any, parts.adv)]
    assert sum(sizes) == count and max(sizes) - min(sizes) <= 3


def test_three_pictures_are_too_few() -> None:
    with pytest.raises(ValueError, match="at least 4"):
        Parts.of(3)


def test_weights_of_rows() -> None:
    t, tt = torch.tensor([1.0, 0.5, 0.8, -0.5]), torch.tensor([0.0, 0.5, 0.3, -0.5])
    expected = [math.tan((1 - d) * math.pi / 2.5) + 1 for d in (1.0, 0.0, 0.5)] + [1.0]
    torch.testing.assert_close(time_weight(t, tt), torch.tensor(expected))


def test_the_loss_is_the_squared_error_under_barrons_weight() -> None:
    f, target = torch.randn(2, 3, 16, 4, 4)
    f.requires_grad_()
    rows = loss_rows(f, target)
    for i in range(3):
        d = (f[i] - target[i]).square().mean().item()
        assert rows[i].item() == pytest.approx(d / math.sqrt(d / 1e-6 + 1) / 1e-3, rel=1e-5)
    rows[0].backward()  # the weight is constant for the gradient: that of an L2 loss but for one factor
    assert f.grad is not None
    ratio = f.grad[0] / (f - target).detach()[0]
    torch.testing.assert_close(ratio, torch.full_like(ratio, ratio.mean().item()), rtol=1e-4, atol=1e-7)


def test_the_rectification_is_twin_minus_real_velocity() -> None:
    x, z = torch.randn(2, 4, 16, 4, 4)
    t = torch.tensor([0.1, 0.4, 0.7, 1.0])

    def field(point: torch.Tensor, now: torch.Tensor, goal: torch.Tensor) -> torch.Tensor:
        assert (now == goal).all()
        return point * torch.where(now < 0, 3.0, 1.0)[:, None, None, None]

    point = (1 - t)[:, None, None, None] * x + t[:, None, None, None] * z
    torch.testing.assert_close(rectification(field, x, z, t), (2 * point).clamp(-1, 1))
    torch.testing.assert_close(mix(z, x, -t), point)


def test_a_step_along_the_rectification_moves_samples_to_the_real_side() -> None:
    """x = z - F: F - (twin - real) makes x larger where the twin's velocity is larger, so where its image
    is smaller than the real trajectory's."""
    x, z, t = torch.zeros(1, 16, 2, 2), torch.zeros(1, 16, 2, 2), torch.tensor([0.5])

    def field(point: torch.Tensor, now: torch.Tensor, goal: torch.Tensor) -> torch.Tensor:
        image = torch.where(now < 0, -0.2, 0.2)[:, None, None, None]  # twin: -0.2, real: +0.2
        return (point - image) / now.abs()[:, None, None, None]

    f = z - x
    assert ((z - (f - rectification(field, x, z, t))) > x).all()


def test_both_branches_differ_only_by_the_training_vector() -> None:
    model = tiny()
    for parameter in model.model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    caption = (torch.randn(2, 32, 16), torch.tensor([5, 32]))
    x, t = torch.randn(2, 16, 4, 4), torch.tensor([0.3, 0.8])
    with torch.no_grad():
        real, twin = model(x, t, t, caption), model(x, -t, -t, caption)
        assert (real - twin).abs().max() > 1e-3
        model.twin.zero_()
        torch.testing.assert_close(model(x, -t, -t, caption), real)  # the trap this vector is there for


def test_the_exported_file_has_the_second_embedder_and_not_the_training_vector() -> None:
    model = tiny()
    tensors = half(saved(model)["average"])
    plain = ZImageTransformer2DModel(TINY).state_dict()
    assert set(tensors) - set(plain) == {
        f"t_embedder_2.mlp.{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias")
    }
    assert not [name for name in tensors if "twin" in name]
    assert all(x.dtype == torch.float16 for x in tensors.values())


def test_training_reaches_the_second_embedder_and_the_vector() -> None:
    model = tiny()
    caption = (torch.randn(2, 32, 16), torch.tensor([5, 32]))
    out = model(torch.randn(2, 16, 4, 4), torch.tensor([0.9, -0.4]), torch.tensor([0.2, -0.4]), caption)
    out.square().mean().backward()
    assert model.twin.grad is not None and model.twin.grad.abs().max() > 0
    weight = model.model.t_embedder_2.mlp[0].weight
    assert weight.grad is not None and weight.grad.abs().max() > 0


def test_cleanness_counts_pixels_of_named_colours() -> None:
    picture = np.zeros((4, 4, 3), np.uint8)
    picture[:] = next(iter(COLOURS.values()))
    assert cleanness(picture) == 1
    picture[:2] = (120, 60, 190 // 2)
    far = min(np.linalg.norm(np.subtract(c, picture[0, 0])) for c in COLOURS.values()) > 32
    assert far and cleanness(picture) == 0.5
