"""A tiny transformer in every format that is read."""

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.z_image.checkpoints import weight_names
from models.z_image.transformer_z_image import ZImageConfig, ZImageTransformer2DModel
from shared.weights.loading import build, load_weights
from tests.support import packers
from tests.support.packers import base64_json, comfy, marker, nunchaku, pack_layers, write

State = dict[str, Tensor]
Made = tuple[list[Path], State]  # files, the exact weights under the model's names
CONFIG = ZImageConfig.from_dict(packers.TINY)


def int8(folder: Path, state: State, where: str) -> Made:
    tensors, exact = pack_layers(state, packers.pack_quanto)
    table = packers.quanto_map(tensors)
    metadata = {"quantization_format": "quanto", "quantization_map_base64": base64_json(table)}
    file = write(folder / "x.safetensors", tensors, metadata if where == "header" else None)
    if where == "sidecar":
        (folder / "x_map.json").write_text(json.dumps(table))
    return [file], exact


def fp8(folder: Path, state: State, pack: Callable, declared: str = "", **also: Tensor) -> Made:
    """ComfyUI's names; `declared`: how the file says which layers are fp8, "" when it does not."""
    tensors, exact = pack_layers(comfy(state), pack, re.compile(r"(qkv|attention\.out|w[123])\.weight$"))
    metadata = None
    layers = [name.removesuffix(".weight") for name, x in tensors.items() if x.dtype.itemsize == 1]
    if declared == "marker":
        tensors |= {f"{layer}.comfy_quant": marker("float8_e4m3fn") for layer in layers}
    elif declared == "metadata":
        table = {"format_version": "1.0", "layers": {layer: {"format": "float8_e4m3fn"} for layer in layers}}
        metadata = {"_quantization_metadata": json.dumps(table)}
    return [write(folder / "x.safetensors", tensors | also, metadata)], from_comfy(exact)


def from_comfy(state: State) -> State:
    out = {}
    for name, x in state.items():
        name = name.removeprefix("model.diffusion_model.")
        if ".qkv." in name:
            for to, part in zip(("to_q", "to_k", "to_v"), x.chunk(3), strict=True):
                out[name.replace("qkv", to)] = part
            continue
        for ours, theirs in packers.COMFY_NAMES.items():
            name = re.sub(rf"(^|\.){theirs}\.", rf"\g<1>{ours}.", name)
        out[name] = x
    del out["norm_final.weight"]
    return out


def svdq(folder: Path, state: State, codes: str, scales: str = "usual", **how: Any) -> Made:
    tensors, exact = nunchaku(state, packers.pack_svdq(codes, scales), **how)
    return [write(folder / "x.safetensors", tensors)], exact


def old_names(folder: Path, state: State) -> Made:
    tensors, exact = nunchaku(state, packers.pack_svdq("int4"))
    aliases = {"smooth_factor": "smooth", "smooth_factor_orig": "smooth_orig", "proj_down": "lora_down",
               "proj_up": "lora_up"}  # fmt: skip
    old = {re.sub(r"[^.]+$", lambda m: aliases.get(m[0], m[0]), name): x for name, x in tensors.items()}
    return [write(folder / "x.safetensors", old)], exact


def shards(folder: Path, state: State, count: int, index: bool, pick: str = "folder") -> Made:
    place = packers.write_shards(folder / "transformer", state, count, index)
    return {"folder": [place], "root": [folder], "first": sorted(place.glob("*-of-*.safetensors"))[:1],
            "all": sorted(place.glob("*-of-*.safetensors"))}[pick], state  # fmt: skip


def mixed(folder: Path, state: State) -> Made:
    eight, other = (
        re.compile(r"layers\.0\.attention\.to_\w\.weight$"),
        re.compile(r"1\.feed_forward\.w\d\.weight$"),
    )
    tensors, exact = pack_layers(state, packers.pack_quanto, eight)
    tensors, more = pack_layers(tensors, packers.pack_fp8("weight_scale", dtype=torch.float8_e5m2), other)
    exact |= {name: x for name, x in more.items() if other.search(name)}
    return [write(folder / "x.safetensors", tensors)], exact


def stray_fp8(folder: Path, state: State) -> Made:
    """Everything fp8, norms and biases too."""
    eight = {name: x.to(torch.float8_e4m3fn) for name, x in state.items()}
    return [write(folder / "x.safetensors", eight)], {name: x.float() for name, x in eight.items()}


def plain(dtype: torch.dtype, change: Callable[[dict], dict] = dict) -> Callable[[Path, dict], Made]:
    return lambda folder, state: (
        [write(folder / "x.safetensors", change({n: x.to(dtype) for n, x in state.items()}))], state
    )  # fmt: skip


def flat_pads(state: State) -> State:
    return {name: x.squeeze(0) for name, x in state.items()}


FORMATS: dict[str, tuple[str, Callable[[Path, State], Made]]] = {
    "bf16": ("bf16", plain(torch.bfloat16)),
    "fp16": ("fp16", plain(torch.float16)),
    "fp32": ("fp32", plain(torch.float32)),
    "ComfyUI bf16": ("bf16", plain(torch.bfloat16, comfy)),
    "ComfyUI bf16, no prefix": ("bf16", plain(torch.bfloat16, lambda state: comfy(state, ""))),
    "pads without their 1": ("bf16", plain(torch.bfloat16, flat_pads)),
    "int8, map in the header": ("int8 (quanto)", lambda f, s: int8(f, s, "header")),
    "int8, map beside": ("int8 (quanto)", lambda f, s: int8(f, s, "sidecar")),
    "int8, no map": ("int8 (quanto)", lambda f, s: int8(f, s, "")),
    "fp8 scale_weight": ("fp8 (scaled)", lambda f, s: fp8(f, s, packers.pack_fp8("scale_weight"))),
    "fp8 scale_weight per row, sentinel": ("fp8 (scaled)", lambda f, s: fp8(
        f, s, packers.pack_fp8("scale_weight", "row"), scaled_fp8=torch.zeros(2).to(torch.float8_e4m3fn))),
    "fp8 weight_scale, markers": ("fp8 (scaled)", lambda f, s: fp8(
        f, s, packers.pack_fp8("weight_scale"), "marker")),
    "fp8 weight_scale per row, metadata": ("fp8 (scaled)", lambda f, s: fp8(
        f, s, packers.pack_fp8("weight_scale", "column"), "metadata")),
    "fp8 plain": ("fp8", lambda f, s: fp8(f, s, packers.pack_fp8(None))),
    "fp8 plain, e5m2": ("fp8", lambda f, s: fp8(f, s, packers.pack_fp8(None, dtype=torch.float8_e5m2))),
    "fp8 everywhere": ("fp8", stray_fp8),
    "int8 and fp8": ("fp8 (scaled) + int8 (quanto)", mixed),
    "int4": ("int4 (Nunchaku, rank 16)", lambda f, s: svdq(f, s, "int4")),
    "int4, refiners plain": ("int4 (Nunchaku, rank 16)", lambda f, s: svdq(f, s, "int4", refiners=False)),
    "int4, older names": ("int4 (Nunchaku, rank 16)", old_names),
    **{f"fp4, {scales} scales": ("fp4 (Nunchaku, rank 16)", partial(svdq, codes="fp4", scales=scales))
       for scales in ("usual", "scalar", "channel", "both", "neither")},
    "shards with index": ("bf16", lambda f, s: shards(f, s, 3, True)),
    "shards without index": ("bf16", lambda f, s: shards(f, s, 12, False)),
    "shards, the first one named": ("bf16", lambda f, s: shards(f, s, 12, True, "first")),
    "shards, all named": ("bf16", lambda f, s: shards(f, s, 3, False, "all")),
    "shards in a whole diffusers model": ("bf16", lambda f, s: shards(f, s, 2, True, "root")),
}  # fmt: skip


def tiny(files: list[Path], dtype: torch.dtype | None = torch.float32) -> ZImageTransformer2DModel:
    model = build(lambda: ZImageTransformer2DModel(CONFIG))
    load_weights(model, files, dtype=dtype, names=weight_names.TRANSFORMER)
    return model
