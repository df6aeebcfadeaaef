"""What a LoRA file holds, from its safetensors header alone: modules, algorithms, ranks, scales. No torch.

Of the tensors only the alphas (single numbers) are read. Whatever is wrong with the file is found here, so
that it is told when the file is chosen and not when a picture is made.
"""

from __future__ import annotations

import functools
import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from shared.errors import UserError
from shared.loras.names import ModelNames, Part, Target, foreign_family, is_text_encoder
from shared.loras.peft import PeftConfig, read_config
from shared.settings.messages import printable
from shared.weights.files import DamagedFile, Header, RefusedFile, read_header

LORA_SUFFIXES = (".safetensors", ".sft")

# The end of a key by the factor it names; ".default" (PEFT's adapter name) is taken out before.
SPELLINGS = {
    "down": (".lora_A.weight", ".lora_down.weight", ".lora.A.weight", ".lora.down.weight",
             "_lora.down.weight", "_lora.down", ".lora_linear_layer.down.weight", ".lora_A", ".lora_down"),
    "up": (".lora_B.weight", ".lora_up.weight", ".lora.B.weight", ".lora.up.weight", "_lora.up.weight",
           "_lora.up", ".lora_linear_layer.up.weight", ".lora_B", ".lora_up"),
    "alpha": (".alpha",),
    "magnitude": (".dora_scale", ".magnitude", ".lora_magnitude_vector", ".lora_magnitude_vector.weight"),
    **{name: (f".{name}",) for name in (
        "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2",
        "lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t1", "lokr_t2",
        "oft_blocks", "oft_diag", "rescale", "diff", "diff_b", "w_norm", "b_norm", "set_weight", "on_input",
    )},
    "oft_R": (".oft_R.weight", ".oft_R"),
    "scaled_oft": (".oft_R.scaled_oft", ".scaled_oft"),
    "boft_R": (".boft_R",),
    "boft_s": (".boft_s",),
    "mid": (".lora_mid.weight",),
    "up_bias": (".lora_B.bias",),
    **{f"glora_{name}": (f".{name}.weight",) for name in ("a1", "a2", "b1", "b2")},
}  # fmt: skip
FACTOR = {spelling: factor for factor, spellings in SPELLINGS.items() for spelling in spellings}
SPELLING_LENGTHS = sorted({len(spelling) for spelling in FACTOR}, reverse=True)
# PEFT's name for an adapter, "default" or what its user called it, behind the factor's own name.
ADAPTER_NAME = re.compile(
    r"(?<=\.)(lora_[AB]|lora_magnitude_vector|hada_w[12]_[ab]|lokr_w[12](?:_[ab])?|oft_R|boft_[Rs])"
    r"\.(?!weight$|bias$|scaled_oft$)([^.]+)(?=\.weight$|\.bias$|$)"
)
# Attention processors of old diffusers held the LoRAs of the attention that they belonged to.
PROCESSOR = re.compile(r"([._])processor[._](?=to_(?:q|k|v|out)$)")

LOKR_SIDES = {
    f"w{n}": (frozenset({f"lokr_w{n}"}), frozenset({f"lokr_w{n}_a", f"lokr_w{n}_b"})) for n in (1, 2)
}
# The sets of factors that make up each algorithm.
ALGORITHMS: dict[str, tuple[frozenset[str], ...]] = {
    "LoRA": (frozenset({"down", "up"}),),
    "LoHa": (frozenset({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}),),
    "LoKr": tuple(one | two for one in LOKR_SIDES["w1"] for two in LOKR_SIDES["w2"]),
    "OFT": (frozenset({"oft_blocks"}), frozenset({"oft_blocks", "rescale"}), frozenset({"oft_R"})),
    "BOFT": (frozenset({"boft_R", "boft_s"}),),
    "diff": (frozenset({"diff"}), frozenset({"w_norm"})),
}
BIASES = ("diff_b", "b_norm")
UNSUPPORTED = {
    "hada_t1": "it is a convolution's (Tucker) LoHa",
    "hada_t2": "it is a convolution's (Tucker) LoHa",
    "lokr_t1": "it is a convolution's (Tucker) LoKr",
    "lokr_t2": "it is a convolution's (Tucker) LoKr",
    "mid": "it is a convolution's (Tucker) LoRA",
    "oft_diag": "it is kohya's older form of OFT",
    "set_weight": "it replaces the weight instead of changing it",
    "on_input": "it is an IA3 adapter",
    "up_bias": "its LoRA has a bias of its own",
    **{f"glora_{name}": "it is a GLoRA adapter" for name in ("a1", "a2", "b1", "b2")},
}
FLOATS = ("F16", "BF16", "F32", "F64", "F8_E4M3", "F8_E5M2")
# How Python's struct reads one number. Bytes in front make a number of the next larger kind of it.
SCALARS = {
    "F16": "<e", "F32": "<f", "F64": "<d", "BOOL": "<?", "U8": "<B", "I8": "<b", "U16": "<H", "I16": "<h",
    "U32": "<I", "I32": "<i", "U64": "<Q", "I64": "<q", "BF16": "<f", "F8_E5M2": "<e",
}  # fmt: skip
IN_FRONT = {"BF16": 2, "F8_E5M2": 1}
TURNS_INPUTS = frozenset({"oft_R", "boft_R"})  # PEFT's, which have no alpha
MARKS = ("alpha", "scaled_oft")  # numbers that say how the factors are meant

# What a file that is no safetensors begins with.
MAGIC = (
    (b"PK\x03\x04", "is a pickle or zip archive, which may run code when it is opened"),
    (b"\x80", "is a Python pickle, which may run code when it is opened"),
    (b"<", "is a web page, perhaps the login page of the site it came from"),
    (b"GGUF", "is a GGUF file"),
    (b"version https://git-lfs", "is only the pointer to a file in Git LFS"),
    (b"{", "is JSON text"),
)


MAX_KEYS = 8000  # every module of the model and of its text encoder has a few
MAX_SHOWN = 80  # characters of a name in a sentence
MAX_SENTENCE = 190  # of all that is said about a file, without its name
MAX_FILE_NAME = 100


class Flaw(Exception):
    """Why a module is damaged, without its name: its file is refused."""


class Unused(Exception):
    """Why a whole module is left out."""


class Misfit(Unused):
    """It is made for weights of another size."""


class OtherSize(UserError):
    """A file that is no use because it is made for a model of another size."""


@dataclass(frozen=True)
class Source:
    """One tensor of the file. `begin`: of its bytes, from the start of the file."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    begin: int

    @property
    def called(self) -> str:
        """The key in a sentence."""
        return printable(self.key, MAX_SHOWN)

    @property
    def matrix(self) -> tuple[int, ...]:
        """The shape without the trailing ones of a 1 x 1 convolution."""
        shape = self.shape
        while len(shape) > 2 and shape[-1] == 1:
            shape = shape[:-1]
        return shape


@dataclass(frozen=True)
class Module:
    """One module of the file. `algorithm` is "" where only a bias is changed.

    scale: multiplies the delta; an OFT's angles, as OneTrainer's "scaled OFT" divides them by 2 sqrt(b - 1).

    parts: the modules of the model to change. magnitude: the axis that a DoRA's has, "out" or "in", or "".
    """

    target: Target
    parts: tuple[Part, ...]
    factors: dict[str, Source]
    algorithm: str
    rank: int | None = None
    alpha: float | None = None
    scale: float = 1.0
    magnitude: str = ""

    @property
    def label(self) -> str:
        return "DoRA" if self.magnitude else self.algorithm or "diff"


@dataclass(frozen=True)
class LeftOut:
    """Modules of the file that are not used, by the names that the file has for them (`printable`)."""

    names: tuple[str, ...]
    reason: str
    misfit: bool = False

    def __str__(self) -> str:
        more = f" and {len(self.names) - 1} more" if len(self.names) > 1 else ""
        return f"{self.names[0]}{more}: {self.reason}"


@dataclass(frozen=True)
class Layout:
    """A file that can be used, at least in part. `prefixes`, `spellings`: how its keys are written."""

    path: Path
    modules: tuple[Module, ...]
    left_out: tuple[LeftOut, ...]
    metadata: dict[str, str]
    prefixes: frozenset[str]
    spellings: frozenset[str]
    peft: PeftConfig | None = None

    @property
    def total(self) -> int:
        return len(self.modules) + sum(len(item.names) for item in self.left_out)


# ---------------------------------------------------------------- the file


def read_layout(path: Path, names: ModelNames) -> Layout:
    """What the LoRA file at `path` does to the model of `names`.

    Raises UserError with the nearest reason when it can do nothing, or is damaged.
    """
    path = Path(path)
    header = _header(path)
    if len(header.entries) > MAX_KEYS:
        many = f"{len(header.entries):,} tensors, at most {MAX_KEYS:,} are read"
        raise _refused(path, f"is no LoRA: it has {many}")
    keys = _Keys(names)
    try:
        for key, entry in header.entries.items():
            keys.add(key, entry, header.data_start)
        peft = read_config(path, header.metadata, keys.prefixes)
        with path.open("rb") as file:
            modules, left_out = _modules(file, keys, peft)
    except Flaw as flaw:
        raise _refused(path, f"is damaged: {flaw}") from flaw
    modules, doubled = _once(modules)
    left_out += doubled + _strangers(keys, names)
    if not modules:
        kind = OtherSize if any(item.misfit for item in left_out) else UserError
        raise _refused(path, _refusal(keys, left_out, names), kind)
    prefixes, spellings = frozenset(keys.prefixes), frozenset(keys.spellings)
    return Layout(path, tuple(modules), tuple(left_out), header.metadata, prefixes, spellings, peft)


def _header(path: Path) -> Header:
    """UserError for what is no whole safetensors file."""
    if path.suffix.lower() not in LORA_SUFFIXES:
        raise _refused(path, f"is not a {' or '.join(LORA_SUFFIXES)} file: other kinds are not opened")
    if not path.is_file():
        raise _refused(path, "cannot be read (there is no such file)")
    try:
        return read_header(path)
    except DamagedFile as error:
        raise _refused(path, f"{_flaw_of(path, error)}: fetch the file again") from error
    except RefusedFile as error:
        raise _refused(path, error.flaw) from error
    except OSError as error:
        raise _refused(path, f"cannot be read ({error.strerror or error})") from error


def _refused(path: Path, reason: str, kind: type[UserError] = UserError) -> UserError:
    """One sentence of at most 300 characters, whatever the file and its name hold."""
    return kind(f"{printable(path.name, MAX_FILE_NAME)} {printable(reason, MAX_SENTENCE)}.")


def _flaw_of(path: Path, error: DamagedFile) -> str:
    with path.open("rb") as file:
        begin = file.read(64)
    if 8 + int.from_bytes(begin[:8], "little") <= path.stat().st_size:
        return error.flaw  # it has a header: its first bytes are a length, whatever they look like
    begin = begin.removeprefix(b"\xef\xbb\xbf").lstrip()
    return next((words for magic, words in MAGIC if begin.startswith(magic)), error.flaw)


class _Keys:
    """The keys of a file, sorted: factors by module, and how they are written."""

    def __init__(self, names: ModelNames) -> None:
        self.names = names
        self.groups: dict[str, dict[str, Source]] = {}  # by the target's name, or the file's for strangers
        self.targets: dict[str, Target] = {}
        self.prefixes: set[str] = set()
        self.spellings: set[str] = set()
        self.plain: list[str] = []  # keys that end like no adapter's

    def add(self, key: str, entry: Mapping[str, Any], data_start: int) -> None:
        """Flaw when the module has this factor already, under another spelling."""
        named = ADAPTER_NAME.search(key)
        found_ends = _taken_apart(ADAPTER_NAME.sub(r"\1", key) if named else key)
        if found_ends is None:
            self.plain.append(key)
            return
        stem, spelling = found_ends
        if "processor" in stem:
            stem = PROCESSOR.sub(r"\1", stem)
        name_of_it = "" if named is None else " default" if named[2] == "default" else " named"
        self.spellings.add(spelling + name_of_it)
        name, found = stem, self.names.resolve(stem)
        if found is not None:
            prefix, target = found
            name = target.name
            self.prefixes.add(prefix)
            self.targets[name] = target
        source = Source(key, entry["dtype"], tuple(entry["shape"]), data_start + entry["data_offsets"][0])
        other = self.groups.setdefault(name, {}).setdefault(FACTOR[spelling], source)
        if other is not source and found is not None:
            raise Flaw(f"{name} has the same factor twice, as {other.called} and as {source.called}")

    @functools.cached_property
    def strangers(self) -> tuple[list[str], list[str]]:
        """The modules that the model lacks: a text encoder's, and the others. Ask when all keys are added."""
        names = [name for name in self.groups if name not in self.targets]
        encoder = {name for name in names if is_text_encoder(name)}
        others = [name for name in names if name not in encoder]
        return [name for name in names if name in encoder], others


def _taken_apart(key: str) -> tuple[str, str] | None:
    """(module, the longest spelling of a factor that the key ends in); None where it ends in none."""
    for length in SPELLING_LENGTHS:
        if key[-length:] in FACTOR:
            return key[:-length], key[-length:]
    return None


# ---------------------------------------------------------------- one module


def _modules(file: BinaryIO, keys: _Keys, peft: PeftConfig | None) -> tuple[list[Module], list[LeftOut]]:
    """The usable modules, and the others by reason. Flaw, with the module's name, when one is damaged."""
    modules: list[Module] = []
    reasons: dict[tuple[str, bool], list[str]] = {}
    for name, target in keys.targets.items():
        try:
            modules.append(_module(file, target, keys.groups[name], peft))
        except Unused as error:
            reasons.setdefault((str(error), isinstance(error, Misfit)), []).append(name)
        except Flaw as flaw:
            raise Flaw(f"{name} {flaw}") from flaw
    return modules, [LeftOut(tuple(names), *reason) for reason, names in reasons.items()]


def _module(file: BinaryIO, target: Target, group: Mapping[str, Source], peft: PeftConfig | None) -> Module:
    for factor, source in group.items():
        if factor in UNSUPPORTED:
            raise Unused(UNSUPPORTED[factor])
        if factor not in MARKS and source.dtype not in FLOATS:
            raise Flaw(f"stores {source.called} as {source.dtype}; expected {', '.join(FLOATS)}")
    factors = {factor: source for factor, source in group.items() if factor not in MARKS}
    algorithm = _algorithm(factors)
    shape, rank = SHAPES[algorithm](factors)
    alpha = None
    if "alpha" in group and rank is not None and not TURNS_INPUTS & factors.keys():
        alpha = _scalar(file, group["alpha"])
    _check_bias(target, factors)
    _check_fits(target, shape)
    if "oft_blocks" in factors and any(part.rows and part.rows[0] % _reach(factors) for part in target.parts):
        raise Unused(f"the blocks of its {algorithm} reach over the layers that were stacked")
    if "scaled_oft" in group and "oft_R" not in factors:
        raise Unused("it is marked as a scaled OFT and has no oft_R")
    if "scaled_oft" in group and _is_true(file, group["scaled_oft"]):
        assert rank is not None
        scale = 1 / (2 * math.sqrt(rank - 1))
    else:
        scale, alpha = _scale(target.name, algorithm, rank, alpha, peft)
    axis = _magnitude_axis(target, factors["magnitude"]) if "magnitude" in factors else ""
    return Module(target, target.parts, factors, algorithm, rank, alpha, scale, axis)


def _algorithm(factors: Mapping[str, Source]) -> str:
    """The one algorithm whose factors are all there; "" for a bias alone."""
    present = {
        name: given
        for name, forms in ALGORITHMS.items()
        if (given := factors.keys() & frozenset().union(*forms))
    }
    if len(present) > 1:
        raise Flaw(f"mixes the factors of {' and '.join(present)}")
    for name, given in present.items():
        if given in ALGORITHMS[name]:
            return "BOFT" if "oft_blocks" in given and len(factors["oft_blocks"].shape) == 4 else name
        nearest = min(ALGORITHMS[name], key=lambda form: len(form ^ given))
        missing = sorted(nearest - given)
        if missing:
            has = ", ".join(
                factors[factor].called.rpartition(".weight")[0] or factors[factor].called for factor in given
            )
            raise Flaw(f"has {has} without the factor {' and '.join(missing)} that belongs to it")
        raise Flaw(f"has {' and '.join(sorted(given))}, of which only some can be meant")
    if "magnitude" in factors:
        raise Flaw("has a DoRA's magnitude without its factors")
    if not factors:
        raise Unused("it has an alpha and nothing else, so it does nothing")
    return ""


def _scale(
    name: str, algorithm: str, rank: int | None, alpha: float | None, peft: PeftConfig | None
) -> tuple[float, float | None]:
    """(what multiplies the delta, the alpha that counts): alpha / rank, or 1 where there is no alpha.

    A LoKr whose two factors are full has no rank; trainers write any alpha there. An OFT's alpha is a limit.
    """
    if algorithm in ("OFT", "BOFT"):
        return 1.0, alpha
    scale = 1.0
    if alpha is not None and rank is not None:
        scale = alpha / rank
    elif peft is not None:
        scale = peft.scale(name, algorithm, rank)
    if scale == 0:
        raise Unused("its alpha is 0, so it does nothing")
    return scale, alpha


def _is_true(file: BinaryIO, source: Source) -> bool:
    """Whether a mark is set: it is by being there, unless it is a number and 0."""
    return math.prod(source.shape) != 1 or _scalar(file, source) != 0


def _scalar(file: BinaryIO, source: Source) -> float:
    """The value of a tensor of one number. The only data that is read here."""
    if math.prod(source.shape) != 1 or source.dtype not in (*SCALARS, "F8_E4M3"):
        raise Flaw(f"has an alpha of {source.dtype} {list(source.shape)}; expected one number")
    file.seek(source.begin)
    if source.dtype == "F8_E4M3":
        value = _e4m3(file.read(1)[0])
    else:
        form, missing = SCALARS[source.dtype], IN_FRONT.get(source.dtype, 0)
        (value,) = struct.unpack(form, bytes(missing) + file.read(struct.calcsize(form) - missing))
    if not math.isfinite(value):
        raise Flaw(f"has the alpha {value}")
    return float(value)


def _e4m3(byte: int) -> float:
    """One float8 of 4 bits of exponent (bias 7) and 3 of mantissa, which has no infinity and one NaN."""
    sign, exponent, mantissa = 1 - 2 * (byte >> 7), byte >> 3 & 15, byte & 7
    if byte & 127 == 127:
        return math.nan
    return sign * (math.ldexp(8 + mantissa, exponent - 10) if exponent else math.ldexp(mantissa, -9))


# ---------------------------------------------------------------- shapes

Shape = tuple[int | None, ...]  # [out, in] or [dim]; None where the factors leave it open


def _product(left: Source, right: Source) -> tuple[int, int, int]:
    """(rows, inner, columns) of left [rows, inner] @ right [inner, columns]."""
    if len(left.matrix) != 2 or len(right.matrix) != 2:
        raise Flaw(f"has factors of shapes {list(left.shape)} and {list(right.shape)}; expected two matrices")
    (rows, inner), (other, columns) = left.matrix, right.matrix
    if inner != other:
        raise Flaw(f"has factors of different ranks: {left.called} of {inner}, {right.called} of {other}")
    if inner == 0:
        raise Flaw("has rank 0")
    return rows, inner, columns


def _lora_shape(factors: Mapping[str, Source]) -> tuple[Shape, int | None]:
    rows, rank, columns = _product(factors["up"], factors["down"])
    return (rows, columns), rank


def _loha_shape(factors: Mapping[str, Source]) -> tuple[Shape, int | None]:
    rows, rank, columns = _product(factors["hada_w1_a"], factors["hada_w1_b"])
    other = _product(factors["hada_w2_a"], factors["hada_w2_b"])
    if (rows, columns) != (other[0], other[2]):
        raise Flaw(f"multiplies matrices of {rows} x {columns} and {other[0]} x {other[2]}")
    return (rows, columns), rank


def _lokr_shape(factors: Mapping[str, Source]) -> tuple[Shape, int | None]:
    sides: list[tuple[int, int]] = []
    rank = None  # of the second side where that is a product, else of the first
    for side in ("lokr_w1", "lokr_w2"):
        if side in factors:
            matrix = factors[side].matrix
            if len(matrix) != 2:
                raise Flaw(f"has {side} of shape {list(matrix)}; expected a matrix")
            sides.append((matrix[0], matrix[1]))
        else:
            rows, rank, columns = _product(factors[f"{side}_a"], factors[f"{side}_b"])
            sides.append((rows, columns))
    (out1, in1), (out2, in2) = sides
    return (out1 * out2, in1 * in2), rank


def _oft_shape(factors: Mapping[str, Source]) -> tuple[Shape, int | None]:
    if "oft_R" in factors:  # PEFT: the upper triangles of blocks along the inputs; one may serve all blocks
        shape = factors["oft_R"].shape
        size = oft_block_size(shape[1]) if len(shape) == 2 else 0
        if size == 0:
            raise Flaw(f"has oft_R of shape {list(shape)}; expected triangles of square blocks")
        return (None, None if shape[0] == 1 else shape[0] * size), size
    shape = factors["oft_blocks"].shape
    if len(shape) != 3 or shape[1] != shape[2] or 0 in shape:
        raise Flaw(f"has oft_blocks of shape {list(shape)}; expected square blocks")
    if "rescale" in factors and math.prod(factors["rescale"].shape) != shape[0] * shape[1]:
        raise Flaw(f"has {shape[0] * shape[1]} outputs and a rescale of {list(factors['rescale'].shape)}")
    return (shape[0] * shape[1], None), shape[1]


def _boft_shape(factors: Mapping[str, Source]) -> tuple[Shape, int | None]:
    """A butterfly [stages, blocks, b, b]: of the outputs (LyCORIS), or of the inputs (PEFT), whose boft_s
    rescales the outputs.
    """
    name = "boft_R" if "boft_R" in factors else "oft_blocks"
    shape = factors[name].shape
    if len(shape) != 4 or shape[2] != shape[3] or 0 in shape:
        raise Flaw(f"has {name} of shape {list(shape)}; expected stages of square blocks")
    stages, blocks, size, _ = shape
    if stages > 1 and (stages > blocks.bit_length() or blocks % 2 ** (stages - 1) or size % 2):
        raise Flaw(f"has {name} of shape {list(shape)}, whose last stages reach over more than all blocks")
    if name == "boft_R":
        return (math.prod(factors["boft_s"].shape), blocks * size), size
    if "rescale" in factors and math.prod(factors["rescale"].shape) != blocks * size:
        raise Flaw(f"has {blocks * size} outputs and a rescale of {list(factors['rescale'].shape)}")
    return (blocks * size, None), size


def _reach(factors: Mapping[str, Source]) -> int:
    """How many rows the widest rotation of oft_blocks mixes."""
    *stages, _, size, _ = factors["oft_blocks"].shape
    return size * 2 ** (stages[0] - 1 if stages else 0)


def oft_block_size(elements: int) -> int:
    """The side b of a square block whose upper triangle has b (b - 1) / 2 elements; 0 when there is none."""
    size = (1 + math.isqrt(1 + 8 * elements)) // 2
    return size if elements > 0 and size * (size - 1) // 2 == elements else 0


def _diff_shape(factors: Mapping[str, Source]) -> tuple[Shape, int | None]:
    return (factors["diff"].matrix if "diff" in factors else factors["w_norm"].matrix), None


def _no_shape(factors: Mapping[str, Source]) -> tuple[Shape, int | None]:
    return (None, None), None


SHAPES = {
    "LoRA": _lora_shape,
    "LoHa": _loha_shape,
    "LoKr": _lokr_shape,
    "OFT": _oft_shape,
    "BOFT": _boft_shape,
    "diff": _diff_shape,
    "": _no_shape,
}


def _check_fits(target: Target, shape: Shape) -> None:
    if len(shape) == len(target.shape) and all(
        a in (None, b) for a, b in zip(shape, target.shape, strict=True)
    ):
        return
    came = " x ".join("?" if size is None else str(size) for size in shape)
    raise Misfit(f"it is made for {came} weights, the model's are {' x '.join(map(str, target.shape))}")


def _check_bias(target: Target, factors: Mapping[str, Source]) -> None:
    for bias in BIASES:
        if bias not in factors:
            continue
        if len(target.shape) == 1:
            raise Unused("it changes a bias, and this norm has none")
        if factors[bias].shape != target.shape[:1]:
            raise Flaw(f"has {bias} of shape {list(factors[bias].shape)}; expected {list(target.shape[:1])}")


def _magnitude_axis(target: Target, source: Source) -> str:
    """The axis that a DoRA's magnitudes belong to: "out" for [out] and [out, 1], "in" for [1, in]."""
    if len(target.shape) != 2:
        raise Unused("it is a norm's DoRA, which has no rows and columns")
    out, columns = target.shape
    if source.shape in ((out,), (out, 1)):
        return "out"
    if source.shape == (1, columns):
        if target.fused:
            raise Unused("its magnitudes span the inputs of a fused layer, whose norms cannot be told apart")
        return "in"
    raise Flaw(
        f"has magnitudes of shape {list(source.shape)}; expected [{out}], [{out}, 1] or [1, {columns}]"
    )


# ---------------------------------------------------------------- the whole


def _once(modules: list[Module]) -> tuple[list[Module], list[LeftOut]]:
    """The modules without what the file says twice: of fused and split layers the split ones count."""
    direct = {module.target.name for module in modules if module.target.direct}
    kept, dropped = [], []
    for module in modules:
        if not module.target.direct:
            module = replace(module, parts=tuple(p for p in module.parts if p.module not in direct))
        if module.parts:
            kept.append(module)
        else:
            dropped.append(module.target.name)
    reason = "the file has the same layers under the model's own names too, and those are used"
    return kept, [LeftOut(tuple(dropped), reason)] if dropped else []


def _strangers(keys: _Keys, names: ModelNames) -> list[LeftOut]:
    lists = (*keys.strangers, keys.plain)
    encoder, unknown, plain = (tuple(printable(name, MAX_SHOWN) for name in some) for some in lists)
    found = (
        LeftOut(encoder, "it belongs to a text encoder, which LoRAs do not change here"),
        LeftOut(unknown, f"{names.family} has no such layer"),
        LeftOut(plain, "no known kind of LoRA has such a tensor"),
    )
    return [item for item in found if item.names]


def _refusal(keys: _Keys, left_out: list[LeftOut], names: ModelNames) -> str:
    """Why nothing of the file can be used, the likeliest reason first."""
    encoder, foreign = keys.strangers
    downs = [group["down"].matrix for group in keys.groups.values() if "down" in group]
    family = foreign_family(foreign, (shape[-1] for shape in downs if shape))
    if family:
        return f"is made for {family}: it does not fit {names.family}"
    if keys.targets:
        return f"does not fit {names.family}: {left_out[0]}"
    if encoder and not foreign:
        return f"changes only a text encoder: there is nothing in it for {names.family}'s image model"
    if foreign:
        return f"does not fit {names.family}: it has no layer such as {printable(foreign[0], MAX_SHOWN)}"
    if keys.plain:
        plain = printable(keys.plain[0], MAX_SHOWN)
        return f"is no LoRA: it holds plain tensors such as {plain}, perhaps a whole model"
    return "is empty"
