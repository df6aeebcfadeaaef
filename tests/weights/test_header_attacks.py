"""Files that are damaged, lie, or are something else: each is refused from its header, with its reason.

The files here have holes where their tensors would be, and opening one for reading tensors fails the test.
"""

import json
import math
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from models.z_image.checkpoints import weight_names
from models.z_image.transformer_z_image import ZImageConfig, ZImageTransformer2DModel
from shared.errors import UserError
from shared.weights import formats, loading
from shared.weights.files import DTYPE_BITS
from tests.support import packers

Table = dict[str, tuple[str, list[int]]]  # tensor -> (dtype, shape)
DTYPES = {torch.bfloat16: "BF16", torch.int8: "I8", torch.float8_e4m3fn: "F8_E4M3", torch.float32: "F32"}
Q = "layers.0.attention.to_q"
OUT = "layers.0.attention.to_out.0"
QKV = "layers.0.attention.to_qkv"


def table_of(tensors: dict[str, torch.Tensor]) -> Table:
    return {name: (DTYPES[x.dtype], list(x.shape)) for name, x in tensors.items()}


STATE = packers.tiny_state()
PLAIN = table_of(STATE)
COMFY = table_of(packers.comfy(STATE, ""))


def layered(tensors: Callable[[list[int]], Table]) -> Table:
    """PLAIN with every linear layer of the blocks replaced by `tensors(shape)`."""
    table: Table = {}
    for name, (dtype, shape) in PLAIN.items():
        if packers.LINEAR.search(name):
            table |= {name.removesuffix("weight") + end: entry for end, entry in tensors(shape).items()}
        else:
            table[name] = (dtype, shape)
    return table


INT8 = layered(lambda s: {"weight._data": ("I8", s), "weight._scale": ("BF16", [s[0], 1])})
FP8 = layered(lambda s: {"weight": ("F8_E4M3", s), "weight_scale": ("F32", [])})


def nunchaku(codes: str) -> Table:
    group, scale = (64, "BF16") if codes == "int4" else (16, "F8_E4M3")
    table = {name: entry for name, entry in PLAIN.items() if not packers.LINEAR.search(name)}
    for base, sources in packers.nunchaku_layers(STATE):
        n, k = sum(PLAIN[f"{s}.weight"][1][0] for s in sources), PLAIN[f"{sources[0]}.weight"][1][1]
        table |= {f"{base}.qweight": ("I8", [n, k // 2]), f"{base}.wscales": (scale, [k // group, n]),
                  f"{base}.smooth_factor": ("BF16", [k]), f"{base}.smooth_factor_orig": ("BF16", [k]),
                  f"{base}.proj_down": ("BF16", [k, 16]), f"{base}.proj_up": ("BF16", [n, 16])}  # fmt: skip
    return table


INT4, FP4 = nunchaku("int4"), nunchaku("fp4")


def header_of(table: Table) -> dict[str, Any]:
    header, offset = {}, 0
    for name, (dtype, shape) in table.items():
        end = offset + math.prod(shape) * DTYPE_BITS.get(dtype, 8) // 8
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, end]}
        offset = end
    return header


def write(path: Path, header: dict[str, Any] | bytes, size: int | None = None, data: bytes = b"") -> Path:
    """A header and a hole as long as it says (or `size`), which begins with `data`."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    if size is None and isinstance(header, dict):
        size = max((e["data_offsets"][1] for n, e in header.items() if n != "__metadata__"), default=0)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text + data)
        file.truncate(8 + len(text) + int(size or 0))
    return path


def tables(base: Table, metadata: dict[str, Any] | None = None, **changes: Any) -> Callable[[Path], Path]:
    """base with entries added, replaced, or (None) removed; keys write "." as "__"."""

    def make(folder: Path) -> Path:
        table = base | {name.replace("__", "."): entry for name, entry in changes.items()}
        header = header_of({name: entry for name, entry in table.items() if entry is not None})
        return write(folder / "x.safetensors", ({"__metadata__": metadata} if metadata else {}) | header)

    return make


def change(
    base: Table, *changes: tuple[str, tuple[str, list[int]] | None], **metadata: Any
) -> Callable[[Path], Path]:
    return tables(base, metadata or None, **dict(changes))


def offsets(begin: int, end: int, name: str = f"{Q}.weight") -> Callable[[Path], Path]:
    """PLAIN with the offsets of one tensor moved."""

    def make(folder: Path) -> Path:
        header = header_of(PLAIN)
        size = max(entry["data_offsets"][1] for entry in header.values())
        at = header[name]["data_offsets"]
        header[name]["data_offsets"] = [at[0] + begin, at[1] + end]
        return write(folder / "x.safetensors", header, size)

    return make


def raw(data: bytes) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / "x.safetensors").write_bytes(data)
        return folder / "x.safetensors"

    return make


def beside(text: str) -> Callable[[Path], Path]:
    """INT8 with this map beside it."""

    def make(folder: Path) -> Path:
        (folder / "x_map.json").write_text(text)
        return tables(INT8)(folder)

    return make


def marked(text: bytes, dtype: str = "F8_E4M3") -> Callable[[Path], Path]:
    """FP8 with a ComfyUI marker on one layer."""
    table = {f"{Q}.comfy_quant": ("U8", [len(text)])} | FP8 | {f"{Q}.weight": (dtype, [384, 384])}
    return lambda folder: write(folder / "x.safetensors", header_of(table), data=text)


def pickled(folder: Path) -> Path:
    torch.save({"x": torch.zeros(9)}, folder / "x.safetensors", _use_new_zipfile_serialization=False)
    return folder / "x.safetensors"


def zipped(folder: Path) -> Path:
    with zipfile.ZipFile(folder / "x.safetensors", "w") as archive:
        archive.writestr("model.safetensors", b"0" * 99)
    return folder / "x.safetensors"


def shards(folder: Path, count: int = 2, index: Any = None) -> Path:
    table = list(PLAIN.items())
    for i in range(count):
        part = header_of(dict(table[i::2]))
        write(folder / f"m-{i + 1:05}-of-00002.safetensors", part)
    if index is not None:
        (folder / "m.safetensors.index.json").write_text(
            index if isinstance(index, str) else json.dumps(index)
        )
    return folder


def length(value: int, data: bytes) -> bytes:
    return struct.pack("<Q", value) + data


def folder_of_nothing(folder: Path) -> Path:
    return folder


TWICE = b'{"x_pad_token":1,"x_pad_token":{"dtype":"BF16","shape":[1,384],"data_offsets":[0,768]}}'
THIRD_LAYER = [(n.replace("s.1.", "s.2."), entry) for n, entry in PLAIN.items() if n.startswith("layers.1.")]
LORA: Table = {f"diffusion_model.{Q}.lora_A.weight": ("BF16", [16, 384]),
               f"diffusion_model.{Q}.lora_B.weight": ("BF16", [384, 16])}  # fmt: skip
CONTROL: Table = {"control_layers.0.after_proj.weight": ("BF16", [384, 384]),
                  "control_all_x_embedder.2-1.weight": ("BF16", [384, 132])}  # fmt: skip
VAE: Table = {
    "decoder.conv_in.weight": ("F32", [64, 16, 3, 3]),
    "encoder.conv_in.weight": ("F32", [8, 3, 3, 3]),
}
ENCODER: Table = {"model.embed_tokens.weight": ("BF16", [606, 96]),
                  "model.layers.0.self_attn.q_norm.weight": ("BF16", [32])}  # fmt: skip
LUMINA: Table = {"cap_embedder.0.weight": ("BF16", [96]), "layers.0.attention.qkv.weight": ("BF16", [12, 4])}

ATTACKS: dict[str, tuple[Callable[[Path], Path], str]] = {
    # not a safetensors file at all
    "empty": (raw(b""), "is 0 bytes, too short"),
    "a folder of nothing": (folder_of_nothing, "has no .safetensors file"),
    "GGUF renamed": (raw(b"GGUF\x03\0\0\0" + bytes(64)), "is a GGUF file, which cannot be loaded: take bf16"),
    "a pickle renamed": (pickled, "Python pickle"),
    "a zip renamed": (zipped, "zip archive"),
    "a login page": (raw(b"\n <!DOCTYPE html><html><title>Sign in</title>" + b" " * 400), "web page"),
    "a Git LFS pointer": (raw(b"version https://git-lfs.github.com/spec/v1\noid sha256:00"),
         "Git LFS pointer"),
    "an error in JSON": (raw(b'{"error": "Access to model x is restricted"}'), "but like JSON"),
    # a header that lies about itself
    "header longer than the file": (raw(length(5000, b"{}")), "its header alone is 5,000"),
    "header of 18 exabytes": (raw(length(2**64 - 1, b"{}")), "does not begin like"),
    "header of no length": (raw(length(0, b"{}")), "does not begin like"),
    "cut off": (lambda f: write(f / "x.safetensors", header_of(PLAIN), 1000), "its header says"),
    "bytes after the end": (lambda f: write(f / "x.safetensors", header_of(PLAIN), 10**8), "its header says"),
    "deep JSON": (lambda f: write(f / "x.safetensors", b'{"a":' * 100_000), "cannot be read"),
    "a name twice": (lambda f: write(f / "x.safetensors", TWICE, 768), "'x_pad_token' is there twice"),
    "metadata that is not text": (tables(PLAIN, {"a": {"b": 1}}), "metadata that is not text"),
    "negative offset": (offsets(-(10**9), 0), f"'{Q}.weight' with impossible numbers"),
    "offsets overlap": (offsets(-2, -2), f"the same bytes .* '{Q}.weight'"),
    "a gap": (lambda f: gapped(f), "bytes of no tensor in front of 'x_pad_token'"),
    "fewer bytes than its shape": (offsets(0, -2), f"'{Q}.weight' .* bytes, BF16 .* needs others"),
    "a shape of a fraction": (change(PLAIN, (f"{Q}.weight", ("BF16", [384.0, 384]))), "impossible numbers"),
    "a shape of astronomic size": (lambda f: huge(f), f"'{Q}.weight' with impossible numbers"),
    "an unknown dtype": (change(PLAIN, (f"{Q}.weight", ("F5_E2M2", [384, 384]))), f"F5_E2M2 .'{Q}.weight'"),
    # another model
    "a LoRA": (tables(LORA), "is not a Z-Image transformer but a LoRA"),
    "a control network": (tables(CONTROL), "is not a Z-Image transformer but a control network"),
    "a VAE": (tables(VAE), "is not a Z-Image transformer but a VAE"),
    "a text encoder": (tables(ENCODER), "is not a Z-Image transformer but a text encoder"),
    "Lumina 2": (tables(LUMINA), "another transformer of the Lumina kind"),
    "nothing known": (tables({"a.b": ("F32", [3])}), "is not a Z-Image transformer but something else"),
    "no tensor": (tables({}), "is not a Z-Image transformer but something else"),
    "more layers": (change(PLAIN, *THIRD_LAYER),
                    r"has layers\.2\.\S+, which a Z-Image transformer of this size does not have"),
    "an unknown tensor in a layer": (change(PLAIN, (f"{Q}.rank", ("BF16", [1]))), rf"has {Q}\.rank, which"),
    "a LoRA merged into the names": (tables(PLAIN | {f"{Q}.lora_A.weight": ("BF16", [4, 384])}),
         "lora_A.weight, which"),
    "a missing tensor": (change(PLAIN, (f"{Q}.weight", None)), rf"lacks 1 of the \d+ .*first: {Q}.weight"),
    "one pad token of two": (change(PLAIN, ("cap_pad_token", None)), "lacks 1 of .*cap_pad_token"),
    "another width": (change(PLAIN, (f"{Q}.weight", ("BF16", [384, 385]))), rf"{Q}\.weight.*is \[384, 385\]"),
    "a transposed weight": (change(PLAIN, ("layers.0.feed_forward.w1.weight", ("BF16", [384, 1024]))),
                            r"w1.weight.*is \[384, 1024\]; a Z-Image transformer has \[1024, 384\]"),
    "a weight of integers": (change(PLAIN, (f"{Q}.weight", ("I16", [384, 384]))), f"I16 .*'{Q}.weight'"),
    # fused layers
    "qkv not of three parts": (change(COMFY, ("layers.0.attention.qkv.weight", ("BF16", [1153, 384]))),
                               "'layers.0.attention.qkv.weight' with 1153 rows, not 3 equal parts"),
    "qkv of another width": (change(COMFY, ("layers.0.attention.qkv.weight", ("BF16", [1149, 384]))),
                             r"layers.0.attention.to_q.weight.*is \[383, 384\]"),
    "qkv beside to_q": (change(COMFY, (f"{Q}.weight", ("BF16", [384, 384]))),
                        f"'{Q}.weight' twice, as 'layers.0.attention.qkv.weight'"),
    "two spellings of one tensor": (change(COMFY, (f"{OUT}.weight", ("BF16", [384, 384]))),
                                    f"'{OUT}.weight', which is also there"),
    # int8
    "_data without _scale": (change(INT8, (f"{Q}.weight._scale", None)), f"without its '{Q}.weight._scale'"),
    "_scale without _data": (change(INT8, (f"{Q}.weight._data", None)),
         f"'{Q}.weight._scale' but no quantized"),
    "_scale of another shape": (change(INT8, (f"{Q}.weight._scale", ("BF16", [7, 1]))),
         r"shape \[7, 1\] for 384"),
    "_scale across columns": (change(INT8, (f"{Q}.weight._scale", ("BF16", [1, 384]))),
         r"shape \[1, 384\] for 384"),
    "_scale of integers": (change(INT8, (f"{Q}.weight._scale", ("I8", [384, 1]))), "scales in I8"),
    "_data of one dimension": (change(INT8, (f"{Q}.weight._data", ("I8", [384]))), r"instead of \[N, K\]"),
    "_data and weight": (change(INT8, (f"{Q}.weight", ("BF16", [384, 384]))), "two weights of one layer"),
    "a map that is not JSON": (beside("{nonsense"), "damaged x_map.json"),
    "a map that is a list": (beside("[]"), "damaged x_map.json .it is not a table"),
    "a map nested deeply": (beside("[" * 100_000), "damaged x_map.json"),
    "a map without types": (beside('{"a": {}}'), "damaged x_map.json .'a' has no weights"),
    "a map of another type": (beside(json.dumps({Q: {"weights": "qint4"}})), f"optimum-quanto qint4 .'{Q}"),
    "a map against the dtype": (beside(json.dumps({Q: {"weights": "qfloat8"}})),
         "qfloat8 but stores .* as I8"),
    "a map in the header that is not base64": (change(INT8, quantization_map_base64="?"),
         "quantization_map_base64"),
    "a map in the header that is not JSON": (change(INT8, quantization_map_base64="e30x"),
         "quantization_map_base64"),
    "quanto int4": (change(INT8, (f"{Q}.weight._shift", ("BF16", [384, 1]))), "optimum-quanto below 8 bits"),
    # fp8
    "weight_scale without an fp8 weight": (change(FP8, (f"{Q}.weight", ("BF16", [384, 384]))),
         "no quantized weight"),
    "two scales": (change(FP8, (f"{Q}.scale_weight", ("F32", []))),
         f"'{Q}.scale_weight', which is also there"),
    "weight_scale of another shape": (change(FP8, (f"{Q}.weight_scale", ("F32", [5]))),
         r"shape \[5\] for 384 rows"),
    "mxfp8": (change(FP8, (f"{Q}.weight_scale", ("F8_E8M0", [384, 12]))), f"{Q}.weight_scale"),
    "nvfp4": (change(FP8, (f"{Q}.weight", ("U8", [384, 192])), (f"{Q}.weight_scale_2", ("F32", []))),
         "nvfp4"),
    "fp8 in blocks": (change(FP8, (f"{Q}.weight_scale_inv", ("F32", [3, 3]))), "fp8 in blocks"),
    "int8_tensorwise": (marked(b'{"format": "int8_tensorwise", "convrot": true}', "I8"),
         "int8_tensorwise .ComfyUI"),
    "int8 with a scale and no word": (change(FP8, (f"{Q}.weight", ("I8", [384, 384]))),
         "I8 without a known scheme"),
    "mxfp8 by its marker": (marked(b'{"format": "mxfp8"}'), "mxfp8 .ComfyUI"),
    "a marker that is not JSON": (marked(b'{"format": '), f"damaged {Q}.comfy_quant"),
    "a marker without a format": (marked(b'{"convrot": 1}'), "has no format"),
    "a marker of a megabyte": (marked(b" " * 10**6), "1,000,000 bytes in .*comfy_quant"),
    "metadata of layers that is not JSON": (change(FP8, _quantization_metadata="{"),
         "damaged _quantization_metadata"),
    "metadata without layers": (change(FP8, _quantization_metadata="{}"), "damaged _quantization_metadata"),
    "bitsandbytes": (change(PLAIN, (f"{Q}.weight.absmax", ("F32", [9]))), "bitsandbytes"),
    "GPTQ": (change(PLAIN, (f"{Q}.qzeros", ("I32", [9]))), "GPTQ"),
    # Nunchaku
    **{f"qweight without {end}": (change(INT4, (f"{QKV}.{end}", None)), f"qweight' without the {role} of")
       for end, role in (("wscales", "wscales"), ("smooth_factor", "smooth"),
                         ("proj_down", "down"), ("proj_up", "up"))},
    "scales without qweight": (change(INT4, (f"{QKV}.qweight", None)), "but no quantized weight"),
    "int4 scales of fp4's shape": (change(INT4, (f"{QKV}.wscales", ("BF16", [24, 1152]))),
         r"\[24, 1152\] instead of \[6, 1152\]"),
    "fp4 scales of int4's shape": (change(FP4, (f"{QKV}.wscales", ("F8_E4M3", [6, 1152]))),
         r"\[6, 1152\] instead of \[24, 1152\]"),
    "scales turned": (change(INT4, (f"{QKV}.wscales", ("BF16", [1152, 6]))), r"instead of \[6, 1152\]"),
    "scales in fp32": (change(INT4, (f"{QKV}.wscales", ("F32", [6, 1152]))), "as F32 instead of BF16 or F16"),
    "smoothing of another width": (change(INT4, (f"{QKV}.smooth_factor", ("BF16", [383]))),
         r"\[383\] instead of \[384\]"),
    "a low rank that is no tile": (change(INT4, (f"{QKV}.proj_up", ("BF16", [1152, 15]))), "of rank 15"),
    "two ranks": (change(INT4, (f"{QKV}.proj_down", ("BF16", [384, 32]))),
         r"\[384, 32\] instead of \[384, 16\]"),
    "rows that are no tile": (change(INT4, (f"{QKV}.qweight", ("I8", [1150, 192]))), "multiples of 128"),
    "a qweight of words": (change(INT4, (f"{QKV}.qweight", ("I32", [288, 192]))), "I32 words"),
    "AWQ of Nunchaku": (change(INT4, (f"{QKV}.wzeros", ("BF16", [6, 1152]))), "AWQ"),
    "a qweight and a weight": (change(INT4, (f"{QKV}.weight", ("BF16", [1152, 384]))), "second weight"),
    "channel scales of another count": (change(FP4, (f"{QKV}.wcscales", ("BF16", [384]))),
         r"\[384\] instead of \[1152\]"),
    "tensor scales by the dozen": (change(FP4, (f"{QKV}.wtscale", ("BF16", [12]))),
         r"\[12\] instead of \[1\]"),
    "a stranger in a quantized layer": (change(INT4, (f"{QKV}.zeros", ("BF16", [12]))),
         f"'{QKV}.zeros' in a layer"),
    "a narrower layer": (change(INT4, *((f"{QKV}.{end}", (d, s)) for end, d, s in (
        ("qweight", "I8", [768, 192]), ("wscales", "BF16", [6, 768]), ("proj_up", "BF16", [768, 16])))),
        r"layers.0.attention.to_q.weight.*is \[256, 384\]"),
    # shards
    "a shard missing": (lambda f: shards(f, 1) / "m-00001-of-00002.safetensors",
         "00002-of-00002.safetensors does not exist"),
    "an index of a missing shard": (lambda f: shards(f, 2, {"weight_map": {"a": "n.safetensors"}}),
         "n.safetensors does not"),
    "an index that leads elsewhere": (lambda f: shards(f, 2, {"weight_map": {"a": "../../etc/x"}}),
         "not an index"),
    "an index that is not JSON": (lambda f: shards(f, 2, "<html>"), "not an index of shards"),
    "an index without a map": (lambda f: shards(f, 2, []), "not an index of shards"),
    "two copies in one folder": (lambda f: tables(PLAIN)(shards(f)).parent,
                                 "both have the tensor .*choose one of the files"),
    "half of the shards": (lambda f: shards(f, 1), "lacks .* of the"),
}  # fmt: skip


def gapped(folder: Path) -> Path:
    header = header_of(PLAIN)
    for entry in header.values():
        entry["data_offsets"] = [n + 64 for n in entry["data_offsets"]]
    return write(folder / "x.safetensors", header)


def huge(folder: Path) -> Path:
    header = header_of(PLAIN)
    header[f"{Q}.weight"]["shape"] = [2**62, 2**62, 2**62]
    return write(folder / "x.safetensors", header)


def transformer() -> ZImageTransformer2DModel:
    return loading.build(lambda: ZImageTransformer2DModel(ZImageConfig.from_dict(packers.TINY)))


@pytest.fixture(autouse=True)
def _no_tensor_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a tensor was about to be read")

    monkeypatch.setattr(loading, "safe_open", fail)


@pytest.mark.parametrize("name", ATTACKS)
def test_a_bad_file_is_refused_with_its_reason(name: str, tmp_path: Path):
    make, words = ATTACKS[name]
    path = make(tmp_path)
    with pytest.raises(UserError, match=words) as refusal:
        loading.load_weights(transformer(), [path], dtype=torch.bfloat16, names=weight_names.TRANSFORMER)
    assert "\n" not in str(refusal.value) and str(refusal.value).endswith(".")


@pytest.mark.parametrize(
    "table", [PLAIN, COMFY, INT8, FP8, INT4, FP4], ids="plain comfy int8 fp8 int4 fp4".split()
)
def test_the_tables_that_the_attacks_change_are_good(table: Table, tmp_path: Path):
    with pytest.raises(AssertionError, match="about to be read"):
        loading.load_weights(
            transformer(), [tables(table)(tmp_path)], dtype=torch.bfloat16, names=weight_names.TRANSFORMER
        )


@pytest.mark.parametrize(
    ("wanted", "given", "words"),
    [
        (weight_names.VAE, PLAIN, "is not a Z-Image VAE but a Z-Image transformer"),
        (weight_names.TEXT_ENCODER, VAE, "is not a Qwen3 text encoder but a VAE"),
        (weight_names.TEXT_ENCODER, LORA, "is not a Qwen3 text encoder but a LoRA"),
        (weight_names.VAE, CONTROL, "is not a Z-Image VAE but a control network"),
    ],
)
def test_every_part_says_what_it_was_given_instead(wanted: Any, given: Table, words: str, tmp_path: Path):
    with pytest.raises(UserError, match=words):
        formats.inspect([tables(given)(tmp_path)], wanted)


def test_a_header_of_a_real_size_takes_milliseconds_and_no_tensors(tmp_path: Path):
    """12 GB of holes: what the planner asks about a full model before anything is read."""
    full = {"dim": 3840, "n_heads": 30, "n_layers": 30, "n_refiner_layers": 2, "cap_feat_dim": 2560}
    model = loading.build(lambda: ZImageTransformer2DModel(ZImageConfig.from_dict(full)))
    table: Table = {name: ("BF16", list(x.shape)) for name, x in model.state_dict().items()}
    file = write(tmp_path / "x.safetensors", header_of(table))
    found = formats.inspect([file], weight_names.TRANSFORMER)
    assert len(found.entries) == 521 and found.bytes_under() == 2 * 6_154_908_736
    assert len(set(found.block_bytes("layers"))) == 1 and len(found.block_bytes("layers")) == 30
    file.unlink()
