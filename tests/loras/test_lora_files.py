"""Every flavour of LoRA file gives the same change of the weights; whatever is wrong is told by name."""

import json
import pickle
import random
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from models.z_image.checkpoints.lora_names import model_names, module_shapes
from models.z_image.transformer_z_image import ZImageConfig, ZImageTransformer2DModel
from shared.errors import UserError
from shared.loras import adapters as kinds
from shared.loras import parser
from shared.loras.inspection import inspect
from shared.loras.names import Alias, ModelNames
from shared.loras.reader import read
from tests.support.lora_deltas import FAMILIES, NAMES, changes, distance, one, weights
from tests.support.lora_writers import (
    ALPHA,
    CONFIG,
    DIM,
    EVERYWHERE,
    OTHERS,
    RANK,
    SHAPES,
    WRITERS,
    Style,
    deltas,
    dora,
    factors,
    loha,
    lokr,
    original,
    save,
    underscored,
    unscaled,
)

FULL_CONFIG = json.loads(Path("models/z_image/configs/transformer.json").read_text())


@pytest.mark.parametrize("flavour", WRITERS)
def test_every_flavour_gives_the_same_deltas(flavour: str, tmp_path: Path) -> None:
    write, trainer = WRITERS[flavour]
    given = factors()
    path = save(tmp_path / "a.safetensors", write(given))
    verdict = inspect(path, NAMES)
    assert verdict.refused is None
    assert verdict.flavour == trainer
    assert distance(changes(read(path, NAMES), weights()), deltas(given)) < (
        8e-3 if flavour == "bf16" else 1e-6
    )
    if flavour != "Anime-Z":
        assert verdict.matched == verdict.total and not verdict.left_out


@pytest.mark.parametrize("flavour", ["ai-toolkit", "musubi", "OneTrainer legacy", "VideoX-Fun", "bare PEFT"])
def test_modules_outside_the_layers_are_found(flavour: str, tmp_path: Path) -> None:
    given = factors(EVERYWHERE)
    path = save(tmp_path / "a.safetensors", WRITERS[flavour][0](given))
    assert distance(changes(read(path, NAMES), weights()), deltas(given)) < 1e-6


def test_original_names_of_embedders_and_final_layer(tmp_path: Path) -> None:
    given = factors(EVERYWHERE)
    renamed = {original(name): factor for name, factor in given.items()}
    for i, style in enumerate((Style("diffusion_model."), Style("lora_unet_", spell=underscored))):
        path = save(tmp_path / f"{i}.safetensors", style(renamed))
        assert distance(changes(read(path, NAMES), weights()), deltas(given)) < 1e-6


@pytest.mark.parametrize("flavour", OTHERS)
def test_other_algorithms_give_their_formula(flavour: str, tmp_path: Path) -> None:
    make, algorithm = OTHERS[flavour]
    other, base = make(), weights()
    path = save(tmp_path / "a.sft", (other.tensors, other.metadata))
    assert inspect(path, NAMES).algorithms == (algorithm,)
    expected = {name: change(base[name]) for name, change in other.change.items()}
    assert distance(changes(read(path, NAMES), base), expected) < 1e-5


def test_the_comparison_catches_what_readers_get_wrong(tmp_path: Path) -> None:
    """Wrong alpha, q and k swapped, w1 and w3 swapped, a dropped magnitude: each must be far off."""
    given, base = factors(), weights()
    path = save(tmp_path / "a.safetensors", WRITERS["musubi, converted for ComfyUI"][0](given))
    right = changes(read(path, NAMES), base)
    for table in ({"to_q": "to_k", "to_k": "to_q"}, {"w1": "w3", "w3": "w1"}):
        wrong = {
            name: right[
                name.rpartition(".")[0] + "." + table.get(name.rpartition(".")[2], name.rpartition(".")[2])
            ]
            for name in right
        }
        assert distance(wrong, deltas(given)) > 0.5
    wrong_alpha = {name: (a, b, ALPHA * 3) for name, (a, b, _) in given.items()}
    assert distance(right, deltas(wrong_alpha)) > 0.5
    other = dora()
    path = save(tmp_path / "b.safetensors", (other.tensors, {}))
    expected = {name: change(base[name]) for name, change in other.change.items()}
    dropped = {
        name: one.inner.delta()
        for name, (one,) in read(path, NAMES).adapters.items()
        if isinstance(one, kinds.Dora)
    }
    assert distance(dropped, expected) > 0.5


@pytest.mark.parametrize("swapped", [("to_k", "to_q", "to_v"), ("to_q", "to_v", "to_k")])
def test_a_table_with_swapped_rows_is_caught(swapped: tuple[str, str, str], tmp_path: Path) -> None:
    aliases = (
        Alias("attention.qkv", tuple(f"attention.{name}" for name in swapped)),
        Alias("attention.out", ("attention.to_out.0",)),
    )
    names = ModelNames.of(module_shapes(CONFIG), aliases, "Z-Image")
    given = factors()
    path = save(tmp_path / "a.safetensors", WRITERS["ComfyUI, A and B"][0](given))
    assert distance(changes(read(path, names), weights()), deltas(given)) > 0.5


def test_swapped_feed_forward_halves_are_caught(tmp_path: Path) -> None:
    aliases = (
        Alias("attention.to_qkv", ("attention.to_q", "attention.to_k", "attention.to_v")),
        Alias("feed_forward.net.0.proj", ("feed_forward.w1", "feed_forward.w3")),
        Alias("feed_forward.net.2", ("feed_forward.w2",)),
    )
    names = ModelNames.of(module_shapes(CONFIG), aliases, "Z-Image")
    path = save(tmp_path / "a.safetensors", WRITERS["Nunchaku"][0](factors()))
    assert distance(changes(read(path, names), weights()), deltas(factors())) > 0.5


# ---------------------------------------------------------------- names


def test_the_table_of_shapes_is_the_models() -> None:
    for config, second in ((FULL_CONFIG, True), (CONFIG, False)):
        with torch.device("meta"):
            model = ZImageTransformer2DModel(ZImageConfig.from_dict(config), second_time_embedder=second)
        real = {n[:-7]: tuple(p.shape) for n, p in model.named_parameters() if n.endswith(".weight")}
        assert module_shapes(config, second) == real


def test_no_two_names_of_the_real_model_collide() -> None:
    names = model_names(FULL_CONFIG, second_time_embedder=True)  # raises if they do
    assert len(names.targets) > len(names.shapes)


def test_names_that_collide_are_refused() -> None:
    with pytest.raises(ValueError, match="a.b.*a_b"):
        ModelNames.of({"a.b": (2, 2), "a_b": (2, 2)})


# ---------------------------------------------------------------- fused layers of the other algorithms


def test_fused_dora_loha_lokr_and_oft_are_cut_by_rows(tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(5)
    rows, base = 3 * DIM, weights()
    stacked = torch.cat([base[f"layers.0.attention.{name}"] for name in ("to_q", "to_k", "to_v")])
    a, b, m = (
        torch.randn(4, DIM, generator=g),
        torch.randn(rows, 4, generator=g),
        torch.rand(rows, 1, generator=g) + 0.5,
    )
    v = stacked + b @ a
    w1, w2, odd1, odd2 = (
        torch.randn(*shape, generator=g)
        for shape in ((6, 4), (rows // 6, DIM // 4), (2, 4), (rows // 2, DIM // 4))
    )
    hada = [torch.randn(*shape, generator=g) for shape in ((rows, 3), (3, DIM), (rows, 3), (3, DIM))]
    blocks = torch.randn(rows // 8, 8, 8, generator=g) * 0.2
    q = blocks - blocks.transpose(1, 2)
    r = torch.block_diag(*(((torch.eye(8) + one) @ torch.inverse(torch.eye(8) - one)).T for one in q))
    cases = [
        (
            {"lora_A.weight": a, "lora_B.weight": b, "dora_scale": m},
            m * v / v.norm(dim=1, keepdim=True) - stacked,
        ),
        ({"lokr_w1": w1, "lokr_w2": w2}, torch.kron(w1, w2)),
        ({"lokr_w1": odd1, "lokr_w2": odd2}, torch.kron(odd1, odd2)),
        (
            dict(zip(("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"), hada, strict=True)),
            (hada[0] @ hada[1]) * (hada[2] @ hada[3]),
        ),
        ({"diff": v}, v),
        ({"oft_blocks": blocks}, r @ stacked - stacked),
    ]
    for i, (tensors, expected) in enumerate(cases):
        content = {f"diffusion_model.layers.0.attention.qkv.{key}": value for key, value in tensors.items()}
        found = changes(read(save(tmp_path / f"{i}.safetensors", (content, {})), NAMES), base)
        ours = torch.cat([found[f"layers.0.attention.{name}"] for name in ("to_q", "to_k", "to_v")])
        assert (ours - expected).norm() < 1e-5 * expected.norm(), tensors.keys()


def test_a_stacked_file_loses_the_ranks_of_other_modules(tmp_path: Path) -> None:
    """The block-diagonal file of a converter has 3 r ranks, of which r reach each module."""
    path = save(tmp_path / "a.safetensors", WRITERS["ComfyUI, A and B"][0](factors()))
    (one,) = read(path, NAMES).adapters["layers.0.attention.to_k"]
    assert isinstance(one, kinds.LowRank) and len(one.down) == RANK


def test_factors_of_1_x_1_convolutions_are_matrices(tmp_path: Path) -> None:
    tensors = {
        key: tensor[..., None, None] if tensor.ndim == 2 else tensor
        for key, tensor in WRITERS["musubi"][0](factors())[0].items()
    }
    path = save(tmp_path / "a.safetensors", (tensors, {}))
    assert distance(changes(read(path, NAMES), weights()), deltas(factors())) < 1e-6


def test_a_part_of_a_fused_layer_that_is_zero_stays_a_lora(tmp_path: Path) -> None:
    a, b = torch.ones(2, DIM), torch.zeros(3 * DIM, 2)
    b[:DIM] = 1
    tensors = {f"layers.0.attention.qkv.lora_{name}.weight": t for name, t in (("A", a), ("B", b))}
    found = read(save(tmp_path / "a.safetensors", (tensors, {})), NAMES).adapters
    (one,) = found["layers.0.attention.to_k"]
    assert isinstance(one, kinds.LowRank) and len(one.down) == 2 and not one.delta().any()


def test_where_fused_and_split_disagree_the_split_ones_count_once(tmp_path: Path) -> None:
    given = factors()
    content, _ = WRITERS["Anime-Z"][0](given)
    content["lora_unet_layers_0_attention_qkv.lora_up.weight"] *= 5
    content["lora_unet_layers_0_attention_out.lora_up.weight"] *= 5
    path = save(tmp_path / "a.safetensors", (content, {}))
    assert distance(changes(read(path, NAMES), weights()), deltas(given)) < 1e-6
    verdict = inspect(path, NAMES)
    assert "own names" in str(verdict.left_out[0]) and len(verdict.left_out[0].names) == 4


# ---------------------------------------------------------------- scales


def test_alpha_is_read_in_every_dtype(tmp_path: Path) -> None:
    for i, dtype in enumerate(
        (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32)
    ):
        tensors = unscaled("diffusion_model.")(factors())
        tensors |= {f"diffusion_model.{name}.alpha": torch.tensor([2], dtype=dtype) for name in SHAPES}
        path = save(tmp_path / f"{i}.safetensors", (tensors, {}))
        assert distance(changes(read(path, NAMES), weights()), deltas(factors())) < 1e-6
        assert inspect(path, NAMES).alphas == (2.0,)


def test_without_an_alpha_the_scale_is_one_whatever_kohyas_metadata_says(tmp_path: Path) -> None:
    path = save(tmp_path / "a.safetensors", (unscaled("")(factors()), {"ss_network_alpha": "1"}))
    assert distance(changes(read(path, NAMES), weights()), deltas(factors(alpha=RANK))) < 1e-6


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({"r": RANK, "lora_alpha": 10}, 10 / RANK),
        ({"r": RANK, "lora_alpha": 10, "use_rslora": True}, 10 / RANK**0.5),
        ({"r": 77, "rank_pattern": {"to_q": RANK}, "lora_alpha": 10}, 10 / RANK),
        ({}, 1.0),
    ],
)
def test_adapter_config_beside_raw_peft_files(config: dict, scale: float, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    raw = save(tmp_path / "adapter_model.safetensors", (unscaled("base_model.model.")(factors()), {}))
    expected = deltas(factors(alpha=scale * RANK))
    assert distance(changes(read(raw, NAMES), weights()), expected) < 1e-6
    other = save(tmp_path / "other.safetensors", (unscaled("transformer.")(factors()), {}))
    assert distance(changes(read(other, NAMES), weights()), deltas(factors(alpha=RANK))) < 1e-6


def test_alpha_patterns_are_per_module(tmp_path: Path) -> None:
    config = {"r": RANK, "lora_alpha": RANK, "alpha_pattern": {r"^layers\.0\.attention\.to_q": 12, "w2": 8}}
    metadata = {"lora_adapter_metadata": json.dumps({f"transformer.{k}": v for k, v in config.items()})}
    path = save(tmp_path / "a.safetensors", (unscaled("transformer.")(factors()), metadata))
    special = {
        "layers.0.attention.to_q": 12.0,
        "layers.0.feed_forward.w2": 8.0,
        "layers.1.feed_forward.w2": 8.0,
    }
    given = {name: (a, b, special.get(name, float(RANK))) for name, (a, b, _) in factors().items()}
    assert distance(changes(read(path, NAMES), weights()), deltas(given)) < 1e-6


def test_damaged_peft_configuration_is_told(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{")
    path = save(tmp_path / "adapter_model.safetensors", (unscaled("base_model.model.")(factors()), {}))
    assert "adapter_config.json is not valid JSON" in inspect(path, NAMES).sentence
    path = save(tmp_path / "b.safetensors", (unscaled("")(factors()), {"lora_adapter_metadata": "[1]"}))
    assert "lora_adapter_metadata of b.safetensors is not a JSON object" in inspect(path, NAMES).sentence


# ---------------------------------------------------------------- the verdict


def test_the_sentence(tmp_path: Path) -> None:
    given = factors(alpha=8, rank=16)
    path = save(tmp_path / "a.safetensors", WRITERS["musubi"][0](given))
    assert inspect(path, NAMES).sentence == "14 of 14 modules, kohya, rank 16, alpha 8"
    path = save(
        tmp_path / "b.safetensors",
        WRITERS["diffusers"][0](given | factors({"layers.1.attention.to_q": (DIM, DIM)}, 2)),
    )
    assert inspect(path, NAMES).sentence == "14 of 14 modules, diffusers, rank 2 to 16"
    other = dora("out", "magnitude", "diffusion_model.", False)
    path = save(tmp_path / "c.safetensors", (other.tensors, {}))
    assert inspect(path, NAMES).sentence == "14 of 14 modules, ai-toolkit, DoRA, rank 4"
    path = save(tmp_path / "d.safetensors", (lokr().tensors, {}))
    assert inspect(path, NAMES).sentence == "14 of 14 modules, LyCORIS, LoKr"


def test_metadata_tells_base_model_and_trigger_words(tmp_path: Path) -> None:
    metadata = {
        "ss_base_model_version": "zimage",
        "ss_tag_frequency": json.dumps({"a": {"cat": 3, "zgp man": 9}}),
    }
    path = save(tmp_path / "a.safetensors", (unscaled("")(factors()), metadata))
    verdict = inspect(path, NAMES)
    assert verdict.base_model == "zimage" and verdict.trigger_words == ("zgp man", "cat")
    for text in ("not JSON", "[1]", '{"a": 1}', '{"a": {"b": null}}'):
        path = save(tmp_path / "b.safetensors", (unscaled("")(factors()), {"ss_tag_frequency": text}))
        assert inspect(path, NAMES).trigger_words == ()


def test_what_is_not_used_is_left_out_by_name(tmp_path: Path) -> None:
    content = Style("diffusion_model.")(factors())[0]
    content["lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight"] = torch.ones(2, 3)
    content["diffusion_model.layers.9.attention.to_q.lora_A.weight"] = torch.ones(2, 3)
    content["diffusion_model.layers.0.attention_norm1.set_weight"] = torch.ones(DIM)
    content["diffusion_model.context_refiner.0.attention.to_q.lora_A.weight"] = torch.ones(2, 7)
    content["diffusion_model.context_refiner.0.attention.to_q.lora_B.weight"] = torch.ones(9, 2)
    content["diffusion_model.context_refiner.0.attention.to_k.lora_A.weight"] = torch.ones(2, DIM)
    content["diffusion_model.context_refiner.0.attention.to_k.lora_B.weight"] = torch.ones(DIM, 2)
    content["diffusion_model.context_refiner.0.attention.to_k.alpha"] = torch.tensor(0.0)
    content["who.knows"] = torch.ones(1)
    path = save(tmp_path / "a.safetensors", (content, {}))
    verdict = inspect(path, NAMES)
    assert (verdict.matched, verdict.total) == (14, 20)
    said = "\n".join(map(str, verdict.left_out))
    for words in (
        "encoder_layers_0_mlp_fc1: it belongs to a text encoder",
        "layers.9.attention.to_q: Z-Image has no such layer",
        "layers.0.attention_norm1: it replaces the weight",
        "context_refiner.0.attention.to_q: it is made for 9 x 7 weights, the model's are 96 x 96",
        "context_refiner.0.attention.to_k: its alpha is 0",
        "who.knows: no known kind of LoRA",
    ):
        assert words in said
    assert distance(changes(read(path, NAMES), weights()), deltas(factors())) < 1e-6


A, B, M = torch.ones(4, DIM), torch.ones(DIM, 4), torch.ones(DIM)
DAMAGED: dict[str, tuple[dict[str, Tensor], str]] = {
    "no B": (one(lora_A__weight=A), "layers.1.attention.to_q has .*lora_A without the factor up"),
    "no A": (one(lora_B__weight=B), "layers.1.attention.to_q has .*lora_B without the factor down"),
    "ranks": (
        one(lora_A__weight=A, lora_B__weight=torch.ones(DIM, 3)),
        "to_q has factors of different ranks: .* of 3, .* of 4",
    ),
    "rank 0": (one(lora_A__weight=torch.ones(0, DIM), lora_B__weight=torch.ones(DIM, 0)), "to_q has rank 0"),
    "vector": (
        one(lora_A__weight=M, lora_B__weight=B),
        "to_q has factors of shapes .* expected two matrices",
    ),
    "two spellings": (
        one(lora_A__weight=A, lora_B__weight=B, lora_down__weight=A),
        "to_q has the same factor twice, as .*lora_A.weight and as .*lora_down.weight",
    ),
    "two algorithms": (
        one(lora_A__weight=A, lora_B__weight=B, lokr_w1=A),
        "to_q mixes the factors of LoRA and LoKr",
    ),
    "both w1": (
        one(lokr_w1=A, lokr_w1_a=A, lokr_w1_b=A, lokr_w2=A),
        "of which only some can be meant",
    ),
    "long alpha": (one(lora_A__weight=A, lora_B__weight=B, alpha=M), r"to_q has an alpha of F32 \[96\]"),
    "NaN alpha": (
        one(lora_A__weight=A, lora_B__weight=B, alpha=torch.tensor(float("nan"))),
        "to_q has the alpha nan",
    ),
    "integers": (one(lora_A__weight=A.int(), lora_B__weight=B), "to_q stores .* as I32"),
    "magnitude alone": (one(dora_scale=M), "a DoRA's magnitude without its factors"),
    "short magnitude": (
        one(lora_A__weight=A, lora_B__weight=B, dora_scale=M[:5]),
        r"magnitudes of shape \[5\]",
    ),
    "OFT": (one(oft_R__weight=torch.ones(12, 5)), "to_q has oft_R of shape"),
    "bias": (one(lora_A__weight=A, lora_B__weight=B, diff_b=M[:5]), "to_q has diff_b of shape"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_modules_are_named(case: str, tmp_path: Path) -> None:
    tensors, reason = DAMAGED[case]
    path = save(tmp_path / "a.safetensors", (tensors, {}))
    verdict = inspect(path, NAMES)
    assert not verdict.usable
    with pytest.raises(UserError, match=f"^a.safetensors is damaged: .*{reason}.*\\.$") as error:
        read(path, NAMES)
    assert verdict.sentence == str(error.value)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_factors_that_are_no_numbers_are_refused_on_reading(bad: float, tmp_path: Path) -> None:
    spoilt = A.clone()
    spoilt[1, 2] = bad
    path = save(tmp_path / "a.safetensors", (one(lora_A__weight=spoilt, lora_B__weight=B), {}))
    assert inspect(path, NAMES).usable  # the header cannot tell
    with pytest.raises(
        UserError, match="layers.1.attention.to_q.lora_A.weight has values that are not numbers"
    ):
        read(path, NAMES)


def test_alpha_0_everywhere_refuses_the_file(tmp_path: Path) -> None:
    path = save(tmp_path / "a.safetensors", WRITERS["musubi"][0](factors(alpha=0)))
    assert "its alpha is 0, so it does nothing" in inspect(path, NAMES).sentence


@pytest.mark.parametrize("family", FAMILIES)
def test_other_families_are_named(family: str, tmp_path: Path) -> None:
    path = save(tmp_path / "a.safetensors", (FAMILIES[family], {}))
    assert f"is made for {family.split(' (')[0]}: it does not fit Z-Image" in inspect(path, NAMES).sentence


def test_a_relative_with_the_same_names_is_told_by_its_shapes(tmp_path: Path) -> None:
    given = factors({"layers.0.attention.qkv": (3 * 64, 64), "layers.0.feed_forward.w1": (170, 64)})
    path = save(tmp_path / "a.safetensors", Style("diffusion_model.")(given))
    assert "made for 192 x 64 weights, the model's are 288 x 96" in inspect(path, NAMES).sentence


NOT_LORAS: dict[str, tuple[Callable[[Path], object], str]] = {
    "text encoder": (
        lambda p: save_file({"lora_te_text_model_encoder_layers_0.lora_down.weight": torch.ones(2, 3)}, p),
        "changes only a text encoder",
    ),
    "whole model": (
        lambda p: save_file({"layers.0.attention.to_q.weight": torch.ones(2, 3)}, p),
        "is no LoRA: .* whole model",
    ),
    "no match": (lambda p: save_file({"foo.lora_A.weight": torch.ones(2, 3)}, p), "has no layer such as foo"),
    "empty": (lambda p: save_file({}, p), "is empty"),
    "nothing": (lambda p: p.write_bytes(b""), "too short"),
    "pickle": (lambda p: p.write_bytes(pickle.dumps({"a": 1})), "is a Python pickle"),
    "torch file": (lambda p: torch.save({"a": A}, p), "is a pickle or zip archive"),
    "web page": (
        lambda p: p.write_text("\n<!DOCTYPE html><html><body>Log in</body></html>"),
        "is a web page",
    ),
    "JSON": (lambda p: p.write_text('{"error": "unauthorized"}'), "is JSON text"),
    "LFS": (lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\noid"), "Git LFS"),
    "2 GB header": (lambda p: p.write_bytes(struct.pack("<Q", 2**31) + b"{}"), "does not begin like"),
    "cut off": (lambda p: (save_file({"a": A}, p), p.write_bytes(p.read_bytes()[:-5])), "its header says"),
    "text for a header": (
        lambda p: p.write_bytes(struct.pack("<Q", 4) + b"spam"),
        "header that cannot be read",
    ),
}


@pytest.mark.parametrize("case", NOT_LORAS)
def test_files_that_are_no_loras_are_refused_with_the_nearest_reason(case: str, tmp_path: Path) -> None:
    write, reason = NOT_LORAS[case]
    path = tmp_path / "a.safetensors"
    write(path)
    with pytest.raises(UserError, match=f"^a.safetensors .*{reason}"):
        read(path, NAMES)
    assert inspect(path, NAMES).refused


def test_other_file_types_and_missing_files(tmp_path: Path) -> None:
    (tmp_path / "a.ckpt").write_bytes(b"x")
    assert "a.ckpt is not a .safetensors or .sft file" in inspect(tmp_path / "a.ckpt", NAMES).sentence
    assert "b.safetensors cannot be read" in inspect(tmp_path / "b.safetensors", NAMES).sentence


class Counted:
    """A file that adds up what is read from it."""

    total = 0

    def __init__(self, file: BinaryIO) -> None:
        self.file = file

    def __enter__(self) -> "Counted":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def seek(self, place: int) -> int:
        return self.file.seek(place)

    def read(self, size: int) -> bytes:
        data = self.file.read(size)
        Counted.total += len(data)
        return data


def test_inspect_reads_the_header_and_the_alphas_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(tmp_path / "a.safetensors", WRITERS["musubi"][0](factors(rank=16)))
    (header,) = struct.unpack("<Q", path.read_bytes()[:8])
    real_open = Path.open
    monkeypatch.setattr(Path, "open", lambda self, mode: Counted(real_open(self, mode, buffering=0)))  # type: ignore[arg-type]
    verdict = inspect(path, NAMES)
    assert verdict.alphas == (ALPHA,)
    assert 0 < Counted.total == 8 + header + 4 * len(SHAPES)  # 4 bytes for each alpha
    assert path.stat().st_size > 10 * header


def test_nothing_of_torch_is_imported_to_judge_a_file() -> None:
    code = (
        "import sys, shared.loras.inspection, shared.loras.strengths, shared.loras.presets,"
        "shared.loras.library, models.z_image.checkpoints.lora_names;"
        "assert not {'torch', 'numpy', 'safetensors'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(parser.__file__).parents[2])


def test_norm_and_bias_differences(tmp_path: Path) -> None:
    tensors = {
        "diffusion_model.layers.0.attention.norm_q.diff": torch.ones(32),
        "diffusion_model.layers.0.attention.k_norm.w_norm": torch.ones(32) * 2,
        "diffusion_model.layers.0.ffn_norm1.diff": torch.ones(DIM) * 3,
        "diffusion_model.layers.0.adaLN_modulation.0.diff_b": torch.ones(4 * DIM) * 4,
    }
    found = read(save(tmp_path / "a.safetensors", (tensors, {})), NAMES).adapters
    assert isinstance(found["layers.0.attention.norm_q"][0], kinds.NormDiff)
    assert found["layers.0.attention.norm_k"][0].value[0] == 2
    assert isinstance(found["layers.0.adaLN_modulation.0"][0], kinds.DiffBias)
    bad = {"layers.0.ffn_norm1.diff": torch.ones(DIM), "layers.0.ffn_norm2.b_norm": torch.ones(DIM)}
    verdict = inspect(save(tmp_path / "b.safetensors", (bad, {})), NAMES)
    assert verdict.matched == 1 and "this norm has none" in str(verdict.left_out[0])


def test_loha_as_a_lora_is_exact_and_so_is_a_low_rank_lokr(tmp_path: Path) -> None:
    for i, other in enumerate((loha(), lokr(True))):
        path = save(tmp_path / f"{i}.safetensors", (other.tensors, {}))
        found = {
            name: one.low_rank().delta()  # type: ignore[union-attr]
            for name, (one,) in read(path, NAMES).adapters.items()
        }
        assert distance(found, {name: change(A) for name, change in other.change.items()}) < 1e-6


def test_no_file_whatever_ends_in_anything_but_an_answer(tmp_path: Path) -> None:
    """Random factors of random shapes: refused in a sentence, or read into changes of the right shapes."""
    rng, base, usable = random.Random(0), weights(), 0
    spellings = sorted(parser.FACTOR)
    stems = ["layers.0.attention.to_q", "layers.0.attention.qkv", "layers.0.attention_norm1", "nothing"]
    sizes = [0, 1, 2, 4, 8, 12, 24, 28, 32, DIM, 3 * DIM]
    for case in range(600):
        tensors = {}
        stem, count = rng.choice(stems), rng.choice((1, 2, 2, 3, 4))
        forms = [form for forms in parser.ALGORITHMS.values() for form in forms]
        wanted = list(rng.choice(forms)) if case % 2 else []
        chosen = [parser.SPELLINGS[name][0] for name in wanted] + rng.choices(
            spellings, k=(count - 1) * (case % 8 != 1)
        )
        rank = rng.choice((1, 2, 4))
        for spelling in chosen:
            shape = [rng.choice(sizes) for _ in range(rng.choice((0, 1, 2, 2, 2, 3)))]
            if case % 4 == 1:  # near misses: mostly right
                shape = {
                    "down": [rank, DIM],
                    "up": [DIM, rank],
                    "lokr_w1": [4, 4],
                    "lokr_w2": [24, 24],
                    "oft_blocks": [12, 8, 8],
                    "oft_R": [12, 28],
                    "diff": [DIM, DIM],
                }.get(parser.FACTOR[spelling], [DIM] if "norm" in spelling or "magn" in spelling else shape)
            tensors[f"{stem}{spelling}"] = torch.rand(shape)
        path = save(tmp_path / f"{case}.safetensors", (tensors, {}))
        verdict = inspect(path, NAMES)
        try:
            found = read(path, NAMES).adapters
        except UserError as error:
            assert str(error) == verdict.refused and str(error).endswith(".")
            continue
        assert verdict.usable and found
        usable += 1
        for name, adapters in found.items():
            for adapter in adapters:
                value = adapter.delta(base[name]) if hasattr(adapter, "delta") else adapter.value
                assert value.shape == NAMES.shapes[name][: value.ndim]
    assert usable > 10
