"""Habits of trainers that change what a file means are followed; what changes nothing condemns no file.

References: PEFT's LoHa and LoKr layers (scaling = alpha / r of the configuration), OneTrainer's OFT (angles
divided by 2 sqrt(b - 1)), LyCORIS's LoKr (no alpha where both factors are full).
"""

import json
from collections.abc import Callable
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
    neumann,
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


def eye(q: Tensor) -> Tensor:
    return torch.eye(len(q))


# What PEFT's configuration says of an OFT: (its keys, Q -> R, the limit of each Q)
OFTS: dict[str, tuple[dict, Callable[[Tensor], Tensor], float]] = {
    "nothing": ({}, neumann, 0),
    "0 terms": ({"num_cayley_neumann_terms": 0}, eye, 0),
    "1 term": ({"num_cayley_neumann_terms": 1}, eye, 0),
    "2 terms": ({"num_cayley_neumann_terms": 2}, lambda q: eye(q) + 2 * q, 0),
    "3 terms": ({"num_cayley_neumann_terms": 3}, lambda q: eye(q) + 2 * q + 2 * q @ q + q @ q @ q, 0),
    "4 terms": ({"num_cayley_neumann_terms": 4}, lambda q: eye(q) + 2 * q + 2 * q @ q + q @ q @ q, 0),
    "6 terms": ({"num_cayley_neumann_terms": 6},
                lambda q: neumann(q) + q.matrix_power(4) + q.matrix_power(5), 0),
    "inverse": ({"use_cayley_neumann": False}, lambda q: (eye(q) - q) @ torch.inverse(eye(q) + q), 0),
    "constrained": ({"coft": True, "eps": 0.7}, neumann, 0.7),
    "constrained as usual": ({"coft": True}, neumann, 6e-5),
    "an eps without effect": ({"coft": False, "eps": 0.7}, neumann, 0),
}  # fmt: skip


@pytest.mark.parametrize("case", OFTS)
def test_an_oft_follows_pefts_configuration(case: str, tmp_path: Path) -> None:
    config, rotate, limit = OFTS[case]
    other = peft_oft(rotate=rotate, prefix="base_model.model.", limit=limit)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "OFT", "r": 0, **config}))
    path, base = save(tmp_path / "adapter_model.safetensors", (other.tensors, {})), weights()
    for name, delta in changes(read(path, NAMES), base).items():
        torch.testing.assert_close(delta, other.change[name](base[name]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "config",
    [{"num_cayley_neumann_terms": 101}, {"num_cayley_neumann_terms": "x"}, {"coft": True, "eps": -1}],
    ids=str,
)
def test_an_oft_that_cannot_be_computed_is_told(config: dict, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "OFT", **config}))
    tensors = peft_oft(prefix="base_model.model.").tensors
    sentence = inspect(save(tmp_path / "adapter_model.safetensors", (tensors, {})), NAMES).sentence
    assert "; expected a" in sentence and "adapter_config.json has " in sentence


BUTTERFLIES = {
    "three dimensions": ({"boft_R": (2, 8, 8)}, "expected stages of square blocks"),
    "no squares": ({"oft_blocks": (2, 12, 8, 4)}, "expected stages of square blocks"),
    "no size": ({"oft_blocks": (2, 12, 0, 0)}, "expected stages of square blocks"),
    "four stages of 12 blocks": ({"oft_blocks": (4, 12, 8, 8)}, "reach over more than all blocks"),
    "odd blocks": ({"boft_R": (2, 32, 3, 3)}, "reach over more than all blocks"),
    "a rescale of another size": ({"oft_blocks": (2, 12, 8, 8), "rescale": (8, 1)}, "and a rescale of"),
    "without its scale": ({"boft_R": (2, 12, 8, 8), "boft_s": None}, "without the factor boft_s"),
    "of other inputs": ({"boft_R": (2, 24, 8, 8)}, "it is made for 96 x 192 weights"),
}


@pytest.mark.parametrize("case", BUTTERFLIES)
def test_a_butterfly_of_another_form_is_refused(case: str, tmp_path: Path) -> None:
    shapes, words = BUTTERFLIES[case]
    if "boft_R" in shapes:
        shapes = {"boft_s": (DIM, 1)} | shapes
    tensors = {
        f"layers.0.attention.to_q.{name}": torch.zeros(shape) for name, shape in shapes.items() if shape
    }
    sentence = inspect(save(tmp_path / "a.safetensors", (tensors, {})), NAMES).sentence
    assert words in sentence and "layers.0.attention.to_q" in sentence


def test_a_butterfly_of_stacked_layers_is_cut_where_it_can_be(tmp_path: Path) -> None:
    """Stages that stay within one of the layers; the others cannot be told apart."""
    g = torch.Generator().manual_seed(3)
    base, layers = weights(), [f"layers.0.attention.{name}" for name in ("to_q", "to_k", "to_v")]
    for stages in (2, 3):
        blocks = torch.randn(stages, 3 * DIM // 24, 24, 24, generator=g) * 0.2
        tensors = {"lycoris_layers_0_attention_qkv.oft_blocks": blocks}
        path = save(tmp_path / f"{stages}.safetensors", (tensors, {}))
        assert inspect(path, NAMES).matched == 1
        alone = {
            f"lycoris_layers_0_attention_{name}.oft_blocks": part
            for name, part in zip(("to_q", "to_k", "to_v"), blocks.chunk(3, dim=1), strict=True)
        }
        split = read(save(tmp_path / "split.safetensors", (alone, {})), NAMES)
        assert distance(changes(read(path, NAMES), base), changes(split, base)) < 1e-6
        assert set(split.adapters) == set(layers)
    tensors = {"lycoris_layers_0_attention_qkv.oft_blocks": torch.zeros(2, 4, 72, 72)}
    sentence = inspect(save(tmp_path / "over.safetensors", (tensors, {})), NAMES).sentence
    assert "the blocks of its BOFT reach over the layers that were stacked" in sentence
