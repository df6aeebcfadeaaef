"""Some 200 LoRA files of every kind, trainer, naming and fault, and what each of them is.

What a file is comes from how it is made here, not from the reader: `expected` is written down by hand beside
the writing of each group. `python -m tests.support.lora_gallery` writes it to tests/data/lora_gallery.json.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

EXPECTATIONS = Path(__file__).parents[1] / "data" / "lora_gallery.json"
DIM = 128  # of the Mini models
LAYERS = [
    f"layers.{i}.attention.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0") for i in range(2)
]  # fmt: skip
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Expected:
    """What --check-loras has to say. used, of: modules. words: that stand in its line, or in one of those
    about what is left out.
    """

    refused: bool = False
    used: int = 0
    of: int = 0
    words: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sample:
    """A file: its name in the folder, its bytes, and files beside it."""

    name: str
    content: bytes
    expected: Expected
    beside: tuple[tuple[str, bytes], ...] = ()


def ones(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full(shape, 0.01, dtype=dtype) if dtype.is_floating_point else torch.ones(shape, dtype=dtype)


# ---------------------------------------------------------------- kinds: what a module of DIM x DIM has


def lora(rank: int = 4, down: str = "lora_A.weight", up: str = "lora_B.weight") -> Tensors:
    return {down: ones(rank, DIM), up: ones(DIM, rank)}


def loha(rank: int = 4) -> Tensors:
    sizes = {"w1_a": (DIM, rank), "w1_b": (rank, DIM), "w2_a": (DIM, rank), "w2_b": (rank, DIM)}
    return {f"hada_{name}": ones(*shape) for name, shape in sizes.items()}


def lokr_low(rank: int = 4) -> Tensors:
    return {"lokr_w1": ones(4, 2), "lokr_w2_a": ones(32, rank), "lokr_w2_b": ones(rank, 64)}


#: kind -> (its tensors, words of its line)
KINDS: dict[str, tuple[Callable[[], Tensors], tuple[str, ...]]] = {
    "lora": (lora, ("rank 4",)),
    "lora_down": (lambda: lora(4, "lora_down.weight", "lora_up.weight"), ("rank 4",)),
    "lora_dots": (lambda: lora(2, "lora.down.weight", "lora.up.weight"), ("rank 2",)),
    "lora_alpha": (
        lambda: lora(8, "lora_down.weight", "lora_up.weight") | {"alpha": torch.tensor(6.0)},
        ("rank 8", "alpha 6"),
    ),
    "dora": (lambda: lora() | {"dora_scale": ones(DIM, 1)}, ("DoRA", "rank 4")),
    "dora_in": (lambda: lora() | {"dora_scale": ones(1, DIM)}, ("DoRA", "rank 4")),
    "dora_magnitude": (lambda: lora() | {"magnitude": ones(DIM)}, ("DoRA", "rank 4")),
    "dora_vector": (lambda: lora() | {"lora_magnitude_vector.weight": ones(DIM)}, ("DoRA", "rank 4")),
    "loha": (lambda: loha() | {"alpha": torch.tensor(2.0)}, ("LoHa", "rank 4", "alpha 2")),
    "lokr": (lambda: {"lokr_w1": ones(4, 2), "lokr_w2": ones(32, 64)}, ("LoKr",)),
    "lokr_low": (lambda: lokr_low() | {"alpha": torch.tensor(1.0)}, ("LoKr", "rank 4", "alpha 1")),
    "oft_rows": (lambda: {"oft_blocks": ones(16, 8, 8)}, ("OFT", "rank 8")),
    "oft_inputs": (lambda: {"oft_R.weight": ones(16, 28)}, ("OFT", "rank 8")),
    "boft_rows": (lambda: {"oft_blocks": ones(5, 16, 8, 8), "rescale": ones(DIM, 1)}, ("BOFT", "rank 8")),
    "boft_inputs": (lambda: {"boft_R": ones(2, 16, 8, 8), "boft_s": ones(DIM, 1)}, ("BOFT", "rank 8")),
    "diff": (lambda: {"diff": ones(DIM, DIM)}, ("diff",)),
}

#: naming -> (prefix, whether dots become underscores, what its trainer is called where only one writes so)
NAMINGS = {
    "ai_toolkit": ("diffusion_model.", False, ""),
    "diffusers": ("transformer.", False, ""),
    "bare": ("", False, ""),
    "peft": ("base_model.model.", False, "PEFT"),
    "comfy": ("model.diffusion_model.", False, ""),
    "kohya": ("lora_unet_", True, "kohya"),
    "videox": ("lora_unet__", True, "VideoX-Fun"),
    "lycoris": ("lycoris_", True, "LyCORIS"),
}


def named(tensors: Callable[[], Tensors], count: int, prefix: str = "", underscores: bool = False) -> Tensors:
    """The tensors of `count` modules."""
    stems = [layer.replace(".", "_") if underscores else layer for layer in LAYERS[:count]]
    return {f"{prefix}{stem}.{end}": tensor for stem in stems for end, tensor in tensors().items()}


def good() -> Iterator[Sample]:
    """Every kind under every naming."""
    for i, (kind, (tensors, words)) in enumerate(KINDS.items()):
        for j, (naming, (prefix, underscores, trainer)) in enumerate(NAMINGS.items()):
            count = 1 + (i + j) % len(LAYERS)
            content = save(named(tensors, count, prefix, underscores))
            told = (*words, trainer) if trainer else words
            yield Sample(f"good/{naming}_{kind}.safetensors", content, Expected(False, count, count, told))


def habits() -> Iterator[Sample]:
    """What single trainers do."""
    fused = {
        "diffusion_model.layers.0.attention.qkv.lora_A.weight": ones(4, DIM),
        "diffusion_model.layers.0.attention.qkv.lora_B.weight": ones(3 * DIM, 4),
    }
    split = {f"diffusion_model.{LAYERS[0]}.{end}": t for end, t in lora().items()}
    split |= {
        f"diffusion_model.layers.0.attention.{n}.{e}": t for n in ("to_k", "to_v") for e, t in lora().items()
    }
    rows: list[tuple[str, Tensors, dict[str, str] | None, Expected]] = [
        ("fused", fused, None, Expected(False, 1, 1, ("ComfyUI", "rank 4"))),
        ("fused_and_split", fused | split, None, Expected(False, 3, 4, ("the same layers", "rank 4"))),
        ("metadata", named(lora, 2, "diffusion_model."), {"software": '{"name": "ai-toolkit"}'},
         Expected(False, 2, 2, ("ai-toolkit",))),
        ("one_trainer", named(KINDS["lora_alpha"][0], 2, "transformer."), None, Expected(False, 2, 2,
         ("OneTrainer",))),
        ("diffsynth", named(lambda: lora(4, "lora_A.default.weight", "lora_B.default.weight"), 3), None,
         Expected(False, 3, 3, ("DiffSynth",))),
        ("own_name", named(lambda: lora(4, "lora_A.mine.weight", "lora_B.mine.weight"), 3), None,
         Expected(False, 3, 3, ("PEFT",))),
        ("bf16", {k: t.bfloat16() for k, t in named(lora, 2).items()}, None, Expected(False, 2, 2,
         ("rank 4",))),
        ("float8", {k: t.to(torch.float8_e4m3fn) for k, t in named(lora, 2).items()}, None,
         Expected(False, 2, 2, ("rank 4",))),
        ("integer_alpha", named(lambda: lora() | {"alpha": torch.tensor(3, dtype=torch.int16)}, 2), None,
         Expected(False, 2, 2, ("alpha 3",))),
        ("lokr_dummy_alpha", named(lambda: KINDS["lokr"][0]() | {"alpha": torch.tensor(1e10)}, 2), None,
         Expected(False, 2, 2, ("LoKr",))),
        ("scaled_oft", named(lambda: {"oft_R.weight": ones(16, 28), "oft_R.scaled_oft": torch.tensor(True)},
         2), None,
         Expected(False, 2, 2, ("OFT",))),
        ("shared_oft", named(lambda: {"oft_R.weight": ones(1, 28)}, 2), None, Expected(False, 2, 2,
         ("OFT",))),
        ("ranks", named(lora, 1) | {f"{LAYERS[1]}.{e}": t for e, t in lora(16).items()}, None,
         Expected(False, 2, 2, ("rank 4 to 16",))),
        ("bias", named(lambda: {"diff": ones(DIM, DIM), "diff_b": ones(DIM)}, 2), None, Expected(False, 2, 2,
         ("diff",))),
        ("convolution", named(lambda: {k: t[..., None, None] for k, t in lora().items()}, 2), None,
         Expected(False, 2, 2, ("rank 4",))),
        ("large", {"layers.0.attention.to_q.lora_A.weight": ones(1, 3840),
         "layers.0.attention.to_q.lora_B.weight":
                   ones(3840, 1)}, None, Expected(False, 1, 1, ("rank 1", "Z-Image Turbo"))),
    ]  # fmt: skip
    for name, tensors, metadata, expected in rows:
        yield Sample(f"habits/{name}.safetensors", save(tensors, metadata), expected)
    config = {"peft_type": "OFT", "num_cayley_neumann_terms": 3, "coft": True, "eps": 0.1}
    oft = save(named(KINDS["oft_inputs"][0], 2, "base_model.model."))
    beside = (("adapter_config.json", json.dumps(config).encode()),)
    yield Sample("habits/oft/adapter_model.safetensors", oft, Expected(False, 2, 2, ("OFT", "PEFT")), beside)


#: what one module has -> words of the reason for which it alone is left out
UNUSED: dict[str, tuple[Callable[[], Tensors], str]] = {
    "tucker": (lambda: lora(4, "lora_down.weight", "lora_up.weight") | {"lora_mid.weight": ones(4, 4, 1, 1)},
     "Tucker"),
    "loha_tucker": (lambda: loha() | {"hada_t1": ones(4, 4)}, "Tucker"),
    "kohya_oft": (lambda: {"oft_diag": ones(4, 4)}, "older form of OFT"),
    "set_weight": (lambda: {"set_weight": ones(DIM, DIM)}, "replaces the weight"),
    "ia3": (lambda: {"weight": ones(DIM), "on_input": ones(1)}, "IA3"),
    "glora": (lambda: {f"{name}.weight": ones(DIM, DIM) for name in ("a1", "a2", "b1", "b2")}, "GLoRA"),
    "lora_bias": (lambda: lora() | {"lora_B.bias": ones(DIM)}, "a bias of its own"),
    "alpha_alone": (lambda: {"alpha": torch.tensor(1.0)}, "an alpha and nothing else"),
    "zero_alpha": (lambda: lora() | {"alpha": torch.tensor(0.0)}, "its alpha is 0"),
    "other_size": (lambda: {"lora_A.weight": ones(4, 96), "lora_B.weight": ones(96, 4)}, "96 x 96 weights"),
    "boft_size": (lambda: {"boft_R": ones(1, 4, 8, 8), "boft_s": ones(DIM, 1)}, "128 x 32 weights"),
}  # fmt: skip
#: the same beside it, under a name that the model does not have
STRANGE = {
    "text_encoder": ("lora_te_text_model_encoder_layers_0_mlp_fc1", "belongs to a text encoder"),
    "unknown_layer": ("layers.999.attention.to_q", "has no such layer"),
    "unknown_name": ("something.else", "has no such layer"),
}


def partly() -> Iterator[Sample]:
    """Files of which a part is used; the same part alone is refused."""
    for name, (tensors, words) in UNUSED.items():
        unused = {f"{LAYERS[5]}.{end}": t for end, t in tensors().items()}
        more = named(lora, 3)
        plain = name == "ia3"  # its ".weight" is no adapter's key
        beside = Expected(False, 3, 5 if plain else 4, (words,))
        yield Sample(f"partly/{name}.safetensors", save(more | unused), beside)
        yield Sample(f"refused/{name}.safetensors", save(unused), Expected(True, words=(words,)))
    for name, (stem, words) in STRANGE.items():
        strange = {f"{stem}.{end}": t for end, t in lora().items()}
        yield Sample(
            f"partly/{name}.safetensors", save(named(lora, 3) | strange), Expected(False, 3, 4, (words,))
        )


#: family -> a module of it, its width
FAMILIES = {
    "Stable Diffusion 1.5": ("lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k", 768),
    "Stable Diffusion XL": ("lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k", 2048),
    "Stable Diffusion 3": ("diffusion_model.joint_blocks.0.x_block.attn.qkv", 1536),
    "Flux": ("lora_unet_double_blocks_0_img_attn_qkv", 3072),
    "Qwen-Image": ("transformer_blocks.0.img_mlp.net.0.proj", 3072),
    "Wan": ("diffusion_model.blocks.0.self_attn.q", 1536),
}


def broken() -> Iterator[Sample]:
    """Modules of which no sense can be made condemn the file."""
    wrong: dict[str, tuple[Tensors, str]] = {
        "no_up": ({"lora_A.weight": ones(4, DIM)}, "without the factor up"),
        "no_down": ({"lora_up.weight": ones(DIM, 4)}, "without the factor down"),
        "ranks_differ": ({"lora_A.weight": ones(4, DIM), "lora_B.weight": ones(DIM, 8)}, "different ranks"),
        "rank_0": ({"lora_A.weight": ones(0, DIM), "lora_B.weight": ones(DIM, 0)}, "rank 0"),
        "vectors": ({"lora_A.weight": ones(DIM), "lora_B.weight": ones(DIM)}, "expected two matrices"),
        "integers": ({"lora_A.weight": ones(4, DIM, dtype=torch.int8), "lora_B.weight": ones(DIM, 4)},
         "as I8"),
        "two_kinds": (lora() | loha(), "mixes the factors of"),
        "nan_alpha": (lora() | {"alpha": torch.tensor(float("nan"))}, "the alpha nan"),
        "two_alphas": (lora() | {"alpha": ones(2)}, "expected one number"),
        "magnitude": (lora() | {"dora_scale": ones(7)}, "has magnitudes of shape [7]"),
        "magnitude_alone": ({"dora_scale": ones(DIM)}, "without its factors"),
        "bias": (lora() | {"diff_b": ones(7)}, "has diff_b of shape [7]"),
        "loha_part": ({"hada_w1_a": ones(DIM, 4), "hada_w1_b": ones(4, DIM)}, "without the factor hada_w2_a"),
        "loha_sizes": (loha() | {"hada_w2_a": ones(64, 4)}, "multiplies matrices"),
        "lokr_part": ({"lokr_w1": ones(4, 2)}, "without the factor lokr_w2"),
        "lokr_both": (lokr_low() | {"lokr_w2": ones(32, 64)}, "only some can be meant"),
        "oft_triangle": ({"oft_R.weight": ones(16, 29)}, "triangles of square blocks"),
        "oft_blocks": ({"oft_blocks": ones(16, 8, 7)}, "expected square blocks"),
        "boft_alone": ({"boft_R": ones(1, 16, 8, 8)}, "without the factor boft_s"),
        "boft_stages": ({"oft_blocks": ones(7, 16, 8, 8)}, "more than all blocks"),
    }  # fmt: skip
    for name, (tensors, words) in wrong.items():
        content = save(named(lora, 2) | {f"{LAYERS[5]}.{end}": tensor for end, tensor in tensors.items()})
        yield Sample(f"broken/{name}.safetensors", content, Expected(True, words=("is damaged", words)))
    twice = named(lora, 1) | {f"lora_unet_{LAYERS[0].replace('.', '_')}.lora_down.weight": ones(4, DIM)}
    yield Sample("broken/twice.safetensors", save(twice), Expected(True, words=("the same factor twice",)))
    for config, words in ((b"{", "is not valid JSON"), (b"[]", "is not a JSON object"),
                          (b'{"alpha_pattern": {"(": 1}, "r": 4}', "has the expression")):  # fmt: skip
        content = save(named(lora, 1, "base_model.model."))
        name, beside = words.split()[-1].lower(), (("adapter_config.json", config),)
        yield Sample(
            f"broken/{name}/adapter_model.safetensors", content, Expected(True, words=(words,)), beside
        )


def foreign() -> Iterator[Sample]:
    """Files of other models, and whole models."""
    for family, (module, width) in FAMILIES.items():
        tensors = {f"{module}.lora_down.weight": ones(2, width), f"{module}.lora_up.weight": ones(width, 2)}
        name = family.lower().replace(" ", "_")
        yield Sample(
            f"foreign/{name}.safetensors", save(tensors), Expected(True, words=(f"is made for {family}",))
        )
    encoder = {f"{STRANGE['text_encoder'][0]}.{end}": t for end, t in lora().items()}
    rows = {
        "encoder": (encoder, "only a text encoder"),
        "unknown": ({f"blob.{end}": t for end, t in lora().items()}, "it has no layer such as blob"),
        "whole": ({f"{layer}.weight": ones(DIM, DIM) for layer in LAYERS}, "perhaps a whole model"),
        "nothing": ({}, "is empty"),
    }
    for name, (tensors, words) in rows.items():
        yield Sample(f"foreign/{name}.safetensors", save(tensors), Expected(True, words=(words,)))


def no_files() -> Iterator[Sample]:
    """What is no safetensors file, or no whole one."""
    whole = save(named(lora, 2))
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}

    def header(text: str | bytes, data: int = 4) -> bytes:
        raw = text if isinstance(text, bytes) else text.encode()
        return struct.pack("<Q", len(raw)) + raw + bytes(data)

    rows: dict[str, tuple[bytes, str]] = {
        "empty": (b"", "too short"),
        "one_byte": (b"x", "too short"),
        "cut": (whole[:-10], "its header says"),
        "cut_header": (whole[:40], "its header alone"),
        "longer": (whole + b"x", "its header says"),
        "page": (b"<!DOCTYPE html><html>" + bytes(99), "web page"),
        "json": (b'{"message": "not found"}' + bytes(99), "JSON"),
        "zip": (b"PK\x03\x04" + bytes(99), "pickle or zip"),
        "pickle": (b"\x80\x02}q\x00" + b"\xff" * 99, "pickle"),
        "lfs": (b"version https://git-lfs.github.com/spec/v1\noid", "Git LFS"),
        "gguf": (b"GGUF\x03" + bytes(99), "GGUF"),
        "seventeen": (header(json.dumps({"a": entry | {"shape": [1] * 17}})), "17 dimensions"),
        "duplicate": (header(f'{{"a": {json.dumps(entry)}, "a": {json.dumps(entry)}}}'), "is there twice"),
        "bom": (header(b"\xef\xbb\xbf" + json.dumps({"a": entry}).encode()), "cannot be read"),
        "list": (header("[]", 0), "is not a table of tensors"),
        "metadata": (header(json.dumps({"__metadata__": [], "a": entry})), "metadata that is not text"),
        "surrogate": (header(json.dumps({"a\ud800": entry})), "halves of characters"),
        "overlap": (header(json.dumps({"a": entry, "b": entry})), "gives the same bytes"),
        "hole": (header(json.dumps({"a": entry | {"data_offsets": [4, 8]}}), 8), "bytes of no tensor"),
        "many": (header(b'{"a":' + b"[]," * 100_000 + b"[]}"), "more numbers than tensors need"),
        "deep": (header(b'{"a":' * 5000 + b"1" + b"}" * 5000), "nested too deeply"),
        "long_name": (header(json.dumps({"a" * 300: entry})), "a name of 300 characters"),
        "dtype": (header(json.dumps({"a": entry | {"dtype": "Q4"}})), "Q4"),
        "size": (header(json.dumps({"a": entry | {"shape": [2]}})), "4 bytes"),
    }
    for name, (content, words) in rows.items():
        yield Sample(f"no_files/{name}.safetensors", content, Expected(True, words=(words,)))


def samples() -> list[Sample]:
    groups = (good, habits, partly, broken, foreign, no_files)
    return [sample for group in groups for sample in group()]


def write(folder: Path) -> None:
    for sample in samples():
        path = folder / sample.name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(sample.content)
        for name, content in sample.beside:
            path.with_name(name).write_bytes(content)


def expectations() -> str:
    """One line for each file."""
    rows = [
        f"{json.dumps(one.name)}: {json.dumps({k: v for k, v in asdict(one.expected).items() if v})}"
        for one in samples()
    ]
    return "{\n" + ",\n".join(rows) + "\n}\n"


if __name__ == "__main__":
    EXPECTATIONS.parent.mkdir(exist_ok=True)
    EXPECTATIONS.write_text(expectations(), encoding="utf-8")
