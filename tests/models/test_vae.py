"""The VAE whole and in tiles: coverage, exactness where it must be exact, and how large seams may be."""

import copy
from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional as F

from models.z_image import vae as tiling
from models.z_image.checkpoints.part_configs import read_config
from models.z_image.family import VAE_CONFIG
from shared.errors import Cancelled, UserError
from shared.imaging.tiling import ramps, tiles
from tests.support import mini

PROMPT = "a red circle above a blue square on a yellow background"


@pytest.fixture(scope="module", params=["mini", "random"])
def vae(request: pytest.FixtureRequest) -> AutoencoderKL:
    """The Mini's, and the full model's configuration with random weights and few channels."""
    if request.param == "mini":
        return mini.load()[1].vae
    torch.manual_seed(0)
    few = {"block_out_channels": [16, 32, 64, 64], "norm_num_groups": 4}
    return AutoencoderKL.from_config(read_config(VAE_CONFIG) | few).eval()


@pytest.fixture(scope="module")
def latents() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    how = dict(height=256, width=512, num_inference_steps=2, generator=generator, output_type="latent")
    return mini.load()[1](PROMPT, **how).images[0]


def reference_decode(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """z / scaling + shift; the network's -1..1 as 0..1."""
    with torch.no_grad():
        return (vae.decode(latents[None] / 0.3611 + 0.1159).sample[0] / 2 + 0.5).clamp(0, 1)


def reference_encode(vae: AutoencoderKL, pixels: Tensor) -> Tensor:
    with torch.no_grad():
        return (vae.encode(pixels[None] * 2 - 1).latent_dist.mode()[0] - 0.1159) * 0.3611


def cuts() -> Iterator[tuple[int, int, int]]:
    for tile in range(1, 13):
        for overlap in range(tile):
            for size in range(1, 50):
                yield size, tile, overlap


def test_tiles_cover_everything_with_full_tiles_that_share_enough() -> None:
    for size, tile, overlap in cuts():
        spans = tiles(size, tile, overlap)
        assert spans[0][0] == 0 and spans[-1][1] == size
        assert {stop - start for start, stop in spans} == {min(tile, size)}
        for (_, stop), (start, _) in zip(spans, spans[1:], strict=False):
            assert stop - start >= overlap
        fewer = len(spans) - 1  # could not reach: each after the first brings tile - overlap at most
        assert fewer == 0 or tile + (fewer - 1) * (tile - overlap) < size


def test_the_shares_of_every_position_add_up_to_one() -> None:
    for size, tile, overlap in cuts():
        spans = tiles(size, tile, overlap)
        total = torch.zeros(size)
        for (start, stop), share in zip(spans, ramps(spans), strict=True):
            assert (share > 0).all()
            total[start:stop] += share
        torch.testing.assert_close(total, torch.ones(size))


def test_two_tiles_fade_along_a_line() -> None:
    first, second = ramps([(0, 6), (2, 8)])
    assert first.tolist() == [1, 1, 0.875, 0.625, 0.375, 0.125]
    assert second.tolist() == [0.125, 0.375, 0.625, 0.875, 1, 1]


class Resampler:
    """In the VAE's place: enlarges and shrinks eightfold without looking beyond a position, so that tiles
    must give exactly what the whole gives.
    """

    config = SimpleNamespace(
        block_out_channels=[1] * 4, scaling_factor=2.0, shift_factor=0.25, latent_channels=16, out_channels=3
    )
    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self) -> None:
        self.sizes: list[tuple[int, int]] = []

    def decode(self, z: Tensor, return_dict: bool) -> tuple[Tensor]:
        self.sizes.append((z.shape[2] * 8, z.shape[3] * 8))
        return (F.interpolate(z[:, :3], scale_factor=8, mode="nearest"),)

    def encode(self, x: Tensor) -> SimpleNamespace:
        self.sizes.append((x.shape[2], x.shape[3]))
        mode = F.avg_pool2d(x.mean(1, keepdim=True), 8).expand(-1, 16, -1, -1)
        return SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: mode))


@pytest.mark.parametrize(("height", "width"), [(8, 8), (64, 200), (136, 72), (480, 320)])
@pytest.mark.parametrize("tile", [64, 128])
def test_tiles_lie_where_they_belong(height: int, width: int, tile: int) -> None:
    stand_in = Resampler()
    z = torch.randn(16, height // 8, width // 8, generator=torch.Generator().manual_seed(0)) / 4
    picture = tiling.decode(stand_in, z, tile)
    expected = ((z[:3] / 2 + 0.25) / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(picture, expected.repeat_interleave(8, 1).repeat_interleave(8, 2))
    back = tiling.encode(stand_in, picture, tile)
    torch.testing.assert_close(back, ((expected * 2 - 1).mean(0) - 0.25).mul(2).expand(16, -1, -1))
    assert set(stand_in.sizes) == {(min(height, tile), min(width, tile))}  # what bounds the device's memory


@pytest.mark.parametrize("tile", [None, 512, 576])
def test_exact_where_a_tile_covers_the_picture(vae: AutoencoderKL, latents: Tensor, tile: int | None) -> None:
    picture = tiling.decode(vae, latents, tile)
    assert torch.equal(picture, reference_decode(vae, latents))
    assert torch.equal(tiling.encode(vae, picture, tile), reference_encode(vae, picture))


#: mean and maximum of a decoded picture's error; mean of the latents' error in parts of their spread
BOUNDS = {"mini": (0.003, 0.08, 0.004), "random": (0.02, 0.5, 0.12)}


def test_tiles_differ_from_the_whole_by_what_their_group_norms_see(
    vae: AutoencoderKL, latents: Tensor, request: pytest.FixtureRequest
) -> None:
    """Statistics over a tile instead of the picture move all of a tile a little. Measured for tiles of 256 of
    512 x 256 pixels, several seeds: Mini 0.0014, 0.036 and 0.0016; random weights up to 0.012, 0.3 and 0.08.
    A shift, a wrong ramp or a missing scale would be of the order of the picture's own spread, 0.2 to 0.4.
    """
    mean, maximum, latent_mean = BOUNDS[request.node.callspec.params["vae"]]
    whole = tiling.decode(vae, latents)
    difference = (tiling.decode(vae, latents, 256) - whole).abs()
    assert difference.mean() < mean and difference.max() < maximum
    encoded = tiling.encode(vae, whole)
    assert (tiling.encode(vae, whole, 256) - encoded).abs().mean() < latent_mean * encoded.std()


def test_the_overlap_hides_the_seam(vae: AutoencoderKL, latents: Tensor) -> None:
    """Without it, the convolutions' zero padding shows where two tiles meet: 4 to 20 times the error."""
    whole = tiling.decode(vae, latents)
    seam = slice(256 - 8, 256 + 8)
    hard, soft = (
        (tiling.decode(vae, latents, 256, overlap=overlap) - whole)[:, :, seam].abs().mean()
        for overlap in (0, tiling.OVERLAP)
    )
    assert soft < hard / 3


def test_a_picture_survives_encoding_and_decoding(latents: Tensor) -> None:
    _, pipe = mini.load()
    picture = tiling.decode(pipe.vae, latents)
    back = tiling.decode(pipe.vae, tiling.encode(pipe.vae, picture))
    assert (back - picture).abs().mean() < 0.02


def test_bfloat16_is_close(vae: AutoencoderKL, latents: Tensor) -> None:
    coarse = tiling.decode(copy.deepcopy(vae).bfloat16(), latents[:, :16, :16])
    assert coarse.dtype == torch.float32
    assert (coarse - tiling.decode(vae, latents[:, :16, :16])).abs().mean() < 0.02


def test_cancelled_between_tiles() -> None:
    stand_in = Resampler()
    with pytest.raises(Cancelled):
        tiling.decode(stand_in, torch.zeros(16, 64, 64), 128, lambda: len(stand_in.sizes) == 2)
    assert len(stand_in.sizes) == 2


@pytest.mark.parametrize("tile", [0, -64, 100])
def test_a_tile_that_is_none_gets_one_sentence(tile: int) -> None:
    with pytest.raises(UserError, match=f"{tile} pixels.*multiple of 64"):
        tiling.decode(Resampler(), torch.zeros(16, 8, 8), tile)


def test_the_pipeline_decodes_in_its_tile_one_picture_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    _, pipe = mini.load()
    how = dict(height=128, width=192, num_inference_steps=1, num_images_per_prompt=2)
    start = torch.randn(2, 16, 16, 24, generator=torch.Generator().manual_seed(0))
    latents = pipe(PROMPT, latents=start, output_type="latent", **how).images
    monkeypatch.setattr(pipe, "vae_tile", 128)
    pictures = pipe(PROMPT, latents=start, output_type="pt", **how).images
    assert torch.equal(pictures, torch.stack([tiling.decode(pipe.vae, x, 128) for x in latents]))
    images = pipe(PROMPT, latents=start, **how).images
    assert np.array_equal(np.asarray(images[1]), (pictures[1].permute(1, 2, 0) * 255).round().byte().numpy())
