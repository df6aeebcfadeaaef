"""Checkpoints into models, and models into int8 checkpoints.

Tensors that already have the wanted dtype are views of the mapped file: nothing is copied until it is used,
and the memory counts as the system's file cache.
"""

from __future__ import annotations

import base64
import json
import math
import re
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from shared.errors import UserError, is_out_of_memory
from shared.files import atomic
from shared.gpu import heap, interrupt
from shared.weights import quantized
from shared.weights.files import DamagedFile
from shared.weights.formats import HALVES, Checkpoint, Entry, Names, inspect

M = TypeVar("M", bound=nn.Module)
DATA = ".weight._data"
#: attributes of quantized layers that are used as the file has them; the others become the model's dtype
AS_STORED = ("weight", "weight_scale", "qweight", "wscales", "wtscale", "wcscales")
SAFETENSORS_DTYPES = {
    torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.int8: "I8",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip


def preferred_dtype(checkpoint: Checkpoint, device: torch.device) -> torch.dtype:
    """bfloat16 on a card, float16 on those that multiply bfloat16 slowly (below compute capability 8.0). On a
    CPU float32, unless the file is bfloat16 and the processor multiplies that: twice as fast there
    (AVX512_BF16, AMX) and half the memory."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    if device.type != "cpu":
        return torch.bfloat16
    stored = {entry.dtype for entry in checkpoint.entries.values()}
    fast = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.bfloat16 if "BF16" in stored and fast else torch.float32


def build(make: Callable[[], M]) -> M:
    """A model without memory: its weights come from `load_weights`."""
    with init_empty_weights():
        return make().eval().requires_grad_(False)


def load_weights(
    model: nn.Module,
    paths: Sequence[Path],
    *,
    dtype: torch.dtype | None,
    names: Names | None = None,
    unused: Callable[[str], bool] = lambda name: False,
    allow_missing: Callable[[str], bool] = lambda name: False,
) -> Checkpoint:
    """Fill `model` (made by `build`) from files or folders of shards; floats become `dtype` (None keeps the
    file's). Linear layers that the file has quantized become QuantizedLinear, those of a large model in 16
    bits that is to compute in float32 HalfLinear.

    names: the family's names. unused, allow_missing: tell by canonical name which tensors of the file the
    model does not need, and which of the model's the file may lack. Raises UserError when a file is missing,
    damaged, of another model or quantized in a way that is not supported (nothing has been read then), and
    Cancelled between two layers.
    """
    names = names or Names(family=type(model).__name__)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    checkpoint = inspect(paths, names, expected=expected, unused=unused, allow_missing=allow_missing)
    _fill(model, checkpoint, dtype, names, expected)
    heap.trim()  # of what was unpacked
    return checkpoint


def _fill(
    model: nn.Module,
    checkpoint: Checkpoint,
    dtype: torch.dtype | None,
    names: Names,
    expected: Mapping[str, tuple[int, ...]],
) -> None:
    reader, state = _Reader(checkpoint, dtype, names.as_stored), {}

    def replaceable(module: str) -> bool:
        return type(model.get_submodule(module)) is nn.Linear and not re.search(names.plain, f"{module}.")

    for module, kind in checkpoint.quantized.items():
        interrupt.check()
        layer = reader.layer(module, kind)
        if replaceable(module):
            model.set_submodule(module, layer)
            continue
        state[f"{module}.weight"] = layer.dequantized().to(dtype or torch.bfloat16)
        if layer.bias is not None:
            state[f"{module}.bias"] = layer.bias
    large = dtype == torch.float32 and checkpoint.is_large
    for name, entry in checkpoint.entries.items():
        module, _, attribute = name.rpartition(".")
        if module in checkpoint.quantized:
            continue
        interrupt.check()
        if large and attribute == "weight" and entry.dtype in HALVES and replaceable(module):
            bias = reader.tensor(f"{module}.bias") if f"{module}.bias" in checkpoint.entries else None
            weight = reader.stored(name).reshape(expected[name])
            model.set_submodule(module, quantized.HalfLinear(weight, bias))
        else:
            state[name] = reader.tensor(name).reshape(expected[name])
    model.load_state_dict(state, strict=False, assign=True)


class _Reader:
    """Tensors of a checkpoint's files, in the model's order and dtype. as_stored: see Names."""

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype | None, as_stored: str) -> None:
        self.entries, self.dtype, self.as_stored = checkpoint.entries, dtype, as_stored
        self.files = {file: _open(file) for file in checkpoint.files}
        self.unpacked: dict[tuple[Path, str], Tensor] = {}  # fused layers: unpacked once, shared by the parts
        self.attributes: dict[str, list[str]] = {}
        for name in self.entries:
            module, _, attribute = name.rpartition(".")
            self.attributes.setdefault(module, []).append(attribute)

    def tensor(self, name: str) -> Tensor:
        """A plain tensor."""
        return self._cast(self.stored(name), None if re.search(self.as_stored, name) else self.dtype)

    def stored(self, name: str) -> Tensor:
        """A plain tensor in the file's dtype."""
        entry = self.entries[name]
        return _rows(self._stored(entry), entry)

    def layer(self, module: str, kind: str) -> quantized.QuantizedLinear:
        return quantized.make(kind, {a: self._attribute(module, kind, a) for a in self.attributes[module]})

    def _attribute(self, module: str, kind: str, attribute: str) -> Tensor:
        entry = self.entries[f"{module}.{attribute}"]
        unpack = quantized.UNPACK.get(kind, {}).get(attribute)
        key = (entry.file, entry.source)
        if key not in self.unpacked:
            tensor = self._stored(entry)
            tensor = tensor if unpack is None else unpack(tensor)
            tensor = tensor if attribute in AS_STORED else self._cast(tensor, self.dtype)
            self.unpacked[key] = tensor.data  # no view; what layers share stays one tensor
        return _rows(self.unpacked[key], entry)

    def _stored(self, entry: Entry) -> Tensor:
        return self.files[entry.file].get_tensor(entry.source)

    @staticmethod
    def _cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
        dtype = dtype or (torch.bfloat16 if tensor.dtype.itemsize == 1 else tensor.dtype)
        return tensor.to(dtype)


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        if is_out_of_memory(error):
            raise
        raise DamagedFile(file, f"cannot be read ({error})") from error


def _rows(tensor: Tensor, entry: Entry) -> Tensor:
    return tensor if entry.rows is None or not tensor.dim() else tensor[entry.rows]


def quantize(model: nn.Module, names: Names) -> None:
    """Turn the linear layers that `names.quantizable` matches into int8, in place, one after the other."""
    for name, layer in list(model.named_modules()):
        weight = _plain_weight(layer)
        if weight is not None and re.search(names.quantizable, name):
            interrupt.check()
            codes, scale = quantized.quantize_int8(weight())
            model.set_submodule(name, quantized.Int8Linear(codes, scale, layer.bias))


def _plain_weight(layer: nn.Module) -> Callable[[], Tensor] | None:
    """What gives the weight of an unquantized linear layer, in the dtype that it computes in; None for all
    other modules."""
    if isinstance(layer, quantized.HalfLinear):
        return layer.dequantized
    return layer.weight.detach if type(layer) is nn.Linear else None


def save_quantized(
    model: nn.Module, path: Path, names: Names, *, config: Mapping[str, Any] | None = None
) -> None:
    """Write `model` with the linear layers that `names.quantizable` matches in int8, as optimum-quanto, mmgp
    and Wan2GP read it; int8 layers as they are, all else in the model's dtypes. One layer at a time is in
    memory; the file gets its name when it is whole.

    config: the model's configuration for the header. Raises UserError for a model with other quantized
    layers, or when the file cannot be written.
    """
    pieces = sorted(_int8_pieces(model, names), key=lambda piece: (-piece.dtype.itemsize, piece.name))
    layers = [piece.name.removesuffix(DATA) for piece in pieces if piece.name.endswith(DATA)]
    table = {layer: {"weights": "qint8", "activations": "none"} for layer in layers}
    metadata = {"quantization_format": "quanto", "quantization_map_base64": _base64(table)}
    if config is not None:
        metadata["config_base64"] = _base64(config)
    known = path.with_name(f"{path.name}.part")  # gigabytes, which a killed process must not leave for good
    try:
        with atomic.replacing(path, part=known) as part, part.open("wb") as file:
            file.write(_header(pieces, metadata))
            for piece in pieces:
                file.write(piece.make().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror}): make room or choose a folder."
        ) from error


@dataclass(frozen=True)
class _Piece:
    """One tensor of a file to be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]


def _int8_pieces(model: nn.Module, names: Names) -> Iterator[_Piece]:
    for name, tensor in model.state_dict().items():
        module, _, attribute = name.rpartition(".")
        layer = model.get_submodule(module)
        chosen = _plain_weight(layer) is not None and re.search(names.quantizable, module)
        if isinstance(layer, quantized.QuantizedLinear) and not isinstance(
            layer, (quantized.Int8Linear, quantized.HalfLinear)
        ):
            raise UserError(f"{module} is {layer.kind} already: save int8 from the bf16 model.")
        if attribute == "weight" and (chosen or isinstance(layer, quantized.Int8Linear)):
            yield from _int8_layer(module, layer)
        elif not (attribute == "weight_scale" and isinstance(layer, quantized.Int8Linear)):
            yield _Piece(name, tensor.dtype, tuple(tensor.shape), partial(torch.Tensor.detach, tensor))


def _int8_layer(module: str, layer: nn.Module) -> Iterator[_Piece]:
    """A layer's tensors in optimum-quanto's names. It keeps scales of activations, which are 1 here."""
    weight: Tensor = layer.weight.detach()  # type: ignore[operator]
    if isinstance(layer, quantized.Int8Linear):
        scale_dtype, make = layer.weight_scale.dtype, lambda: (weight, layer.weight_scale)
    elif isinstance(layer, quantized.HalfLinear):
        scale_dtype, make = torch.float32, lambda: quantized.quantize_int8(layer.dequantized())
    else:
        scale_dtype, make = weight.dtype, partial(quantized.quantize_int8, weight)
    yield _Piece(f"{module}{DATA}", torch.int8, tuple(weight.shape), lambda: make()[0])
    yield _Piece(f"{module}.weight._scale", scale_dtype, (len(weight), 1), lambda: make()[1])
    for name in ("input_scale", "output_scale"):
        yield _Piece(f"{module}.{name}", scale_dtype, (1,), partial(torch.ones, 1, dtype=scale_dtype))


def _header(pieces: Sequence[_Piece], metadata: Mapping[str, str]) -> bytes:
    """The head of a safetensors file (its format: files.read_header), padded so that the data is aligned."""
    header: dict[str, Any] = {"__metadata__": metadata}
    offset = 0
    for piece in pieces:
        end = offset + math.prod(piece.shape) * piece.dtype.itemsize
        dtype = SAFETENSORS_DTYPES[piece.dtype]
        header[piece.name] = {"dtype": dtype, "shape": piece.shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _base64(table: Mapping[str, Any]) -> str:
    return base64.b64encode(json.dumps(table).encode()).decode()
