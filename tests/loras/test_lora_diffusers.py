"""--convert-lora's files read by diffusers itself: the same change of every weight.

Where peft is installed, its pipeline's loader puts them into a transformer of its own; elsewhere its
converters of state dicts read them, and PEFT's formulas follow.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from models.z_image.checkpoints.lora_names import model_names
from shared.loras.convert import convert
from tests.support.lora_deltas import distance, weights
from tests.support.lora_writers import CONFIG, OTHERS, SHAPES, WRITERS, Other, deltas, factors, save

NAMES = model_names(CONFIG)
HAS_PEFT = importlib.util.find_spec("peft") is not None
PLAIN = ["musubi", "OneTrainer legacy", "DiffSynth", "ComfyUI, A and B", "Anime-Z", "mixed", "bf16"]
OTHER = ["LoHa, musubi", "DoRA, PEFT", "DoRA, LyCORIS"]
SIDES = {96: (8, 12), 256: (16, 16)}  # as LyCORIS and PEFT cut a LoKr: the most even two factors


def lokr(low_rank: bool) -> Other:
    """A LoKr as trainers write it; diffusers loads none that is cut otherwise."""
    g = torch.Generator().manual_seed(5)
    tensors: dict[str, Tensor] = {}
    change: dict[str, Callable[[Tensor], Tensor]] = {}
    for name, (rows, columns) in SHAPES.items():
        (out1, out2), (in1, in2) = SIDES[rows], SIDES[columns]
        w1, a, b = (torch.randn(*s, generator=g) * 0.3 for s in ((out1, in1), (out2, 3), (3, in2)))
        stem = f"lycoris_{name.replace('.', '_')}."
        tensors |= {f"{stem}lokr_w1": w1, f"{stem}alpha": torch.tensor(6.0)}
        tensors |= {f"{stem}lokr_w2_a": a, f"{stem}lokr_w2_b": b} if low_rank else {f"{stem}lokr_w2": a @ b}
        delta = torch.kron(w1, a @ b) * (2.0 if low_rank else 1.0)
        change[name] = lambda w, delta=delta: delta
    return Other(tensors, change)


LOKRS = {"LoKr": lambda: lokr(False), "LoKr, low rank": lambda: lokr(True)}
KINDS = [*PLAIN, *OTHER, *LOKRS]


def changed(state: dict[str, Tensor], base: dict[str, Tensor]) -> dict[str, Tensor]:
    """What PEFT makes of diffusers' keys: W' - W by module."""
    found: dict[str, Tensor] = {}
    for name in SHAPES:
        stem = f"transformer.{name}."
        if f"{stem}lora_A.weight" in state:
            delta = state[f"{stem}lora_B.weight"].float() @ state[f"{stem}lora_A.weight"].float()
            magnitude = state.get(f"{stem}lora_magnitude_vector")
            if magnitude is not None:
                v = base[name] + delta
                delta = magnitude.float()[:, None] * v / v.norm(dim=1, keepdim=True) - base[name]
            found[name] = delta
        elif f"{stem}lokr_w1" in state:
            w2 = state.get(f"{stem}lokr_w2")
            w2 = state[f"{stem}lokr_w2_a"] @ state[f"{stem}lokr_w2_b"] if w2 is None else w2
            found[name] = torch.kron(state[f"{stem}lokr_w1"].contiguous(), w2)
    return found


def written(kind: str, folder: Path) -> tuple[Path, dict[str, Callable[[Tensor], Tensor]]]:
    """The converted file, and what it has to do to each weight."""
    source, out = folder / "source.safetensors", folder / "out.safetensors"
    if kind in WRITERS:
        given = factors()
        save(source, WRITERS[kind][0](given))
        wanted = {name: (lambda w, d=d: d) for name, d in deltas(given).items()}
    else:
        other = LOKRS[kind]() if kind in LOKRS else OTHERS[kind][0]()
        save(source, (other.tensors, other.metadata))
        wanted = other.change
    convert(source, out, NAMES)
    return out, wanted


def tolerance(kind: str) -> float:
    return 0.02 if kind == "bf16" else 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_diffusers_converters_read_the_same_change(kind: str, tmp_path: Path) -> None:
    from diffusers.loaders import ZImageLoraLoaderMixin

    path, wanted = written(kind, tmp_path)
    found = ZImageLoraLoaderMixin.lora_state_dict(load_file(path))
    state = found[0] if isinstance(found, tuple) else found
    base = weights()
    assert distance(changed(state, base), {n: f(base[n]) for n, f in wanted.items()}) < tolerance(kind)


@pytest.mark.skipif(not HAS_PEFT, reason="peft is not installed")
@pytest.mark.parametrize("kind", KINDS)
def test_diffusers_transformer_computes_the_same_change(kind: str, tmp_path: Path) -> None:
    from diffusers import ZImageTransformer2DModel
    from diffusers.loaders import ZImageLoraLoaderMixin

    path, wanted = written(kind, tmp_path)
    torch.manual_seed(0)
    model = ZImageTransformer2DModel(**CONFIG)
    layers = dict(model.named_modules())
    before = {name: layers[name].weight.detach().clone() for name in wanted}
    found = ZImageLoraLoaderMixin.lora_state_dict(load_file(path))
    state = found[0] if isinstance(found, tuple) else found
    ZImageLoraLoaderMixin.load_lora_into_transformer(state, transformer=model)
    for name, change in wanted.items():
        layer = dict(model.named_modules())[name]
        layer.merge()
        after = layer.get_base_layer().weight
        assert distance({name: after - before[name]}, {name: change(before[name])}) < 100 * tolerance(kind)
