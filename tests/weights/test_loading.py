"""Loading models: names, prefixes, damage, and what the cards name."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import models
from models.z_image.z_image_handler import family_handler
from shared.errors import UserError
from shared.library.cards import load_cards
from shared.settings.table import SETTINGS
from shared.weights.files import Folders, locate
from shared.weights.loading import build, load_weights
from tests.support import mini


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 8)
        self.second = nn.Linear(8, 2, bias=False)


def weights(prefix: str = "", dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {prefix + k: v.to(dtype).clone() for k, v in Small().state_dict().items()}


def load(path: Path, dtype: torch.dtype | None = torch.float32) -> nn.Module:
    model = build(Small)
    load_weights(model, [path], dtype=dtype)
    return model


@pytest.mark.parametrize("prefix", ["", "model.", "model.diffusion_model."])
@pytest.mark.parametrize("name", ["plain.safetensors", "queen-of-hearts.safetensors"])
def test_weights_arrive_whatever_the_prefix_and_name(tmp_path: Path, prefix: str, name: str) -> None:
    save_file(weights(prefix, torch.float16), tmp_path / name)
    model = load(tmp_path / name)
    for key, expected in weights(dtype=torch.float16).items():
        assert torch.equal(model.state_dict()[key], expected.float())


def test_dtype_none_keeps_the_file(tmp_path: Path) -> None:
    save_file(weights(dtype=torch.bfloat16), tmp_path / "x.safetensors")
    assert load(tmp_path / "x.safetensors", None).first.weight.dtype == torch.bfloat16


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    part = weights()
    del part["first.bias"]
    save_file(part, tmp_path / "part.safetensors")
    with pytest.raises(UserError, match=r"part\.safetensors lacks 1 of the 3 .*first\.bias"):
        load(tmp_path / "part.safetensors")


def test_a_tensor_of_another_shape_is_named(tmp_path: Path) -> None:
    save_file(weights() | {"second.weight": torch.zeros(2, 9)}, tmp_path / "wide.safetensors")
    with pytest.raises(UserError, match=r"wide\.safetensors is of another size.*second\.weight"):
        load(tmp_path / "wide.safetensors")


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "cut.safetensors"
    save_file(weights(), file)
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(UserError, match="cut.safetensors"):
        load(file)


def test_an_absent_file_is_not_looked_for_on_a_hub(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        load(tmp_path / "a" / "b" / "absent.safetensors")


def test_unknown_tensors_are_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_file(weights() | {"third.weight": torch.zeros(1)}, tmp_path / "more.safetensors")
    load(tmp_path / "more.safetensors")
    assert "third.weight" in caplog.text


def test_every_card_loads_or_says_what_is_missing() -> None:
    cards, errors = load_cards(mini.ROOT, SETTINGS)
    assert errors == []
    folders = Folders(mini.ROOT, mini.ROOT / "ckpts")
    for card in cards.values():
        handler = models.handler_for(card.architecture)
        needed = handler.query_model_files(card.architecture, card.model)
        here = [any(locate(a, folders, n.target) for a in n.alternatives) for n in needed]
        if all(here):
            files = [n.alternatives[0] for n in needed if n.role.startswith(("transformer", "module"))]
            _, pipe = handler.load_model(files, card.architecture, card.model, device="cpu")
            assert set(pipe) == {"transformer", "text_encoder", "vae", *(["control"] if files[1:] else [])}
        else:
            with pytest.raises(UserError, match="not on disk"):
                handler.load_model(card.model["URLs"][0], card.architecture, card.model, device="cpu")


def test_the_documents_lines_reach_the_file_they_name() -> None:
    with pytest.raises(UserError, match="TwinFlow-Z-Image-Turbo_bf16.safetensors|qwen3_bf16"):
        family_handler.load_model(
            model_filename="TwinFlow-Z-Image-Turbo_bf16.safetensors",
            base_model_type="z_image",
            quantizeTransformer=False,
            dtype=torch.bfloat16,
            VAE_dtype=torch.float32,
        )


def test_the_built_in_models_are_small() -> None:
    files = [f for f in (mini.ROOT / "models/z_image/mini").rglob("*") if f.is_file()]
    sizes = {f.name: f.stat().st_size for f in files if f.name == "transformer_twinflow.safetensors"}
    assert sum(f.stat().st_size for f in files) - sum(sizes.values()) < 16e6
    assert all(size < 8e6 for size in sizes.values())


def test_bf16_runs(tmp_path: Path) -> None:
    definition = mini.model_def("z_image_mini")
    _, pipe = family_handler.load_model(
        definition["URLs"][0], "z_image", definition, dtype=torch.bfloat16, device="cpu"
    )
    assert pipe.transformer.dtype == torch.bfloat16 and pipe.vae.dtype == torch.float32
    latents = torch.randn(1, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    how = dict(height=128, width=128, num_inference_steps=4, latents=latents, output_type="latent")
    coarse = pipe("a red circle on a white background", **how).images
    fine = mini.load()[1]("a red circle on a white background", **how).images
    assert (
        coarse - fine
    ).norm() < 0.1 * fine.norm()  # bf16 has 8 bits: errors of some percent over four steps


@pytest.mark.parametrize("spelling", ["", "extended_weights.t_embedder_2.", "t_embedder_2."])
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_the_second_time_embedder_loads_under_both_spellings(
    tmp_path: Path, spelling: str, prefix: str, caplog: pytest.LogCaptureFixture
) -> None:
    definition = mini.model_def("z_image_mini")
    stored = load_file(mini.ROOT / definition["URLs"][0])
    second = {k: torch.full_like(v, 0.5) for k, v in stored.items() if k.startswith("t_embedder.")}
    extra = {k.replace("t_embedder.", spelling): v for k, v in second.items() if spelling}
    save_file({prefix + k: v for k, v in (extra | stored).items()}, tmp_path / "twin.safetensors")
    _, pipe = family_handler.load_model(tmp_path / "twin.safetensors", "z_image", definition, device="cpu")
    assert pipe.transformer.has_second_time_embedder == bool(spelling)
    if spelling:
        assert len(pipe.transformer.state_dict()) == len(stored) + 4
        assert (pipe.transformer.t_embedder_2.mlp[0].weight == 0.5).all()
    assert "does not know" not in caplog.text
