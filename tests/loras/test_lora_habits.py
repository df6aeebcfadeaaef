"""Habits of trainers that change what a file means are followed; what changes nothing condemns no file.

References: PEFT's LoHa and LoKr layers (scaling = alpha / r of the configuration), OneTrainer's OFT (angles
divided by 2 sqrt(b - 1)), LyCORIS's LoKr (no alpha where both factors are full).
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from models.z_image.checkpoints.lora_names import model_names
from shared.loras.inspection import inspect
from shared.loras.reader import read
from tests.support.lora_deltas import changes, distance, weights
from tests.support.lora_writers import (
    CONFIG,
    DIM,
    RANK,
    SHAPES,
    Other,
    deltas,
    factors,
    lokr,
    lycoris_oft,
    peft_loha,
    peft_lokr,
    peft_oft,
    save,
    scaled_oft,
    unscaled,
)

NAMES = model_names(CONFIG)


def off(path: Path, other: Other) -> float:
    """How far the file's changes are from its trainer's formula."""
    base = weights()
    return distance(changes(read(path, NAMES), base), {n: f(base[n]) for n, f in other.change.items()})


@pytest.mark.parametrize("marker", [torch.tensor(True), torch.tensor([1], dtype=torch.uint8), torch.empty(0)])
def test_onetrainers_scaled_oft_divides_the_angles(marker: Tensor, tmp_path: Path) -> None:
    other = scaled_oft()
    tensors = {key: marker if key.endswith("scaled_oft") else t for key, t in other.tensors.items()}
    path = save(tmp_path / "a.safetensors", (tensors, {}))
    assert inspect(path, NAMES).left_out == () and off(path, other) < 1e-5


def test_a_marker_that_is_false_scales_nothing(tmp_path: Path) -> None:
    other = peft_oft()
    tensors = other.tensors | {
        key.replace("weight", "scaled_oft"): torch.tensor(False) for key in other.tensors
    }
    assert off(save(tmp_path / "a.safetensors", (tensors, {})), other) < 1e-5


@pytest.mark.parametrize("adapter", ["", ".default", ".my_style-2"])
@pytest.mark.parametrize("kind", ["LOHA", "LOKR", "LOKR, full"])
def test_peft_scales_loha_and_lokr_by_its_configuration(kind: str, adapter: str, tmp_path: Path) -> None:
    other = peft_loha(3, 4, adapter) if kind == "LOHA" else peft_lokr(3, 4, "full" in kind, adapter)
    config = {"peft_type": kind[:4], "r": 4, "alpha": 3, "alpha_pattern": {}, "rank_pattern": {}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    path = save(tmp_path / "adapter_model.safetensors", (other.tensors, {}))
    assert off(path, other) < 1e-5
    config |= {"alpha": 99, "r": 33, "alpha_pattern": {r"layers\.\d+\..*": 3}, "rank_pattern": {"^.*": 4}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    assert off(path, other) < 1e-5


@pytest.mark.parametrize("pattern", ["(a+)+", "(", ".*.*.*.*.*", "a" * 400])
def test_an_expression_that_cannot_be_read_is_told(pattern: str, tmp_path: Path) -> None:
    config = {"r": 4, "lora_alpha": 3, "alpha_pattern": {pattern: 2}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    path = save(tmp_path / "adapter_model.safetensors", (unscaled("base_model.model.")(factors()), {}))
    assert "has the expression '" in inspect(path, NAMES).sentence


def test_adapters_under_their_own_name_are_read(tmp_path: Path) -> None:
    plain = unscaled("base_model.model.")(factors())
    named = {
        k.replace("_A.weight", "_A.my-style.weight").replace("_B.weight", "_B.my-style.weight"): t
        for k, t in plain.items()
    }
    path = save(tmp_path / "a.safetensors", (named, {}))
    assert inspect(path, NAMES).matched == len(SHAPES)
    assert distance(changes(read(path, NAMES), weights()), deltas(factors(alpha=RANK))) < 1e-6


@pytest.mark.parametrize("end", ["", ".weight"])
@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_names_of_old_diffusers_processors_are_read(prefix: str, end: str, tmp_path: Path) -> None:
    given = {n: f for n, f in factors(alpha=RANK).items() if ".attention." in n}
    tensors = {}
    for name, (a, b, _) in given.items():
        stem = prefix + name.replace(".attention.", ".attention.processor.").removesuffix(".0")
        tensors |= {f"{stem}_lora.down{end}": a, f"{stem}_lora.up{end}": b}
    path = save(tmp_path / "a.safetensors", (tensors, {}))
    assert distance(changes(read(path, NAMES), weights()), deltas(given)) < 1e-6


ODD = [torch.float8_e4m3fn, torch.float8_e5m2, *(torch.uint8, torch.int8, torch.int16, torch.uint16)]


@pytest.mark.parametrize("dtype", ODD, ids=str)
@pytest.mark.parametrize("alpha", [1.0, 6.0])
def test_alphas_of_odd_dtypes_are_read(dtype: torch.dtype, alpha: float, tmp_path: Path) -> None:
    tensors = unscaled("diffusion_model.")(factors())
    tensors |= {f"diffusion_model.{name}.alpha": torch.tensor(alpha).to(dtype) for name in SHAPES}
    save_file(tensors, tmp_path / "a.safetensors")
    found = changes(read(tmp_path / "a.safetensors", NAMES), weights())
    assert distance(found, deltas(factors(alpha=alpha))) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_every_float8_is_read_as_torch_reads_it(dtype: torch.dtype, tmp_path: Path) -> None:
    values = torch.arange(256).to(torch.uint8).view(dtype)
    for byte in (0, 1, 7, 8, 9, 0x38, 0x7B, 0x7E, 0x81, 0xB8, 0xFB):
        if not values[byte].float().isfinite() or values[byte].float() == 0:
            continue
        tensors = unscaled("")(factors({"layers.0.attention.to_q": (DIM, DIM)}))
        tensors["layers.0.attention.to_q.alpha"] = values[byte].clone()
        save_file(tensors, tmp_path / "a.safetensors")
        assert inspect(tmp_path / "a.safetensors", NAMES).alphas == (values[byte].float().item(),)


@pytest.mark.parametrize(
    "alpha", [torch.tensor(0.0), torch.tensor(float("nan")), torch.ones(3), torch.ones(2, 2)]
)
def test_an_alpha_without_effect_condemns_no_file(alpha: Tensor, tmp_path: Path) -> None:
    other = lokr()
    tensors = {key: alpha if key.endswith("alpha") else t for key, t in other.tensors.items()}
    path = save(tmp_path / "a.safetensors", (tensors, {}))
    assert inspect(path, NAMES).matched == len(SHAPES) and off(path, other) < 1e-6


def test_an_alpha_alone_is_left_out_by_name(tmp_path: Path) -> None:
    tensors = unscaled("")(factors()) | {"context_refiner.0.attention.to_q.alpha": torch.ones(2)}
    verdict = inspect(save(tmp_path / "a.safetensors", (tensors, {})), NAMES)
    assert verdict.matched == len(SHAPES) and "an alpha and nothing else" in str(verdict.left_out[0])


def test_boft_is_called_by_its_name(tmp_path: Path) -> None:
    blocks = torch.zeros(2, DIM // 8, 8, 8)
    lycoris = {"lycoris_layers_0_attention_to_q.oft_blocks": blocks}
    peft = {f"base_model.model.layers.0.attention.to_q.boft_{end}": blocks for end in ("R", "s")}
    for i, tensors in enumerate((lycoris, peft)):
        path = save(tmp_path / f"{i}.safetensors", (tensors, {}))
        assert "layers.0.attention.to_q: it is a BOFT adapter" in inspect(path, NAMES).sentence
    beside = lycoris_oft().tensors | {"lycoris_context_refiner_0_attention_to_q.oft_blocks": blocks}
    verdict = inspect(save(tmp_path / "b.safetensors", (beside, {})), NAMES)
    assert verdict.matched == len(SHAPES) and "BOFT" in str(verdict.left_out[0])
