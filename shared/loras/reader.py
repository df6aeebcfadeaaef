"""Read a LoRA file into adapters by the model's module names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from shared.errors import UserError
from shared.loras.adapters import (
    Adapter,
    Diff,
    DiffBias,
    Dora,
    LoHa,
    LoKr,
    LowRank,
    NormDiff,
    Oft,
    WeightAdapter,
    butterfly,
    cayley,
    input_rotation,
    output_rotation,
)
from shared.loras.inspection import Verdict, verdict_of
from shared.loras.names import ModelNames
from shared.loras.parser import BIASES, Layout, Module, read_layout
from shared.loras.peft import PeftConfig

KEPT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # others are read as float32

Factors = Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class LoraFile:
    """A file's adapters by module of the model; a module may have one for its weight and one for its bias."""

    path: Path
    verdict: Verdict
    adapters: Mapping[str, tuple[Adapter, ...]]
    metadata: Mapping[str, str]


def read(path: Path, names: ModelNames) -> LoraFile:
    """The file at `path` for the model of `names`. UserError as `inspect` refuses it, or for NaN factors."""
    layout = read_layout(path, names)
    adapters: dict[str, tuple[Adapter, ...]] = {}
    with safe_open(layout.path, framework="pt") as file:
        for module in layout.modules:
            factors = {
                factor: _tensor(file, source.key, source.matrix, layout)
                for factor, source in module.factors.items()
            }
            for name, found in _of_module(module, factors, layout.peft):
                adapters[name] = adapters.get(name, ()) + found
    return LoraFile(layout.path, verdict_of(layout), adapters, layout.metadata)


def _tensor(file: Any, key: str, shape: tuple[int, ...], layout: Layout) -> Tensor:
    tensor = file.get_tensor(key)
    tensor = tensor if tensor.dtype in KEPT_DTYPES else tensor.float()
    if not tensor.isfinite().all():
        raise UserError(
            f"{layout.path.name} is damaged: {key} has values that are not numbers (NaN or infinite)."
        )
    return tensor.reshape(shape)


def _of_module(
    module: Module, factors: Factors, peft: PeftConfig | None
) -> list[tuple[str, tuple[Adapter, ...]]]:
    """(module of the model, its adapters) for each part of one module of the file."""
    whole: list[Adapter] = []
    if module.algorithm == "diff" and len(module.target.shape) == 1:
        whole.append(NormDiff(_first(factors, "diff", "w_norm")))
    elif module.algorithm:
        inner = BUILDERS[module.algorithm](module, factors, peft)
        magnitude = factors.get("magnitude")
        whole.append(inner if magnitude is None else Dora(inner, magnitude.flatten(), module.magnitude))  # type: ignore[arg-type]
    whole += [DiffBias(factors[bias]) for bias in BIASES if bias in factors]
    return [
        (part.module, tuple(whole if part.rows is None else (_cut(one, *part.rows) for one in whole)))
        for part in module.parts
    ]


def _cut(adapter: Adapter, start: int, stop: int) -> Adapter:
    assert not isinstance(adapter, NormDiff)  # no alias stacks norms
    return adapter.rows(start, stop)


def _lora(module: Module, factors: Factors, peft: PeftConfig | None) -> WeightAdapter:
    return LowRank(factors["down"], factors["up"], module.scale)


def _loha(module: Module, factors: Factors, peft: PeftConfig | None) -> WeightAdapter:
    one, two = (factors["hada_w1_a"], factors["hada_w1_b"]), (factors["hada_w2_a"], factors["hada_w2_b"])
    return LoHa(*one, *two, module.scale)


def _lokr(module: Module, factors: Factors, peft: PeftConfig | None) -> WeightAdapter:
    def side(name: str) -> tuple[Tensor, ...]:
        return (factors[name],) if name in factors else (factors[f"{name}_a"], factors[f"{name}_b"])

    return LoKr(side("lokr_w1"), side("lokr_w2"), module.scale)


def _oft(module: Module, factors: Factors, peft: PeftConfig | None) -> WeightAdapter:
    if "oft_R" in factors:
        assert module.rank is not None
        peft = peft or PeftConfig()
        angles = factors["oft_R"].float() * module.scale
        return Oft(input_rotation(angles, module.rank, peft.neumann, peft.limit)[None], "in")
    return Oft(_output_rotation(module, factors)[None], "out", _rescale(factors, "rescale"))


def _boft(module: Module, factors: Factors, peft: PeftConfig | None) -> WeightAdapter:
    """LyCORIS turns outputs, by the transposed of its OFT's blocks, and pairs single elements; PEFT turns
    inputs, its last stage first, and pairs halves of blocks.
    """
    size = module.rank
    assert size is not None
    if "boft_R" in factors:
        angles = factors["boft_R"].float()
        pairing = butterfly(len(angles), max(size // 2, 1), size)
        rotation = cayley((angles - angles.mT) / 2).flip(0)
        return Oft(rotation, "in", _rescale(factors, "boft_s"), pairing[::-1])
    rotation = _output_rotation(module, factors).mT
    return Oft(rotation, "out", _rescale(factors, "rescale"), butterfly(len(rotation), 1, size))


def _output_rotation(module: Module, factors: Factors) -> Tensor:
    return output_rotation(factors["oft_blocks"], (module.alpha or 0.0) * module.target.shape[0])


def _rescale(factors: Factors, name: str) -> Tensor | None:
    return factors[name].flatten() if name in factors else None


def _diff(module: Module, factors: Factors, peft: PeftConfig | None) -> WeightAdapter:
    return Diff(_first(factors, "diff", "w_norm"))


BUILDERS: dict[str, Callable[[Module, Factors, PeftConfig | None], WeightAdapter]] = {
    "LoRA": _lora,
    "LoHa": _loha,
    "LoKr": _lokr,
    "OFT": _oft,
    "BOFT": _boft,
    "diff": _diff,
}


def _first(factors: Factors, *names: str) -> Tensor:
    return next(factors[name] for name in names if name in factors)
