"""LoRAs at run time, on a base that stays as it is: beside each layer, what they add to its output.

The base weights are never touched, so they may be quantized, mapped from the file, or on their way between
RAM and the card. A layer with LoRAs gets a submodule `lora` whose buffers travel with the layer's block, and
a class that adds its output: torch.compile notices a class, it need not notice a hook. All plain LoRAs of a
layer are one pair of matrices. Strengths are small tensors outside the modules, so that changing them packs
and copies no weight; at strength 0 the base alone runs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
    turn,
)
from shared.loras.names import ModelNames
from shared.loras.reader import LoraFile, read

MAX_LOHA_RANK = 128  # up to this product of its two ranks, a LoHa runs as a plain LoRA

Plain = Callable[[Tensor], Tensor]  # the base layer without its bias


def attach(
    model: nn.Module, loras: Sequence[tuple[LoraFile, float]], dtype: torch.dtype | None = None
) -> None:
    """Have `model` compute with these files at these strengths, instead of the ones it had.

    model: its linears are nn.Linear, or have in_features, out_features, bias and dequantized() -> [out, in].
    Call it while the model is off the card: DoRA reads weights, and factors are put where the weights are.
    dtype: of the factors and of what the layers get; by default the layer's own, or model.dtype.
    UserError when a file has a module that the model lacks; the model is then without LoRAs.
    """
    detach(model)
    layers = dict(model.named_modules())
    strengths = Strengths(len(loras))
    changes: dict[str, list[tuple[int, Adapter]]] = {}
    for index, (lora, _) in enumerate(loras):
        for name, adapters in lora.adapters.items():
            if name not in layers:
                raise UserError(f"{lora.path.name} changes {name}, which this model does not have.")
            changes.setdefault(name, []).extend((index, adapter) for adapter in adapters)
    with torch.no_grad():
        sides = {
            name: _sides(layers[name], found, strengths, dtype or _dtype(layers[name], model))
            for name, found in changes.items()
        }
    for name, side in sides.items():
        layer: Any = layers[name]
        layer.lora = side
        layer.__class__ = _adapted(layer.__class__)
    model.lora_strengths = strengths  # type: ignore[assignment]
    strengths.set([strength for _, strength in loras])


def use_files(
    model: nn.Module, paths: Sequence[Path], names: ModelNames, take_off_card: Callable[[], object]
) -> bool:
    """Have `model` compute with the files at `paths`; False, and nothing is read, when it does already.

    take_off_card: called before anything changes. The strengths are 1 until they are set. UserError as from
    `read` and `attach`; the model is then without LoRAs.
    """
    wanted = tuple((path, path.stat().st_size, path.stat().st_mtime_ns) for path in paths)
    present: Strengths | None = getattr(model, "lora_strengths", None)
    if wanted == (present.files if present else ()):
        return False
    take_off_card()
    detach(model)
    if wanted:
        attach(model, [(read(path, names), 1.0) for path in paths])
        model.lora_strengths.files = wanted  # type: ignore[union-attr]
    return True


def detach(model: nn.Module) -> None:
    """Take all LoRAs away: the model is what it was before `attach`, attribute for attribute."""
    for layer in model.modules():
        if isinstance(layer, _Adapted):
            layer.__class__ = type(layer).base
            del layer.lora
    if hasattr(model, "lora_strengths"):
        del model.lora_strengths


def set_multipliers(model: nn.Module, values: Sequence[float]) -> None:
    """Change the strengths, in the order of `attach`. Costs a few numbers; meant to be called per step."""
    strengths = getattr(model, "lora_strengths", None)
    if strengths is None:
        if values:
            raise ValueError(f"{len(values)} strengths for a model without LoRAs")
        return
    strengths.set(values)


def norm_weight(norm: Any) -> Tensor:
    """The weight of a norm with what LoRAs add to it, for kernels that do the norm's work themselves."""
    weight: Tensor = norm.weight
    for side in getattr(norm, "lora", ()):
        if side.strength.active:
            weight = weight + (side.change.value * side.strength.on(weight)).to(weight.dtype)
    return weight


# ---------------------------------------------------------------- strengths


class Strength:
    """What multiplies the ranks of a pair of matrices, float32 [R]: strength * scale of each one's LoRA.

    spans: (index of the LoRA, number of ranks, scale). Shared by all layers with the same spans.
    """

    def __init__(self, spans: tuple[tuple[int, int, float], ...]) -> None:
        self.spans = spans
        self.values = torch.zeros(sum(count for _, count, _ in spans))
        self.active = False

    @torch.inference_mode()  # `on` may have made the tensor in this mode, which only it may write to
    def set(self, values: Sequence[float]) -> None:
        """In place, so that compiled layers and captured graphs see it."""
        numbers = [values[index] * scale for index, count, scale in self.spans for _ in range(count)]
        self.values.copy_(torch.tensor(numbers))
        self.active = any(values[index] != 0 for index, _, _ in self.spans)

    def on(self, x: Tensor) -> Tensor:
        if self.values.device != x.device:
            self.values = self.values.to(x.device)
        return self.values


class Strengths:
    """The strengths of a model's LoRAs; each set of spans once."""

    files: tuple[tuple[Path, int, int], ...] = ()  # (path, size, time) of each, where `use_files` attached it

    def __init__(self, count: int) -> None:
        self.count = count
        self.known: dict[tuple[tuple[int, int, float], ...], Strength] = {}

    def of(self, *spans: tuple[int, int, float]) -> Strength:
        return self.known.setdefault(spans, Strength(spans))

    def set(self, values: Sequence[float]) -> None:
        if len(values) != self.count:
            raise ValueError(f"{len(values)} strengths for {self.count} LoRAs")
        for strength in self.known.values():
            strength.set(values)


# ---------------------------------------------------------------- layers


class _Adapted:
    """Put before a layer's class. `lora`: what is added to the layer's output."""

    base: type
    lora: Any  # nn.ModuleList

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = super().forward(x)  # type: ignore[misc]
        sides = [side for side in self.lora if side.strength.active]
        if not sides:
            return y
        bias = getattr(self, "bias", None)

        def plain(z: Tensor) -> Tensor:
            out = y if z is x else super(_Adapted, self).forward(z)  # type: ignore[misc]
            return out if bias is None else out - bias

        added = [side(x, plain) for side in sides if isinstance(side, Side)]  # from the base's own output
        for delta in added:
            y += delta
        for side in sides:
            if isinstance(side, LowRankSide):
                side(x, y)
        return y


@functools.cache
def _adapted(base: type) -> Any:
    return type(f"{base.__name__}WithLora", (_Adapted, base), {"base": base})


def _dtype(layer: nn.Module, model: nn.Module) -> torch.dtype:
    weight = None if hasattr(layer, "dequantized") else getattr(layer, "weight", None)
    if isinstance(weight, Tensor) and weight.dtype in (torch.float32, torch.bfloat16, torch.float16):
        return weight.dtype
    return getattr(model, "dtype", torch.get_default_dtype())


def _base_weight(layer: Any) -> Tensor:
    """The untouched weight [out, in] of a linear, quantized or not."""
    return layer.dequantized() if hasattr(layer, "dequantized") else layer.weight


def _sides(
    layer: nn.Module, found: Iterable[tuple[int, Adapter]], strengths: Strengths, dtype: torch.dtype
) -> nn.ModuleList:
    """What is added to one layer's output: one pair for the plain LoRAs, then the others one by one."""
    device = next((t.device for t in (*layer.parameters(), *layer.buffers())), torch.device("cpu"))
    found = [(index, _simplest(adapter)) for index, adapter in found]
    sides: list[nn.Module] = []
    low_rank = [(index, adapter) for index, adapter in found if isinstance(adapter, LowRank)]
    if low_rank:
        strength = strengths.of(*((index, len(one.down), one.scale) for index, one in low_rank))
        sides.append(LowRankSide([one for _, one in low_rank], strength, dtype))
    for index, adapter in found:
        if not isinstance(adapter, LowRank):
            sides.append(Side(_change(adapter, layer, dtype), strengths.of((index, 1, 1.0))))
    return nn.ModuleList(sides).to(device)


def _simplest(adapter: Adapter) -> Adapter:
    if isinstance(adapter, LoHa) and adapter.w1_a.shape[1] * adapter.w2_a.shape[1] <= MAX_LOHA_RANK:
        return adapter.low_rank()
    return adapter


class LowRankSide(nn.Module):
    """All plain LoRAs of a layer: y + (x @ down^T * strengths) @ up^T. down [R, in], up [out, R]."""

    down: Tensor
    up: Tensor

    def __init__(self, adapters: Sequence[LowRank], strength: Strength, dtype: torch.dtype) -> None:
        super().__init__()
        self.strength = strength
        self.register_buffer("down", torch.cat([one.down.to(dtype) for one in adapters]), persistent=False)
        self.register_buffer("up", torch.cat([one.up.to(dtype) for one in adapters], dim=1), persistent=False)

    def forward(self, x: Tensor, y: Tensor) -> None:
        """Into y, within the product: it is read and written once, and rounded once."""
        inner = F.linear(x, self.down).mul_(self.strength.on(x))
        if y.is_contiguous() and y.dtype == inner.dtype:
            y.view(-1, y.shape[-1]).addmm_(inner.reshape(-1, inner.shape[-1]), self.up.t())
        else:
            y += F.linear(inner, self.up)


class Side(nn.Module):
    """strength * change."""

    def __init__(self, change: nn.Module, strength: Strength) -> None:
        super().__init__()
        self.change = change
        self.strength = strength

    def forward(self, x: Tensor, plain: Plain) -> Tensor:
        return (self.change(x, plain) * self.strength.on(x)).to(x.dtype)


# ---------------------------------------------------------------- what each kind adds, at strength 1


class _Change(nn.Module):
    """Buffers by name; forward(x, plain) -> what is added to the layer's output."""

    def __init__(self, dtype: torch.dtype, **buffers: Tensor) -> None:
        super().__init__()
        for name, tensor in buffers.items():
            self.register_buffer(name, tensor.detach().to(dtype).contiguous(), persistent=False)

    def __getattr__(self, name: str) -> Any:  # the buffers, for the type checker
        return super().__getattr__(name)


class LowRankChange(_Change):
    def forward(self, x: Tensor, plain: Plain) -> Tensor:
        return F.linear(F.linear(x, self.down), self.up)


class LoHaChange(_Change):
    """The delta is made anew each time: it is as large as the weight, its factors are small."""

    def forward(self, x: Tensor, plain: Plain) -> Tensor:
        return F.linear(x, (self.w1_a @ self.w1_b).mul_(self.w2_a @ self.w2_b))


class LoKrChange(_Change):
    """x @ kron(w1, w2)^T without the Kronecker product: w2 along the inner, w1 along the outer inputs."""

    def forward(self, x: Tensor, plain: Plain) -> Tensor:
        inner = F.linear(x.unflatten(-1, (self.w1.shape[1], self.w2.shape[1])), self.w2)
        return F.linear(inner.transpose(-1, -2), self.w1).transpose(-1, -2).flatten(-2)


class DiffChange(_Change):
    def forward(self, x: Tensor, plain: Plain) -> Tensor:
        return F.linear(x, self.value)


class BiasChange(_Change):
    def forward(self, x: Tensor, plain: Plain) -> Tensor:
        return self.value


class NormChange(_Change):
    """A norm's output is linear in its weight, so a change of the weight adds the norm with that weight."""

    eps: float | None

    def forward(self, x: Tensor, plain: Plain) -> Tensor:
        return F.rms_norm(x, self.value.shape, self.value, self.eps)


class OftChange(_Change):
    side: str
    pairing: tuple[tuple[int, int], ...]

    def forward(self, x: Tensor, plain: Plain) -> Tensor:
        y = plain(self.turn(x)) if self.side == "in" else self.turn(plain(x))
        return y * self.rescale - plain(x)

    def turn(self, x: Tensor) -> Tensor:
        return turn(x, self.rotation, self.pairing, self.side)


class DoraChange(_Change):
    """gain * (base + inner) - base, the gain on the rows (of the output) or on the columns (of the input)."""

    axis: str
    inner: nn.Module

    def forward(self, x: Tensor, plain: Plain) -> Tensor:
        if self.axis == "out":
            return (plain(x) + self.inner(x, plain)) * self.gain - plain(x)
        scaled = x * self.gain
        return plain(scaled) + self.inner(scaled, plain) - plain(x)


def _change(adapter: Adapter, layer: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The module that computes one adapter's change; its scale is in its factors, rounded once."""
    change: Any
    match adapter:
        case LowRank(down, up, scale):
            return LowRankChange(dtype, down=down, up=scale * up.float())
        case LoHa(w1_a, w1_b, w2_a, w2_b, scale):
            return LoHaChange(dtype, w1_a=scale * w1_a.float(), w1_b=w1_b, w2_a=w2_a, w2_b=w2_b)
        case LoKr():
            w1, w2 = adapter.sides()
            return LoKrChange(dtype, w1=w1, w2=adapter.scale * w2)
        case Diff(value):
            return DiffChange(dtype, value=value)
        case DiffBias(value):
            return BiasChange(dtype, value=value)
        case NormDiff(value):
            change = NormChange(dtype, value=value)
            change.eps = getattr(layer, "eps", None)
        case Oft(rotation, side, rescale, pairing):
            rescale = torch.ones(1) if rescale is None else rescale
            change = OftChange(dtype, rotation=rotation, rescale=rescale)
            change.side, change.pairing = side, pairing
        case Dora(inner, _, axis):
            change = DoraChange(dtype, gain=adapter.gain(_base_weight(layer)))
            change.axis, change.inner = axis, _change(_simplest(inner), layer, dtype)
        case _:
            raise TypeError(f"no change for {adapter}")
    return change
