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
from shared.settings.messages import printable
from shared.weights.files import DTYPE_BITS, Header, RefusedFile, read_header, unsupported, weight_files
from shared.weights.layouts import FLOATS, ROLES, Part, Stored, kind_of, parts_of

log = logging.getLogger(__name__)

MAX_MARKER_BYTES = 4096
ANOTHER_COPY = "take another copy of the file"
HALVES = ("BF16", "F16")
LARGE = 1 << 30  # bytes of 16-bit weights; smaller models are faster with float32 copies, larger ones leaner
#: tensors that no weight depends on: activations' scales, the copy of Nunchaku's smoothing, ComfyUI's
#: sentinel
IGNORED = re.compile(
    r"(^|\.)(input_scale|output_scale|scale_input|smooth_factor_orig|smooth_orig|scaled_fp8)$"
)
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
    quantizable: modules that `quantize` and `save_quantized` quantize.
    as_stored: tensors that keep the file's dtype, because few of their rows are used, which are cast then.
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
    as_stored: str = r"(?!)"

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

    @property
    def is_large(self) -> bool:
        """Whether its weights in 16 bits are too many to be kept in 32."""
        halves = [entry.bytes for entry in self.entries.values() if entry.dtype in HALVES]
        return sum(halves) >= LARGE

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
        kind = kind_of(module, roles, declared.get(module))
        targets = names.parts(module)
        for name, entry in _split(module, targets, parts_of(module, kind, roles)):
            if name in entries:
                names_of_it = f"as '{entries[name].source}' and as '{entry.source}'"
                flaw = f"has the tensor '{name}' twice, {names_of_it}"
                raise RefusedFile(entry.file, flaw, "take another copy of the model")
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
        for name in header.entries:
            for rule, kind in OTHER_QUANTIZATIONS:
                if re.search(rule, name):
                    raise unsupported(header.path, kind, name)


def _prefix(headers: Sequence[Header], wanted: Mapping[str, Any] | Sequence[str]) -> str:
    """What stands before the model's own names ("model.", ...): what most of the names agree on."""
    known, votes = set(wanted), Counter[str]()
    for header in headers:
        for name in header.entries:
            starts = (0, *(match.end() for match in re.finditer(r"\.", name)))
            start = next((i for i in starts if name[i:] in known), None)
            if start is not None:
                votes[name[:start]] += 1
    return votes.most_common(1)[0][0] if votes else ""


# ---- which tensors belong together -------------------------------------------------------------------------


def _modules(
    headers: Sequence[Header], names: Names, prefix: str, unused: Callable[[str], bool]
) -> dict[str, dict[str, Stored]]:
    """module -> role -> tensor. A role is one of ROLES' values or the tensor's own last name."""
    modules: dict[str, dict[str, Stored]] = {}
    for header in headers:
        for source, raw in header.entries.items():
            name = names.canonical(source, prefix)
            if name == source and not name.startswith(prefix):
                continue  # another part of an all-in-one file
            if IGNORED.search(name) or re.search(names.dropped, name) or unused(name):
                continue
            module, role = _role(name)
            tensor = Stored(header, source, raw["dtype"], tuple(raw["shape"]))
            other = modules.setdefault(module, {}).setdefault(role, tensor)
            if other is not tensor:
                raise _twice(tensor, other)
    return modules


def _twice(tensor: Stored, other: Stored) -> UserError:
    if other.header is tensor.header:
        return tensor.refused(f"has the tensor '{tensor.source}', which is also there as '{other.source}'")
    both = f"{other.header.path} and {tensor.header.path.name}"
    flaw = f"both have the tensor '{tensor.source}'"
    return RefusedFile(both, flaw, "they are two models, choose one of the files")


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
                flaw = f"has {end - begin:,} bytes in '{source}', a marker needs fewer"
                raise RefusedFile(header.path, flaw, ANOTHER_COPY)
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
            raise RefusedFile(header.path, f"has a damaged {key} ({error})", ANOTHER_COPY) from error
    elif sidecar.is_file():
        key, text = sidecar.name, sidecar.read_bytes()
    else:
        return {}
    return _formats(header.path, key, _json_table(header.path, key, text), "weights")


def _json_table(path: Path, key: str, text: str | bytes) -> dict[str, Any]:
    try:
        table = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RefusedFile(path, f"has a damaged {key} ({error})", ANOTHER_COPY) from error
    if not isinstance(table, dict):
        raise RefusedFile(path, f"has a damaged {key} (it is not a table)", ANOTHER_COPY)
    return table


def _formats(path: Path, key: str, table: Any, field_name: str) -> dict[str, str]:
    """layer -> table[layer][field_name], checked."""
    if not isinstance(table, dict):
        raise RefusedFile(path, f"has a damaged {key} (it names no layers)", ANOTHER_COPY)
    for layer, row in table.items():
        if not isinstance(row, dict) or not isinstance(row.get(field_name), str):
            flaw = f"has a damaged {key} ('{printable(layer)}' has no {field_name})"
            raise RefusedFile(path, flaw, ANOTHER_COPY)
    return {layer: row[field_name] for layer, row in table.items()}


def _split(module: str, targets: Sequence[str], parts: Sequence[Part]) -> Iterator[tuple[str, Entry]]:
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
            stored = f"({name}, stored as '{entry.source}', is {list(shape)}; "
            wanted = f"{names.family} has {list(expected[name])})"
            flaw = f"is of another size than its card says {stored}{wanted}"
            raise RefusedFile(label, flaw, "check the card")
    if missing:
        raise UserError(
            f"{label} lacks {len(missing)} of the {len(expected)} tensors of {names.family} "
            f"(first: {missing[0]}): it is a file of another model, or incomplete."
        )
    if alien:
        raise UserError(
            f"{label} has {printable(alien, 100)}, which {names.family} of this size does not have: check "
            "the card's configuration, or take the model that the card names."
        )
    if extra:
        log.warning(
            "%s has %d tensors that this model does not know (first: %s).",
            label,
            len(extra),
            printable(extra[0]),
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
