"""How one layer is stored: which quantization its tensors are, and whether they fit each other.

From headers only, like formats.py, which puts the layers of a file together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from shared.weights.files import Header, RefusedFile, unsupported

FLOATS = {"BF16": "bf16", "F16": "fp16", "F32": "fp32", "F64": "fp64"}
FLOAT8 = ("F8_E4M3", "F8_E5M2")
NUNCHAKU_TILE = 128  # rows and columns of a Nunchaku layer come in multiples of this
NUNCHAKU_RANK_TILE = 16

#: how a tensor of a quantized layer ends -> what it is to the layer. The second names of smooth, down and up
#: are those of older Nunchaku files.
ROLES = {
    "weight._data": "data", "weight._scale": "scale",  # optimum-quanto
    "scale_weight": "scale", "weight_scale": "scale", "comfy_quant": "marker",  # fp8
    "qweight": "qweight", "wscales": "wscales", "wcscales": "wcscales", "wtscale": "wtscale",  # Nunchaku
    "smooth_factor": "smooth", "proj_down": "down", "proj_up": "up",
    "smooth": "smooth", "lora_down": "down", "lora_up": "up",
}  # fmt: skip
#: what optimum-quanto calls a quantized weight -> its dtype in the file
QUANTO_TYPES = {"qint8": "I8", "qfloat8": "F8_E4M3", "qfloat8_e4m3fn": "F8_E4M3", "qfloat8_e5m2": "F8_E5M2"}
COMFY_FP8 = ("float8_e4m3fn", "float8_e5m2")


@dataclass(frozen=True)
class Stored:
    """A tensor as its file has it."""

    header: Header
    source: str
    dtype: str
    shape: tuple[int, ...]

    def refused(self, flaw: str) -> RefusedFile:
        return RefusedFile(self.header.path, flaw, "take another copy of the model")


class Part(NamedTuple):
    """One tensor of a layer: what it is called in the model, where it is, its shape in the model's order, and
    whether it is split where a fused layer's rows are."""

    attribute: str
    tensor: Stored
    shape: tuple[int, ...]
    by_rows: bool


def kind_of(module: str, roles: Mapping[str, Stored], declared: str | None) -> str | None:
    """The kind of quantized layer that these tensors are; None: plain."""
    if "qweight" in roles:
        q, scales = roles["qweight"], roles.get("wscales")
        if q.dtype not in ("I8", "U8"):
            raise unsupported(q.header.path, f"{q.dtype} words", q.source)
        return "svdq-fp4" if scales and scales.dtype in FLOAT8 else "svdq-int4"
    weight = roles.get("data") or roles.get("weight")
    if weight is None:
        if declared and "marker" in roles:
            raise unsupported(roles["marker"].header.path, f"{declared} (ComfyUI)", roles["marker"].source)
        return None
    if declared and "data" in roles:
        if declared not in QUANTO_TYPES:
            raise unsupported(weight.header.path, f"optimum-quanto {declared}", weight.source)
        if QUANTO_TYPES[declared] != weight.dtype:
            raise weight.refused(f"calls {module} {declared} but stores '{weight.source}' as {weight.dtype}")
    elif declared and weight.dtype not in FLOATS and declared not in COMFY_FP8:
        raise unsupported(weight.header.path, f"{declared} (ComfyUI)", weight.source)
    if "data" in roles and weight.dtype == "I8":
        return "int8"
    if weight.dtype in FLOAT8:
        return "fp8" if len(weight.shape) == 2 else None
    if weight.dtype not in FLOATS:
        raise unsupported(weight.header.path, f"{weight.dtype} without a known scheme", weight.source)
    return None


def parts_of(module: str, kind: str | None, roles: Mapping[str, Stored]) -> list[Part]:
    """The tensors that a module of this kind consists of, checked against each other."""
    if kind is None:
        return _plain(module, roles)
    parts = _nunchaku(module, kind, roles) if kind.startswith("svdq") else _scaled(module, roles)
    rows = parts[0].shape[0]
    if bias := roles.get("bias"):
        _check(bias, (rows,), (*FLOATS, *FLOAT8))
        parts.append(Part("bias", bias, (rows,), True))
    extra = next((t for role, t in roles.items() if role not in {*ROLES.values(), "weight", "bias"}), None)
    if extra:
        raise extra.refused(f"has '{extra.source}' in a layer quantized as {kind}, which has no such tensor")
    return parts


def _plain(module: str, roles: Mapping[str, Stored]) -> list[Part]:
    for role, tensor in roles.items():
        if role == "marker":
            continue
        if role in ROLES.values():
            raise tensor.refused(
                f"has '{tensor.source}' but no quantized weight of {module} that it belongs to"
            )
        if tensor.dtype not in FLOATS and tensor.dtype not in FLOAT8:
            raise unsupported(tensor.header.path, f"{tensor.dtype} without a known scheme", tensor.source)
    return [Part(role, t, t.shape, True) for role, t in roles.items() if role != "marker"]


def _scaled(module: str, roles: Mapping[str, Stored]) -> list[Part]:
    """int8 or fp8: a weight [N, K] and its scale, one for all or one per row."""
    weight, scale = roles.get("data") or roles["weight"], roles.get("scale")
    if "data" in roles and "weight" in roles:
        raise weight.refused(
            f"has '{weight.source}' and '{roles['weight'].source}', two weights of one layer"
        )
    if len(weight.shape) != 2:
        raise weight.refused(f"has '{weight.source}' with the shape {list(weight.shape)} instead of [N, K]")
    parts = [Part("weight", weight, weight.shape, True)]
    if scale is None and "data" in roles:
        raise weight.refused(f"has '{weight.source}' without its '{module}.weight._scale'")
    if scale is not None:
        rows = weight.shape[0]
        if scale.shape not in ((), (1,), (1, 1), (rows,), (rows, 1)):
            raise scale.refused(f"has '{scale.source}' with the shape {list(scale.shape)} for {rows} rows")
        if scale.dtype not in FLOATS:
            raise unsupported(scale.header.path, f"scales in {scale.dtype}", scale.source)
        per_row = math.prod(scale.shape) == rows
        parts.append(Part("weight_scale", scale, (rows, 1) if per_row else (1,), per_row))
    return parts


def _nunchaku(module: str, kind: str, roles: Mapping[str, Stored]) -> list[Part]:
    """Nunchaku's SVDQuant: 4-bit codes with group scales, smoothing and a low-rank branch."""
    q = roles["qweight"]
    for role in ("wscales", "smooth", "down", "up"):
        if role not in roles:
            raise q.refused(f"has '{q.source}' without the {role} of {module}")
    if "weight" in roles or "data" in roles:
        raise q.refused(f"has '{q.source}' and a second weight of {module}")
    tiled = len(q.shape) == 2 and all(n and n % NUNCHAKU_TILE == 0 for n in (q.shape[0], q.shape[1] * 2))
    if not tiled:
        raise q.refused(f"has '{q.source}' with the shape {list(q.shape)}, not [N, K/2] in multiples of 128")
    rows, columns = q.shape[0], q.shape[1] * 2
    groups = columns // (64 if kind == "svdq-int4" else 16)
    rank = roles["up"].shape[-1] if roles["up"].shape else 0
    if not rank or rank % NUNCHAKU_RANK_TILE:
        raise roles["up"].refused(f"has '{roles['up'].source}' of rank {rank}, not a multiple of 16")
    floats = tuple(FLOATS)
    scales = FLOAT8 if kind == "svdq-fp4" else ("BF16", "F16")
    _check(roles["wscales"], (groups, rows), scales)
    _check(roles["smooth"], (columns,), floats)
    _check(roles["down"], (columns, rank), floats)
    _check(roles["up"], (rows, rank), floats)
    parts = [
        Part("qweight", q, q.shape, True),
        Part("wscales", roles["wscales"], (rows, groups), True),
        Part("smooth", roles["smooth"], (columns,), False),
        Part("down", roles["down"], (rank, columns), False),
        Part("up", roles["up"], (rows, rank), True),
    ]
    if tensor := roles.get("wtscale"):
        _check(tensor, () if not tensor.shape else (1,), floats)
        parts.append(Part("wtscale", tensor, (1,), False))
    if tensor := roles.get("wcscales"):
        _check(tensor, (rows,), floats)
        parts.append(Part("wcscales", tensor, (rows,), True))
    return parts


def _check(tensor: Stored, shape: tuple[int, ...], dtypes: Sequence[str]) -> None:
    if tensor.shape != shape:
        raise tensor.refused(
            f"has '{tensor.source}' with the shape {list(tensor.shape)} instead of {list(shape)}"
        )
    if tensor.dtype not in dtypes:
        raise tensor.refused(f"has '{tensor.source}' as {tensor.dtype} instead of {' or '.join(dtypes)}")
