"""Where model files are: the folders, what a model needs, what is on disk, and whether a file is whole.

No network and nothing heavy: the page and `--list-models` use this without torch. downloads.py fetches what
is missing.
"""

import json
import re
import struct
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from shared.errors import UserError
from shared.files.names import UNSAFE_NAME
from shared.settings.messages import printable
from shared.weights import hub

LIBRARY_HEADER_BYTES = 100_000_000  # the safetensors library's own limit
# What a header may ask of us. The largest models have some thousand tensors, with names of about 100
# characters; what a trainer writes into its metadata are a few MB.
MAX_HEADER_BYTES = 16 << 20
MAX_TENSORS = 20_000
MAX_NAME = 256
MAX_DIMENSIONS = 16
MAX_NESTING = 3  # the table of tensors, one tensor, its shape
MAX_STRINGS = 6 * MAX_TENSORS  # five for each tensor, and the metadata's
MAX_COMMAS = 8 * MAX_TENSORS
# Bits per element of the dtypes that the safetensors library knows.
DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F16": 16, "BF16": 16,
    "F32": 32, "F64": 64, "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
MAX_FLAW, MAX_PATH = 240, 1000  # characters in a sentence
ENTRY_FIELDS = {"dtype", "shape", "data_offsets"}
WORD = 1 << 64  # sizes and places are smaller
LONG_LIST = re.compile(rb"\[[^][]{1024}")
STRANGE_NUMBER = re.compile(rb"\d{21}|-0(?!\d)")  # the library refuses a negative zero
BRACKETS = b"[]{}"
OTHER_BYTES = bytes(set(range(256)) - set(BRACKETS))
#: the folders of ComfyUI, SwarmUI, Forge and their kind for these files, as _kind spells them
KIND_FOLDERS = (
    "diffusionmodels", "unet", "checkpoints", "stablediffusion", "textencoders", "textencoder", "clip", "vae",
)  # fmt: skip
GENERIC_NAMES = ("model.safetensors", "diffusion_pytorch_model.safetensors")
MAX_FOLDERS = 300  # that are looked into, of one folder
SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})(\.safetensors)")
SHARD_SUFFIX = "-of-*.safetensors"
INDEX_SUFFIX = ".safetensors.index.json"
PART_SUFFIX = ".part"  # of a file that has not come whole yet
SAFETENSORS = (".safetensors", ".sft")  # how the names of such files end
WORKING_FORMATS = "bf16, fp16 or fp32, int8 (optimum-quanto), fp8 or Nunchaku int4/fp4 as .safetensors"
# What other files begin with. The first byte of a safetensors file is the low byte of its header's length, so
# these are only asked after that length turned out to be impossible.
FOREIGN_STARTS = (
    (b"PK", "a zip archive, or a pickled .pt or .ckpt checkpoint"),
    (b"\x80", "a Python pickle, an old .pt or .ckpt checkpoint"),
    (b"<", "a web page, perhaps the login page of the site it came from"),
    (b"version https://git-lfs", "a Git LFS pointer that stands for the file"),
    (b"{", "JSON"),
)


class RefusedFile(UserError):
    """A file that is not read. `flaw`: what is wrong with it, without the path and the advice, what to do.
    What stands in the file may be part of it, so it is cleaned here.
    """

    def __init__(self, path: Path | str, flaw: str, advice: str) -> None:
        self.flaw, self.advice = printable(flaw, MAX_FLAW), advice
        super().__init__(f"{printable(str(path), MAX_PATH)} {self.flaw}: {advice}.")


class DamagedFile(RefusedFile):
    """A file that is not whole."""

    def __init__(self, path: Path, flaw: str) -> None:
        super().__init__(path, flaw, "delete it and start again, or put a whole copy in its place")


def unsupported(path: Path, kind: str, name: str) -> RefusedFile:
    """The refusal of a whole file for a quantization (or dtype) that one of its tensors has."""
    flaw = f"is quantized as {printable(kind)} ('{printable(name)}'), which is not supported"
    return RefusedFile(path, flaw, f"take {WORKING_FORMATS}")


@dataclass(frozen=True)
class Folders:
    """`root`: the project's folder, which relative paths start from. `ckpts`: the folder downloads go to.
    `others`: further folders of the user with model files.
    """

    root: Path
    ckpts: Path
    others: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Required:
    """One file (or folder) a model needs.

    role: what it is to the model: "transformer", "text_encoder", "text_encoder_folder", "vae", ...
    alternatives: https URLs or project paths, any one of which will do, best first.
    target: folder inside ckpts/ that a download goes to, "" for ckpts/ itself.
    """

    role: str
    alternatives: list[str] = field(default_factory=list)
    target: str = ""


@dataclass(frozen=True)
class Availability:
    """What `describe` found. `path` and `size_bytes` are None when nothing is on disk."""

    on_disk: bool
    path: Path | None
    size_bytes: int | None


def is_url(source: str) -> bool:
    """True when `source` is a web address, False when it is a path."""
    return source.startswith(("https://", "http://"))


def file_name(source: str) -> str:
    """The name a URL or path has on disk: its last part, without the query. UserError when there is none."""
    text = unquote(urlsplit(source).path) if is_url(source) else source.replace("\\", "/").rstrip("/")
    name = text.rsplit("/", 1)[-1]
    if name in ("", ".", "..") or UNSAFE_NAME.search(name):
        raise UserError(f"'{source}' does not end in a file name: correct this entry in the model's card.")
    return name


def destination(source: str, folders: Folders, target: str = "") -> Path:
    """The place of a download: ckpts/<target>/<name>. UserError when `target` leads out of ckpts/."""
    folder = folders.ckpts / target
    if target and not folder.resolve().is_relative_to(folders.ckpts.resolve()):
        raise UserError(f"'{target}' for '{source}' leads out of {folders.ckpts}: name one inside it.")
    return folder / file_name(source)


def arrived(source: str, folders: Folders, target: str = "") -> int:
    """Bytes that have come of a download of `source` that is not complete."""
    part = destination(source, folders, target)
    part = part.with_name(part.name + PART_SUFFIX)
    return part.stat().st_size if part.is_file() else 0


def locate(source: str, folders: Folders, target: str = "") -> Path | None:
    """The file or folder that `source` (an https URL, hf://OWNER/NAME/PATH or a path) stands for, or None
    when it is not on disk. A folder that lacks some of its shards is not: somebody still fetches it.

    A path is taken from the project's root, then from ckpts/ and the user's other folders. It or a URL is
    also looked for by its bare name in <target>/ of these folders and in them directly, where users of a flat
    layout have it, and in the folders that other programs have in these. A repository of the hub is looked
    for in these folders, as NAME or OWNER/NAME. What the hub has is last looked for in its own cache.
    """
    if source.startswith(hub.SCHEME):
        paths = in_repository(source, folders)
    else:
        places = (folders.ckpts, *folders.others)
        paths = [] if is_url(source) else [place / source for place in (folders.root, *places)]
        name = file_name(source)
        paths += [destination(source, folders, target), folders.ckpts / name]
        paths += [folder / part / name for folder in folders.others for part in (target, "")]
    found = next((path for path in paths if is_whole(path)), None)
    if found is None and not source.startswith(hub.SCHEME):
        found = _of_other_programs(file_name(source), folders)
    if found is None and (is_url(source) or source.startswith(hub.SCHEME)):
        cached = hub.in_cache(source)
        found = cached if cached is not None and is_whole(cached) else None
    return found


def _of_other_programs(name: str, folders: Folders) -> Path | None:
    """The file in a folder that other programs have for its kind, or one folder deeper, where people sort
    theirs by model. A name that any model's file has proves nothing.
    """
    if not name.endswith(SAFETENSORS) or name in GENERIC_NAMES:
        return None
    places = (folders.ckpts, *folders.others)
    kinds = [one for place in places for one in _folders_in(place) if _kind(one.name) in KIND_FOLDERS]
    deeper = (below for kind in kinds for below in _folders_in(kind))
    return next((path for one in (*kinds, *deeper) if (path := one / name).is_file()), None)


def _kind(folder: str) -> str:
    return re.sub(r"[^a-z]", "", folder.lower())


def _folders_in(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if path.is_dir())[:MAX_FOLDERS]
    except OSError:
        return []  # not there, or not to be looked into


def in_repository(source: str, folders: Folders) -> list[Path]:
    """Where `hf download OWNER/NAME --local-dir` may have put a part: into a folder that is called like the
    repository, in one of the user's folders, or into one of these itself.
    """
    owner, name, path = source.removeprefix(hub.SCHEME).split("/", 2)
    places = (folders.ckpts, *folders.others)
    inside = [place / folder / path for place in places for folder in (name, f"{owner}/{name}")]
    return inside + [place / path for place in places if place.name == name]


def is_whole(path: Path) -> bool:
    """Whether a path is there: a file, or a folder with all shards that its index or their names speak of."""
    if not path.is_dir():
        return path.exists()
    expected = {name for file in path.glob(f"*{SHARD_SUFFIX}") for name in _sisters(file)}
    for index in path.glob(f"*{INDEX_SUFFIX}"):
        try:
            expected.update(_shards_of(index))
        except DamagedFile:
            return True  # whoever loads it says what is wrong
    return all((path / name).is_file() for name in expected)


def describe(required: Required, folders: Folders) -> Availability:
    """The first alternative of `required` that is on disk, and its size in bytes. Opens no file."""
    found = (locate(source, folders, required.target) for source in required.alternatives)
    path = next((path for path in found if path is not None), None)
    return Availability(path is not None, path, None if path is None else _size(path))


def _size(path: Path) -> int:
    if path.is_dir():
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return path.stat().st_size


@dataclass(frozen=True)
class Header:
    """What a safetensors file says about itself, checked.

    entries: tensor name -> {"dtype", "shape", "data_offsets"}; offsets count from `data_start` in the file.
    metadata: the free text under `__metadata__`.
    """

    path: Path
    entries: dict[str, dict[str, Any]]
    metadata: dict[str, str]
    data_start: int

    def read(self, name: str) -> bytes:
        """The bytes of one (small) tensor."""
        begin, end = self.entries[name]["data_offsets"]
        with self.path.open("rb") as file:
            file.seek(self.data_start + begin)
            return file.read(end - begin)


def check_safetensors(path: Path) -> dict[str, Any]:
    """The entries of a safetensors file by tensor name; DamagedFile when it is not whole (`read_header`)."""
    return read_header(path).entries


def read_header(path: Path) -> Header:
    """The header of a safetensors file, once it is known to agree with the length of the file: DamagedFile
    when it does not, RefusedFile for a format that this program does not read.

    Format: 8 bytes little-endian header length, the header (a JSON object: tensor name -> dtype, shape,
    data_offsets [begin, end] counted from the header's end; "__metadata__" -> text), then the data.
    Reads the header only, within the bounds above, so it costs milliseconds on a file of any size. Whatever
    the safetensors library refuses is refused here. Names and metadata are the file's: they go through
    `printable` before anyone sees them.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} is not a file: download it or correct the path in the model's card.")
    length = path.stat().st_size
    header_length, header = _read_header(path, length)
    metadata = header.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise DamagedFile(path, "has metadata that is not text")
    if not _is_unicode("".join((*header, *metadata, *metadata.values()))):
        raise DamagedFile(path, "has a header that cannot be read (it holds halves of characters)")
    spans = sorted(_span(path, name, entry) for name, entry in header.items())
    expected = 8 + header_length + max((end for _, end, _ in spans), default=0)
    if length != expected:
        raise DamagedFile(path, f"is {length:,} bytes, its header says {expected:,}")
    covered, other = 0, ""
    for begin, end, name in spans:
        if begin < covered:
            both = f"'{printable(other)}' and '{printable(name)}'"
            raise DamagedFile(path, f"gives the same bytes to the tensors {both}")
        if begin > covered:
            raise DamagedFile(path, f"has bytes of no tensor in front of '{printable(name)}'")
        covered, other = end, name
    return Header(path, header, metadata, 8 + header_length)


def weight_files(source: Path, folder: str = "") -> list[Path]:
    """The safetensors files that `source` stands for.

    A file is itself, or with its sisters where it is one of several shards (x-00001-of-00003.safetensors).
    A folder is what its index (*.safetensors.index.json) names, else all its safetensors files; a whole
    diffusers model is looked into at its subfolder `folder`. Raises UserError when a file is missing.
    """
    if source.is_dir():
        return _files_of_folder(source, folder)
    return [_existing(source.with_name(name)) for name in _sisters(source)]


def _sisters(file: Path) -> list[str]:
    """The names of all shards that a file is one of; its own when it is none."""
    shard = SHARD.fullmatch(file.name)
    if shard is None:
        return [file.name]
    stem, _, count, suffix = shard.groups()
    return [f"{stem}-{i:05}-of-{count}{suffix}" for i in range(1, int(count) + 1)]


def _files_of_folder(source: Path, folder: str) -> list[Path]:
    indices = sorted(source.glob(f"*{INDEX_SUFFIX}"))
    if len(indices) == 1:
        return [_existing(source / name) for name in _shards_of(indices[0])]
    files = sorted(source.glob("*.safetensors"))
    if not files and folder and (source / folder).is_dir():
        return _files_of_folder(source / folder, "")
    if not files:
        raise UserError(
            f"The folder {source} has no .safetensors file: give the folder that has the weights."
        )
    return files


def _shards_of(index: Path) -> list[str]:
    try:
        names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
        if not names or any(UNSAFE_NAME.search(name) for name in names):
            raise ValueError("it names no files, or files elsewhere")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedFile(index, f"is not an index of shards ({error})") from error
    return names


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise UserError(f"{path} does not exist: download it or correct the path in the model's card.")
    return path


def _read_header(path: Path, length: int) -> tuple[int, dict[str, Any]]:
    with path.open("rb") as file:
        prefix = file.read(8)
        if prefix[:4] == b"GGUF":
            raise RefusedFile(path, "is a GGUF file, which cannot be loaded", f"take {WORKING_FORMATS}")
        if len(prefix) < 8:
            raise DamagedFile(path, f"is {length:,} bytes, too short for a safetensors file")
        (size,) = struct.unpack("<Q", prefix)
        if not 2 <= size <= LIBRARY_HEADER_BYTES:
            raise DamagedFile(
                path, f"does not begin like a safetensors file{_foreign(prefix + file.read(32))}"
            )
        if 8 + size > length:
            raise DamagedFile(path, f"is {length:,} bytes, its header alone is {size:,}")
        if size > MAX_HEADER_BYTES:
            raise DamagedFile(path, f"has a header of {size:,} bytes, at most {MAX_HEADER_BYTES:,} are read")
        raw = file.read(size)
    if (excess := _excess(raw)) is not None:
        raise DamagedFile(path, f"has a header that cannot be read ({excess})")
    try:
        header = json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=_no_duplicates,
            parse_constant=_no_constant,
        )
    except (ValueError, RecursionError) as error:
        reason = printable(str(error), 120)
        raise DamagedFile(path, f"has a header that cannot be read ({reason})") from error
    if not isinstance(header, dict):
        raise DamagedFile(path, "has a header that is not a table of tensors")
    return size, header


def _excess(raw: bytes) -> str | None:
    """What is out of bounds in a header that nobody has parsed; None where it may be. Passes over it a few
    times, at the speed of the memory."""
    many = f"more than {MAX_TENSORS:,} tensors"
    if raw.count(b'"') - raw.count(rb"\"") > 2 * MAX_STRINGS:
        return many
    # every quote left begins or ends a string
    text = raw.replace(rb"\\", b"").replace(rb"\"", b"") if b"\\" in raw else raw
    if text.count(b'"') > 2 * MAX_STRINGS:
        return many
    outside = b"".join(text.split(b'"')[::2])
    if outside.count(b"{") > MAX_TENSORS + 2:
        return many
    lists = outside.count(b"[")
    if lists > 2 * MAX_TENSORS or outside.count(b",") > MAX_COMMAS or LONG_LIST.search(outside):
        return "more numbers than tensors need"
    if STRANGE_NUMBER.search(outside):
        return "a number that no file needs"
    brackets = outside.translate(None, OTHER_BYTES)
    for _ in range(MAX_NESTING):
        brackets = brackets.replace(b"[]", b"").replace(b"{}", b"")
    return "nested too deeply, or not closed" if brackets else None


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is no number of JSON")


def _is_unicode(text: str) -> bool:
    """Whether no half of a surrogate pair is in it, which JSON can spell and no program can write out."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _foreign(start: bytes) -> str:
    """What the first bytes tell a file to be instead, worded for the end of a sentence."""
    start = start.removeprefix(b"\xef\xbb\xbf").lstrip()
    kind = next((kind for magic, kind in FOREIGN_STARTS if start.startswith(magic)), None)
    return f" but like {kind}" if kind else ""


def _no_duplicates(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    table: dict[str, Any] = {}
    for key, value in pairs:
        if key in table:
            raise ValueError(f"'{printable(key)}' is there twice")
        table[key] = value
    return table


def _span(path: Path, name: str, entry: Any) -> tuple[int, int, str]:
    """(begin, end, name) of one tensor's bytes, after checking that its shape and dtype need that many."""
    called = f"the tensor '{printable(name)}'"
    if len(name) > MAX_NAME:
        raise DamagedFile(path, f"has a tensor with a name of {len(name):,} characters ('{printable(name)}')")
    if not isinstance(entry, dict) or entry.keys() != ENTRY_FIELDS:
        raise DamagedFile(path, f"describes {called} without dtype, shape or offsets, or with more")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or not isinstance(shape, list) or not isinstance(offsets, list):
        raise DamagedFile(path, f"describes {called} without dtype, shape or offsets")
    if len(shape) > MAX_DIMENSIONS:
        many = f"{len(shape):,} dimensions, at most {MAX_DIMENSIONS} are read"
        raise DamagedFile(path, f"gives {called} {many}")
    if len(offsets) != 2 or not all(type(n) is int and 0 <= n < WORD for n in (*shape, *offsets)):
        raise DamagedFile(path, f"describes {called} with impossible numbers")
    begin, end = offsets
    if dtype not in DTYPE_BITS:
        raise unsupported(path, dtype, name)
    bits = _bits(DTYPE_BITS[dtype], shape)
    if begin > end or bits >= WORD:
        raise DamagedFile(path, f"describes {called} with impossible numbers")
    if bits != (end - begin) * 8:
        needs = f"{dtype} {printable(str(shape))} needs others"
        raise DamagedFile(path, f"gives tensor '{printable(name)}' {end - begin:,} bytes, {needs}")
    return begin, end, name


def _bits(each: int, shape: list[int]) -> int:
    """Bits of a tensor; WORD or more as soon as the product of some first sizes is (a size of 0 that follows
    does not mend that: the library multiplies in this order)."""
    elements = 1
    for size in shape:
        elements *= size
        if elements >= WORD:
            return elements
    return elements * each
