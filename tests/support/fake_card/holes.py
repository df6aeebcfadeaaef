"""The models' files at full size without their data: real headers, and nothing on the disk behind them."""

from __future__ import annotations

import base64
import json
import math
import re
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import nn
from transformers import Qwen3Config, Qwen3Model

from models.z_image.checkpoints.control_layout import OWN, PLAIN, SHARED, ControlLayout
from models.z_image.control import ZImageControlModel
from models.z_image.transformer_z_image import ZImageConfig, ZImageTransformer2DModel
from tests.support.fake_card.card import ROOT

Table = dict[str, tuple[str, tuple[int, ...]]]  # tensor -> (dtype, shape)
BYTES = {"BF16": 2, "F32": 4, "I8": 1}
BLOCKS = ("layers.", "noise_refiner.", "context_refiner.", "model.layers.")
RANK, NUNCHAKU_RANK = 16, 256
CONFIG = json.loads((ROOT / "models/z_image/configs/transformer.json").read_text("utf-8"))
TOKENIZER = ROOT / "models/z_image/mini/text_encoder"
QWEN = {
    "architectures": ["Qwen3ForCausalLM"], "head_dim": 128, "hidden_act": "silu", "hidden_size": 2560,
    "intermediate_size": 9728, "max_position_embeddings": 40960, "model_type": "qwen3",
    "num_attention_heads": 32, "num_hidden_layers": 36, "num_key_value_heads": 8, "rms_norm_eps": 1e-06,
    "rope_theta": 1000000, "tie_word_embeddings": True, "vocab_size": 151936,
}  # fmt: skip


class Files:
    """The files of models with so many layers in a folder, each written when it is asked for first."""

    def __init__(self, folder: Path, layers: int) -> None:
        self.folder, self.config = folder / str(layers), {**CONFIG, "n_layers": layers}
        self.encoder = QWEN if layers == CONFIG["n_layers"] else {**QWEN, "num_hidden_layers": layers}

    def transformer(self, kind: str) -> Path:
        """kind: a key of TRANSFORMERS."""
        return self._file(f"{kind}.safetensors", lambda: TRANSFORMERS[kind](self._meta_transformer(kind)))

    def control(self, generation: str) -> Path:
        """generation: a key of CONTROLS."""
        config = ZImageConfig.from_dict(self.config)
        channels, every, refiner, _ = CONTROLS[generation]
        layout = ControlLayout(channels, tuple(range(0, config.n_layers, every)), refiner)
        with torch.device("meta"):
            model = ZImageControlModel(config, layout)
        marked = "control_noise_refiner.0.after_proj.weight" if generation == "2.1" else ""
        return self._file(f"control {generation}.safetensors", lambda: (plain(model), {}), marked)

    def vae(self) -> Path:
        def table() -> tuple[Table, dict[str, str]]:
            with torch.device("meta"):
                config = json.loads((ROOT / "models/z_image/configs/vae.json").read_text("utf-8"))
                return plain(AutoencoderKL.from_config(config)), {}

        return self._file("ZImageTurbo_VAE_bf16.safetensors", table)

    def text_encoder(self, int8: bool) -> Path:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "config.json").write_text(json.dumps(self.encoder))
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            (self.folder / name).write_bytes((TOKENIZER / name).read_bytes())

        def table() -> tuple[Table, dict[str, str]]:
            with torch.device("meta"):
                model = nn.ModuleDict({"model": Qwen3Model(Qwen3Config(**self.encoder))})
            return quanto(model) if int8 else (plain(model), {})

        return self._file("qwen3_int8.safetensors" if int8 else "qwen3_bf16.safetensors", table)

    def lora(self) -> Path:
        """A LoRA on every linear layer of the blocks."""
        table: Table = {}
        for name, layer in self._meta_transformer("turbo bf16").named_modules():
            if isinstance(layer, nn.Linear) and re.search(r"\.(attention|feed_forward)\.", name):
                table[f"diffusion_model.{name}.lora_A.weight"] = ("BF16", (RANK, layer.in_features))
                table[f"diffusion_model.{name}.lora_B.weight"] = ("BF16", (layer.out_features, RANK))
        return self._file("lora.safetensors", lambda: (table, {}))

    def _meta_transformer(self, kind: str) -> ZImageTransformer2DModel:
        with torch.device("meta"):
            config, twin = ZImageConfig.from_dict(self.config), kind.startswith("twinflow")
            return ZImageTransformer2DModel(config, second_time_embedder=twin)

    def _file(
        self, name: str, make: Callable[[], tuple[Table, Mapping[str, str]]], marked: str = ""
    ) -> Path:
        path = self.folder / name
        if not path.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            write(path, *make(), marked)
        return path


def write(path: Path, table: Table, metadata: Mapping[str, str], marked: str = "") -> None:
    """A safetensors file with a hole for its data. marked: the tensor whose first byte is not zero."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, (dtype, shape) in table.items():
        start, end = end, end + math.prod(shape) * BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
        if marked:
            file.seek(8 + len(text) + header[marked]["data_offsets"][0])
            file.write(b"\1")


def plain(module: nn.Module) -> Table:
    return {name: ("BF16", tuple(x.shape)) for name, x in module.state_dict().items()}


def _linears(module: nn.Module) -> Iterator[str]:
    for name, layer in module.named_modules():
        if type(layer) is nn.Linear and name.startswith(BLOCKS):
            yield name


def quanto(module: nn.Module) -> tuple[Table, dict[str, str]]:
    """optimum-quanto's int8, as the published files have it: all linear layers of the blocks."""
    table = plain(module)
    layers = list(_linears(module))
    for name in layers:
        _, shape = table.pop(f"{name}.weight")
        table |= {f"{name}.weight._data": ("I8", shape), f"{name}.weight._scale": ("BF16", (shape[0], 1))}
        table |= {f"{name}.{scale}": ("BF16", (1,)) for scale in ("input_scale", "output_scale")}
    kinds = json.dumps({name: {"weights": "qint8", "activations": "none"} for name in layers})
    packed = base64.b64encode(kinds.encode()).decode()
    return table, {"quantization_format": "quanto", "quantization_map_base64": packed}


def nunchaku(module: nn.Module) -> tuple[Table, dict[str, str]]:
    """Nunchaku's svdq-int4: fused layers in 4 bits, with a low-rank branch."""
    small = re.compile(r"(layers|refiner)\.\d+\.(attention\.to_|feed_forward\.)")
    table = {name: entry for name, entry in plain(module).items() if not small.search(name)}
    dim = CONFIG["dim"]
    hidden = int(dim / 3 * 8)
    shapes = {
        "attention.to_qkv": (3 * dim, dim), "attention.to_out.0": (dim, dim),
        "feed_forward.net.0.proj": (2 * hidden, dim), "feed_forward.net.2": (dim, hidden),
    }  # fmt: skip
    for block in sorted({m[1] for n in module.state_dict() if (m := re.match(r"(\w+\.\d+)\.feed_", n))}):
        for layer, (n, k) in shapes.items():
            pieces: Table = {
                "qweight": ("I8", (n, k // 2)), "wscales": ("BF16", (k // 64, n)),
                "smooth_factor": ("BF16", (k,)), "proj_down": ("BF16", (k, NUNCHAKU_RANK)),
                "proj_up": ("BF16", (n, NUNCHAKU_RANK)),
            }  # fmt: skip
            table |= {f"{block}.{layer}.{piece}": entry for piece, entry in pieces.items()}
    return table, {}


def _plain_file(module: nn.Module) -> tuple[Table, dict[str, str]]:
    return plain(module), {}


TRANSFORMERS: dict[str, Callable[[nn.Module], tuple[Table, dict[str, str]]]] = {
    "turbo bf16": _plain_file, "turbo int8": quanto, "turbo int4": nunchaku,
    "base bf16": _plain_file, "base int8": quanto, "twinflow bf16": _plain_file,
}  # fmt: skip
#: generation -> channels, every how many layers there is a hint, refiner of the file, refiner that computes
CONTROLS = {"1": (16, 5, PLAIN, PLAIN), "2.0": (33, 2, OWN, SHARED), "2.1": (33, 2, OWN, OWN)}
