"""Any LoRA file as one that diffusers, ComfyUI and other programs read: canonical keys, scales folded in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from shared.errors import UserError
from shared.files import atomic
from shared.loras.adapters import Adapter, DiffBias, Dora, LoHa, LoKr, LowRank, NormDiff, Oft
from shared.loras.inspection import Verdict
from shared.loras.names import ModelNames
from shared.loras.parser import LORA_SUFFIXES
from shared.loras.reader import LoraFile, read

PREFIX, LOKR_PREFIX = "transformer.", "diffusion_model."
FOLDED = ("lora_adapter_metadata", "ss_network_alpha")  # metadata that would be wrong about the new file


def convert(
    source: Path, out: Path, names: ModelNames, weight_of: Callable[[str], Tensor] | None = None
) -> Verdict:
    """Write the LoRA file `source` to `out` under diffusers' keys and return its verdict.

    transformer.MODULE.lora_A.weight and .lora_B.weight, with alpha / rank in the latter, and DoRA's
    .lora_magnitude_vector or .dora_scale; .diff and .diff_b for all else. A file of nothing but LoKr stays
    one, under the names that diffusers knows it by: diffusion_model.MODULE.lokr_*, the scale in w1. LoHa, and
    low-rank LoKr among others, become exact LoRAs where that is smaller than the difference. weight_of: the
    base weight [out, in] of a module, which only an OFT needs. UserError when it is missing, or `out` cannot
    be written.
    """
    if out.suffix.lower() not in LORA_SUFFIXES or out.resolve() == source.resolve():
        raise UserError(f"{out} cannot be written to: name another {' or '.join(LORA_SUFFIXES)} file.")
    lora = read(source, names)
    only_lokr = all(_is_lokr(adapter) for found in lora.adapters.values() for adapter in found)
    prefix = LOKR_PREFIX if only_lokr else PREFIX
    tensors: dict[str, Tensor] = {}
    for module, adapters in lora.adapters.items():
        for adapter in adapters:
            made = _lokr(adapter) if only_lokr else _tensors(lora, module, adapter, weight_of)
            for suffix, tensor in made.items():
                tensors[f"{prefix}{module}.{suffix}"] = tensor.contiguous().clone()
    metadata = {key: value for key, value in lora.metadata.items() if key not in FOLDED}
    try:
        with atomic.replacing(out) as part:
            save_file(tensors, part, {**metadata, "format": "pt"})
    except (OSError, SafetensorError) as error:
        raise UserError(f"{out} cannot be written ({error}): free the disk or name another place.") from error
    return lora.verdict


def _tensors(
    lora: LoraFile, module: str, adapter: Adapter, weight_of: Callable[[str], Tensor] | None
) -> dict[str, Tensor]:
    """The tensors of one adapter by the end of their keys."""
    match adapter:
        case DiffBias(value):
            return {"diff_b": value}
        case NormDiff(value):
            return {"diff": value}
        case Dora(inner, magnitude, axis):
            pair = _as_low_rank(inner)
            if pair is None:
                raise UserError(
                    f"{lora.path.name} cannot be converted: {module} has a DoRA of no plain LoRA, which no "
                    "other program reads."
                )
            known = {"out": {"lora_magnitude_vector": magnitude}, "in": {"dora_scale": magnitude[None, :]}}
            return _pair(pair) | known[axis]
        case Oft():
            if weight_of is None:
                raise UserError(
                    f"{lora.path.name} cannot be converted by itself: {module} is turned (OFT), which is a "
                    "difference only together with the base model's weights."
                )
            return {"diff": adapter.delta(weight_of(module))}
        case _:
            low_rank = _as_low_rank(adapter)
            return {"diff": adapter.delta()} if low_rank is None else _pair(low_rank)


def _is_lokr(adapter: Adapter) -> bool:
    return isinstance(adapter.inner if isinstance(adapter, Dora) else adapter, LoKr)


def _lokr(adapter: Adapter) -> dict[str, Tensor]:
    """A LoKr's factors as they are, the scale in the first of them; a DoRA's magnitudes beside them."""
    if isinstance(adapter, Dora):
        rows = adapter.axis == "out"
        magnitude = adapter.magnitude.flatten()
        return _lokr(adapter.inner) | {"dora_scale": magnitude[:, None] if rows else magnitude[None, :]}
    assert isinstance(adapter, LoKr)
    w1 = (_scaled(adapter.w1[0], adapter.scale), *adapter.w1[1:])
    found: dict[str, Tensor] = {}
    for side, factors in (("w1", w1), ("w2", adapter.w2)):
        ends = ("",) if len(factors) == 1 else ("_a", "_b")
        found |= {f"lokr_{side}{end}": factor for end, factor in zip(ends, factors, strict=True)}
    return found


def _as_low_rank(adapter: Adapter) -> LowRank | None:
    """The same change as a LoRA; None when that is not smaller than the full difference."""
    if isinstance(adapter, LowRank):
        return adapter
    found = adapter.low_rank() if isinstance(adapter, (LoHa, LoKr)) else None
    if found is None:
        return None
    (rank, columns), rows = found.down.shape, found.up.shape[0]
    return found if rank * (rows + columns) < rows * columns else None


def _pair(low_rank: LowRank) -> dict[str, Tensor]:
    """A and B with the scale in B: in the file's precision where that is exact, else in float32."""
    return {"lora_A.weight": low_rank.down, "lora_B.weight": _scaled(low_rank.up, low_rank.scale)}


def _scaled(factor: Tensor, scale: float) -> Tensor:
    scaled = factor.float() * scale
    rounded = scaled.to(factor.dtype)
    return rounded if torch.equal(rounded.float(), scaled) else scaled
