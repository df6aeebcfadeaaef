"""What a checkpoint is, told from its safetensors headers alone: which tensor fills which place of the model,
which layers are quantized and how, or why the file cannot be used.

Never from the file's name. Standard library only, milliseconds on a file of any size: the planner and the
page ask before anything is read. loading.py reads what this file has found.
"""

from __future__ import annotations

import base64
import json
import logging
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shared.errors import UserError
from shared.weights.files import DTYPE_BITS, WORKING_FORMATS, Header, read_header, weight_files

log = logging.getLogger(__name__)

FLOATS = {"BF16": "bf16", "F16": "fp16", "F32": "fp32", "F64": "fp64"}
FLOAT8 = ("F8_E4M3", "F8_E5M2")
NUNCHAKU_TILE = 128  # rows and columns of a Nunchaku layer come in multiples of this
NUNCHAKU_RANK_TILE = 16
MAX_MARKER_BYTES = 4096

#: how a tensor of a quantized layer ends -> what it is to the layer. The second names of smooth, down and up
#: are those of older Nunchaku files.
ROLES = {
    "weight._data": "data", "weight._scale": "scale",  # optimum-quanto
    "scale_weight": "scale", "weight_scale": "scale", "comfy_quant": "marker",  # fp8
    "qweight": "qweight", "wscales": "wscales", "wcscales": "wcscales", "wtscale": "wtscale",  # Nunchaku
    "smooth_factor": "smooth", "proj_down": "down", "proj_up": "up",
    "smooth": "smooth", "lora_down": "down", "lora_up": "up",
}  # fmt: skip
#: tensors that no weight depends on: activations' scales, the copy of Nunchaku's smoothing, ComfyUI's
#: sentinel
IGNORED = re.compile(
    r"(^|\.)(input_scale|output_scale|scale_input|smooth_factor_orig|smooth_orig|scaled_fp8)$"
)
#: what optimum-quanto calls a quantized weight -> its dtype in the file
QUANTO_TYPES = {"qint8": "I8", "qfloat8": "F8_E4M3", "qfloat8_e4m3fn": "F8_E4M3", "qfloat8_e5m2": "F8_E5M2"}
COMFY_FP8 = ("float8_e4m3fn", "float8_e5m2")
#: tensors that only quantizations have which this program does not compute
OTHER_QUANTIZATIONS = (
    (r"\.(weight_scale_2|input_global_scale|weight_global_scale)$", "nvfp4"),
    (r"\.wzeros$", "Nunchaku's AWQ 4-bit"),
    (r"\.(qzeros|g_idx)$", "GPTQ or AWQ"),
    (r"\.weight\.(absmax|quant_map|nested_absmax|quant_state\..*)$", "bitsandbytes"),
    (r"\.weight_scale_inv$", "fp8 in blocks"),
    (r"\.weight\.(_shift|_data\._data)$", "optimum-quanto below 8 bits"),
)
ADAPTER = re.compile(
    r"\.(lora_(A|B)(\..*)?|lora_(up|down|mid)\.weight|(lokr|hada)_w\d.*|dora_scale)$|^lora_unet_"
)


@dataclass(frozen=True)
class Names:
    """What a family tells about its checkpoints' names. Regular expressions see names without prefix.

    family: for sentences, e.g. "a Z-Image transformer".
    folder: its subfolder in a diffusers model.
    known: tensors that each of its files has, spelled alike in all of them. They identify the family and
        show which prefix ("model.diffusion_model.") the names have.
    renames: (expression, replacement) from other spellings to the model's own names, applied in this order.
    fused: end of a module's name -> the modules it is in the model, in the order of its rows.
    dropped: tensors that the model does not need.
    mistaken: (expression, what a file with such a name is), for files without any `known` tensor.
    plain: modules that compute unquantized even where the file has them quantized.
    quantizable: modules that `save_quantized` quantizes.
    """

    family: str = "this model"
    folder: str = ""
    known: tuple[str, ...] = ()
    renames: tuple[tuple[str, str], ...] = ()
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    dropped: str = r"(?!)"
    mistaken: tuple[tuple[str, str], ...] = ()
    plain: str = r"(?!)"
    quantizable: str = r"(?!)"

    def canonical(self, name: str, prefix: str = "") -> str:
        name = name.removeprefix(prefix)
        for expression, replacement in self.renames:
            name = re.sub(expression, replacement, name)
        return name

    def parts(self, module: str) -> list[str]:
        """The modules whose rows a stored module holds: itself, unless it is fused."""
        for end, parts in self.fused.items():
            if module.endswith(f".{end}"):
                return [module.removesuffix(end) + part for part in parts]
        return [module]


@dataclass(frozen=True)
class Entry:
    """One tensor of the model, or of one of its quantized layers, and where it is.

    shape: in the model's order. rows: which of the stored tensor's rows (after a quantized layer's own order
    has been undone) are this tensor's; None for all.
    """

    file: Path
    source: str
    dtype: str
    shape: tuple[int, ...]
    rows: slice | None = None

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BITS[self.dtype] // 8


@dataclass(frozen=True)
class Checkpoint:
    """What `inspect` found.

    entries: canonical name -> Entry. A quantized layer has, in place of its weight, the tensors of its kind
        (quantized.py), with "wtscale" and "wcscales" where they will be one `channel_scale`.
    quantized: module -> "int8" | "fp8" | "svdq-int4" | "svdq-fp4".
    label: for people: "bf16", "int8 (quanto)", "int4 (Nunchaku, rank 256)".
    """

    files: tuple[Path, ...]
    entries: dict[str, Entry]
    quantized: dict[str, str]
    label: str

    def bytes_under(self, prefix: str = "", float_bits: int | None = None) -> int:
        """Bytes of the tensors whose names begin with `prefix`; what the parts of a fused layer share counts
        once. float_bits: what floats will be cast to."""
        sizes = {}
        for name, entry in self.entries.items():
            if name.startswith(prefix):
                cast = float_bits and entry.dtype in FLOATS and not name.endswith(("scale", "scales"))
                bits = float_bits if cast else DTYPE_BITS[entry.dtype]
                part = entry.rows.start if entry.rows else 0
                sizes[entry.file, entry.source, part] = math.prod(entry.shape) * (bits or 0) // 8
        return sum(sizes.values())

    def block_bytes(self, stack: str, float_bits: int | None = None) -> tuple[int, ...]:
        """Bytes of each repeated block of `stack` ("layers"), in order."""
        blocks = {
            int(m[1]) for name in self.entries if (m := re.match(rf"{re.escape(stack)}\.(\d+)\.", name))
        }
        return tuple(self.bytes_under(f"{stack}.{i}.", float_bits) for i in sorted(blocks))


@dataclass(frozen=True)
class _Stored:
    """A tensor as its file has it."""

    header: Header
    source: str
    dtype: str
    shape: tuple[int, ...]

    def refused(self, flaw: str) -> UserError:
        return UserError(f"{self.header.path} {flaw}: take another copy of the model.")


def _never(name: str) -> bool:
    return False


def inspect(
    paths: Sequence[Path],
    names: Names | None = None,
    *,
    expected: Mapping[str, Sequence[int]] | None = None,
    unused: Callable[[str], bool] = _never,
    allow_missing: Callable[[str], bool] = _never,
) -> Checkpoint:
    """What the files (or folders of shards) `paths` hold together. Reads headers only.

    expected: the model's tensors and their shapes; without it, files are not compared with the model.
    unused, allow_missing: tell by canonical name which tensors of the file the model leaves out by design,
    and which of the model the file may lack. Raises UserError with one sentence: what is wrong, and where.
    """
    names = names or Names()
    files = dict.fromkeys(file for path in paths for file in weight_files(Path(path), names.folder))
    headers = [read_header(file) for file in files]
    _check_family(headers, names)
    prefix = _prefix(headers, expected or names.known)
    modules = _modules(headers, names, prefix, unused)
    declared = {m: f for header in headers for m, f in _declared(header, names, prefix).items()}
    entries: dict[str, Entry] = {}
    quantized: dict[str, str] = {}
    for module, roles in modules.items():
        kind = _kind(module, roles, declared.get(module))
        targets = names.parts(module)
        for name, entry in _split(module, targets, _tensors(module, kind, roles)):
            if name in entries:
                source = roles[next(iter(roles))]
                raise source.refused(f"has the tensor '{name}' twice, once as '{source.source}'")
            entries[name] = entry
        if kind:
            quantized |= dict.fromkeys(targets, kind)
    checkpoint = Checkpoint(tuple(files), entries, quantized, _label(entries, quantized))
    return checkpoint if expected is None else _matched(checkpoint, names, expected, allow_missing)


# ---- which family ------------------------------------------------------------------------------------------


def _check_family(headers: Sequence[Header], names: Names) -> None:
    stored = [name for header in headers for name in header.entries]
    label = ", ".join(str(header.path) for header in headers)
    if names.known and not any(name.endswith(names.known) for name in stored):
        kinds = [(ADAPTER.pattern, "a LoRA"), *names.mistaken]
        found = next((kind for rule, kind in kinds if any(re.search(rule, n) for n in stored)), None)
        instead = found or "something else"
        raise UserError(f"{label} is not {names.family} but {instead}: choose a file of the model.")
    for header in headers:
        for name, entry in header.entries.items():
            if entry["dtype"] not in DTYPE_BITS:
                raise _unsupported(header.path, entry["dtype"], name)
            for rule, kind in OTHER_QUANTIZATIONS:
                if re.search(rule, name):
                    raise _unsupported(header.path, kind, name)


def _unsupported(path: Path, kind: str, name: str) -> UserError:
    return UserError(
        f"{path} is quantized as {kind} ('{name}'), which is not supported: take {WORKING_FORMATS}."
    )


def _prefix(headers: Sequence[Header], wanted: Mapping[str, Any] | Sequence[str]) -> str:
    """What stands before the model's own names ("model.", ...): what most of the names agree on."""
    known, votes = set(wanted), Counter[str]()
    for header in headers:
        for name in header.entries:
            parts = name.split(".")
            start = next((i for i in range(len(parts)) if ".".join(parts[i:]) in known), None)
            if start is not None:
                votes["".join(f"{part}." for part in parts[:start])] += 1
    return votes.most_common(1)[0][0] if votes else ""


# ---- which tensors belong together -------------------------------------------------------------------------


def _modules(
    headers: Sequence[Header], names: Names, prefix: str, unused: Callable[[str], bool]
) -> dict[str, dict[str, _Stored]]:
    """module -> role -> tensor. A role is one of ROLES' values or the tensor's own last name."""
    modules: dict[str, dict[str, _Stored]] = {}
    for header in headers:
        for source, raw in header.entries.items():
            name = names.canonical(source, prefix)
            if IGNORED.search(name) or re.search(names.dropped, name) or unused(name):
                continue
            module, role = _role(name)
            tensor = _Stored(header, source, raw["dtype"], tuple(raw["shape"]))
            other = modules.setdefault(module, {}).setdefault(role, tensor)
            if other is not tensor:
                where = f"'{other.source}' in {other.header.path.name}"
                raise tensor.refused(f"has the tensor '{source}', which is also there as {where}")
    return modules


def _role(name: str) -> tuple[str, str]:
    for end, role in ROLES.items():
        if name.endswith(f".{end}"):
            return name.removesuffix(f".{end}"), role
    module, _, last = name.rpartition(".")
    return module, last


def _declared(header: Header, names: Names, prefix: str) -> dict[str, str]:
    """module -> the format that the file's metadata, its map or its markers say the module has."""
    found = _quanto_map(header)
    if text := header.metadata.get("_quantization_metadata"):
        layers = _json_table(header.path, "_quantization_metadata", text).get("layers")
        found |= _formats(header.path, "_quantization_metadata", layers, "format")
    for source, raw in header.entries.items():
        if source.endswith(".comfy_quant"):
            begin, end = raw["data_offsets"]
            if end - begin > MAX_MARKER_BYTES:
                raise UserError(
                    f"{header.path} has {end - begin:,} bytes in '{source}', a marker needs fewer."
                )
            marker = _json_table(header.path, source, header.read(source))
            found |= _formats(header.path, source, {source.removesuffix(".comfy_quant"): marker}, "format")
    return {names.canonical(f"{name}.weight", prefix).removesuffix(".weight"): f for name, f in found.items()}


def _quanto_map(header: Header) -> dict[str, str]:
    """optimum-quanto's map: in the header, or beside the file as <name>_map.json."""
    sidecar = header.path.with_name(f"{header.path.stem}_map.json")
    if (encoded := header.metadata.get("quantization_map_base64")) is not None:
        key = "quantization_map_base64"
        try:
            text: str | bytes = base64.b64decode(encoded, validate=True)
        except ValueError as error:
            raise UserError(f"{header.path} has a damaged {key} ({error}): take another copy.") from error
    elif sidecar.is_file():
        key, text = sidecar.name, sidecar.read_bytes()
    else:
        return {}
    return _formats(header.path, key, _json_table(header.path, key, text), "weights")


def _json_table(path: Path, key: str, text: str | bytes) -> dict[str, Any]:
    try:
        table = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} has a damaged {key} ({error}): take another copy of the file.") from error
    if not isinstance(table, dict):
        raise UserError(f"{path} has a damaged {key} (it is not a table): take another copy of the file.")
    return table


def _formats(path: Path, key: str, table: Any, field_name: str) -> dict[str, str]:
    """layer -> table[layer][field_name], checked."""
    if not isinstance(table, dict):
        raise UserError(f"{path} has a damaged {key} (it names no layers): take another copy of the file.")
    for layer, row in table.items():
        if not isinstance(row, dict) or not isinstance(row.get(field_name), str):
            raise UserError(f"{path} has a damaged {key} ('{layer}' has no {field_name}): take another copy.")
    return {layer: row[field_name] for layer, row in table.items()}


# ---- how a layer is stored ---------------------------------------------------------------------------------


def _kind(module: str, roles: Mapping[str, _Stored], declared: str | None) -> str | None:
    """The kind of quantized layer that these tensors are; None: plain."""
    if "qweight" in roles:
        q, scales = roles["qweight"], roles.get("wscales")
        if q.dtype not in ("I8", "U8"):
            raise _unsupported(q.header.path, f"{q.dtype} words", q.source)
        return "svdq-fp4" if scales and scales.dtype in FLOAT8 else "svdq-int4"
    weight = roles.get("data") or roles.get("weight")
    if weight is None:
        return None
    if declared and "data" in roles:
        if declared not in QUANTO_TYPES:
            raise _unsupported(weight.header.path, f"optimum-quanto {declared}", weight.source)
        if QUANTO_TYPES[declared] != weight.dtype:
            raise weight.refused(f"calls {module} {declared} but stores '{weight.source}' as {weight.dtype}")
    elif declared and (weight.dtype not in FLOATS) and declared not in COMFY_FP8:
        raise _unsupported(weight.header.path, f"{declared} (ComfyUI)", weight.source)
    if "data" in roles and weight.dtype == "I8":
        return "int8"
    if weight.dtype in FLOAT8:
        return "fp8" if len(weight.shape) == 2 else None
    if weight.dtype not in FLOATS:
        raise _unsupported(weight.header.path, f"{weight.dtype} without a known scheme", weight.source)
    return None


#: what `_tensors` gives: (attribute, where it is, shape in the model's order, is it split with the rows?)
_Part = tuple[str, _Stored, tuple[int, ...], bool]


def _tensors(module: str, kind: str | None, roles: Mapping[str, _Stored]) -> list[_Part]:
    """The tensors that a module of this kind consists of, checked against each other."""
    if kind is None:
        return _plain(module, roles)
    parts = _nunchaku(module, kind, roles) if kind.startswith("svdq") else _scaled(module, roles)
    rows = parts[0][2][0]
    if bias := roles.get("bias"):
        _check(bias, (rows,), (*FLOATS, *FLOAT8))
        parts.append(("bias", bias, (rows,), True))
    known = {"data", "weight", "scale", "marker", "bias", "qweight", "wscales", "smooth", "down", "up"}
    extra = [t for role, t in roles.items() if role not in known | {"wtscale", "wcscales"}]
    if extra:
        raise extra[0].refused(
            f"has '{extra[0].source}' in a layer quantized as {kind}, which has no such tensor"
        )
    return parts


def _plain(module: str, roles: Mapping[str, _Stored]) -> list[_Part]:
    for role, tensor in roles.items():
        if role == "marker":
            continue
        if role in ROLES.values():
            raise tensor.refused(
                f"has '{tensor.source}' but no quantized weight of {module} that it belongs to"
            )
        if tensor.dtype not in FLOATS and tensor.dtype not in FLOAT8:
            raise _unsupported(tensor.header.path, f"{tensor.dtype} without a known scheme", tensor.source)
    return [(role, t, t.shape, True) for role, t in roles.items() if role != "marker"]


def _scaled(module: str, roles: Mapping[str, _Stored]) -> list[_Part]:
    """int8 or fp8: a weight [N, K] and its scale, one for all or one per row."""
    weight, scale = roles.get("data") or roles["weight"], roles.get("scale")
    if "data" in roles and "weight" in roles:
        raise weight.refused(
            f"has '{weight.source}' and '{roles['weight'].source}', two weights of one layer"
        )
    if len(weight.shape) != 2:
        raise weight.refused(f"has '{weight.source}' with the shape {list(weight.shape)} instead of [N, K]")
    parts: list[_Part] = [("weight", weight, weight.shape, True)]
    if scale is None and "data" in roles:
        raise weight.refused(f"has '{weight.source}' without its '{module}.weight._scale'")
    if scale is not None:
        rows = weight.shape[0]
        if math.prod(scale.shape) not in (1, rows) or scale.shape not in (
            (),
            (1,),
            (1, 1),
            (rows,),
            (rows, 1),
        ):
            raise scale.refused(f"has '{scale.source}' with the shape {list(scale.shape)} for {rows} rows")
        if scale.dtype not in FLOATS:
            raise _unsupported(scale.header.path, f"scales in {scale.dtype}", scale.source)
        per_row = math.prod(scale.shape) == rows
        parts.append(("weight_scale", scale, (rows, 1) if per_row else (1,), per_row))
    return parts


def _nunchaku(module: str, kind: str, roles: Mapping[str, _Stored]) -> list[_Part]:
    """Nunchaku's SVDQuant: 4-bit codes with group scales, smoothing and a low-rank branch."""
    q = roles["qweight"]
    for role in ("wscales", "smooth", "down", "up"):
        if role not in roles:
            raise q.refused(f"has '{q.source}' without the {role} of {module}")
    if "weight" in roles or "data" in roles:
        raise q.refused(f"has '{q.source}' and a second weight of {module}")
    if (
        len(q.shape) != 2
        or q.shape[0] % NUNCHAKU_TILE
        or q.shape[1] * 2 % NUNCHAKU_TILE
        or not math.prod(q.shape)
    ):
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
    parts: list[_Part] = [
        ("qweight", q, q.shape, True),
        ("wscales", roles["wscales"], (rows, groups), True),
        ("smooth", roles["smooth"], (columns,), False),
        ("down", roles["down"], (rank, columns), False),
        ("up", roles["up"], (rows, rank), True),
    ]
    if tensor := roles.get("wtscale"):
        _check(tensor, () if not tensor.shape else (1,), floats)
        parts.append(("wtscale", tensor, (1,), False))
    if tensor := roles.get("wcscales"):
        _check(tensor, (rows,), floats)
        parts.append(("wcscales", tensor, (rows,), True))
    return parts


def _check(tensor: _Stored, shape: tuple[int, ...], dtypes: Sequence[str]) -> None:
    if tensor.shape != shape:
        raise tensor.refused(
            f"has '{tensor.source}' with the shape {list(tensor.shape)} instead of {list(shape)}"
        )
    if tensor.dtype not in dtypes:
        raise tensor.refused(f"has '{tensor.source}' as {tensor.dtype} instead of {' or '.join(dtypes)}")


def _split(module: str, targets: Sequence[str], parts: Sequence[_Part]) -> Iterator[tuple[str, Entry]]:
    """The parts of a stored module as entries of the model's modules, whose rows it holds one after
    another.
    """
    for attribute, tensor, shape, by_rows in parts:
        rows = shape[0] if shape else 0
        if by_rows and len(targets) > 1 and (not rows or rows % len(targets)):
            raise tensor.refused(
                f"has '{tensor.source}' with {rows} rows, not {len(targets)} equal parts for {module}"
            )
        count = rows // len(targets)
        for i, target in enumerate(targets):
            part, part_shape = None, shape
            if by_rows and len(targets) > 1:
                part, part_shape = slice(i * count, (i + 1) * count), (count, *shape[1:])
            name = f"{target}.{attribute}" if target else attribute
            yield name, Entry(tensor.header.path, tensor.source, tensor.dtype, part_shape, part)


# ---- the whole ---------------------------------------------------------------------------------------------


def _label(entries: Mapping[str, Entry], quantized: Mapping[str, str]) -> str:
    if quantized:
        return " + ".join(sorted({_layer_label(entries, *item) for item in quantized.items()}))
    sizes = Counter[str]()
    for entry in entries.values():
        sizes[entry.dtype] += entry.bytes
    return FLOATS.get(sizes.most_common(1)[0][0], "fp8") if sizes else "empty"


def _layer_label(entries: Mapping[str, Entry], module: str, kind: str) -> str:
    if kind.startswith("svdq"):
        return f"{kind.removeprefix('svdq-')} (Nunchaku, rank {entries[f'{module}.up'].shape[1]})"
    if kind == "int8":
        return "int8 (quanto)"
    return "fp8 (scaled)" if f"{module}.weight_scale" in entries else "fp8"


def _matched(
    checkpoint: Checkpoint,
    names: Names,
    expected: Mapping[str, Sequence[int]],
    allow_missing: Callable[[str], bool],
) -> Checkpoint:
    """The checkpoint without what the model does not know. UserError unless it has all the model needs."""
    label = ", ".join(file.name for file in checkpoint.files)
    held = _weight_shapes(checkpoint)
    missing = [name for name in expected if name not in held and not allow_missing(name)]
    extra = [name for name in held if name not in expected]
    own = {name.partition(".")[0] for name in expected}
    alien = next((name for name in extra if name.partition(".")[0] in own), None)
    for name, (shape, entry) in held.items():
        if name in expected and not _same_shape(shape, tuple(expected[name])):
            raise UserError(
                f"{label} is of another size than its card says ({name}, stored as '{entry.source}', is "
                f"{list(shape)}; {names.family} has {list(expected[name])}): check the card."
            )
    if missing:
        raise UserError(
            f"{label} lacks {len(missing)} of the {len(expected)} tensors of {names.family} "
            f"(first: {missing[0]}): it is a file of another model, or incomplete."
        )
    if alien:
        raise UserError(
            f"{label} has {alien}, which {names.family} of this size does not have: check the card's "
            "configuration, or take the model that the card names."
        )
    if extra:
        log.warning(
            "%s has %d tensors that this model does not know (first: %s).", label, len(extra), extra[0]
        )
    gone = {
        name.removesuffix(".weight") for name in extra if name.removesuffix(".weight") in checkpoint.quantized
    }
    entries = {
        name: entry
        for name, entry in checkpoint.entries.items()
        if name in expected or (m := name.rpartition(".")[0]) in checkpoint.quantized and m not in gone
    }
    quantized = {module: kind for module, kind in checkpoint.quantized.items() if module not in gone}
    return Checkpoint(checkpoint.files, entries, quantized, checkpoint.label)


def _weight_shapes(checkpoint: Checkpoint) -> dict[str, tuple[tuple[int, ...], Entry]]:
    """The model's tensors that the checkpoint holds: (shape, entry), a quantized layer as weight and bias."""
    held: dict[str, tuple[tuple[int, ...], Entry]] = {}
    for name, entry in checkpoint.entries.items():
        module, _, last = name.rpartition(".")
        if module not in checkpoint.quantized or last in ("weight", "bias"):
            held[name] = entry.shape, entry
        elif last == "qweight":
            held[f"{module}.weight"] = (entry.shape[0], entry.shape[1] * 2), entry
    return held


def _same_shape(shape: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Ones apart: [D] fits [1, D], and a linear layer may be stored as a 1x1 convolution."""
    return shape == other or [n for n in shape if n != 1] == [n for n in other if n != 1]
