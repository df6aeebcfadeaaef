"""Writers of checkpoint formats, from the formats' descriptions and not from this project's readers.

Each `pack_*` takes a layer's weight and gives (its tensors by suffix, the exact fp32 weight they stand for).
`checkpoint` puts a whole Z-Image state together. Tests compare what the loader makes of these files.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

Packed = tuple[dict[str, Tensor], Tensor]

#: the smallest Z-Image whose layers Nunchaku's tiles fit; the captions' width is the Mini's
TINY = {
    "dim": 384, "n_heads": 3, "n_kv_heads": 3, "n_layers": 2, "n_refiner_layers": 1, "cap_feat_dim": 96,
    "in_channels": 16, "axes_dims": [32, 48, 48], "axes_lens": [1536, 512, 512],
}  # fmt: skip
RANK = 16
LINEAR = re.compile(r"(attention\.to_(q|k|v|out\.0)|feed_forward\.w[123])\.weight$")
COMFY_NAMES = {
    "all_x_embedder.2-1": "x_embedder", "all_final_layer.2-1": "final_layer", "to_out.0": "out",
    "norm_q": "q_norm", "norm_k": "k_norm",
}  # fmt: skip
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def tiny_state(config: Mapping[str, Any] = TINY, seed: int = 0) -> dict[str, Tensor]:
    """Random bf16 weights of a transformer, under diffusers' names."""
    g = torch.Generator().manual_seed(seed)
    d, caption, key = config["dim"], config["cap_feat_dim"], "2-1"
    hidden, time = int(d / 3 * 8), min(d, 256)
    head = d // config["n_heads"]
    shapes: dict[str, tuple[int, ...]] = {
        "x_pad_token": (1, d), "cap_pad_token": (1, d),
        f"all_x_embedder.{key}.weight": (d, 64), f"all_x_embedder.{key}.bias": (d,),
        f"all_final_layer.{key}.linear.weight": (64, d), f"all_final_layer.{key}.linear.bias": (64,),
        f"all_final_layer.{key}.adaLN_modulation.1.weight": (d, time),
        f"all_final_layer.{key}.adaLN_modulation.1.bias": (d,),
        "t_embedder.mlp.0.weight": (1024, 256), "t_embedder.mlp.0.bias": (1024,),
        "t_embedder.mlp.2.weight": (time, 1024), "t_embedder.mlp.2.bias": (time,),
        "cap_embedder.0.weight": (caption,),
        "cap_embedder.1.weight": (d, caption), "cap_embedder.1.bias": (d,),
    }  # fmt: skip
    for stack, count in (("layers", "n_layers"), ("noise_refiner", "n_refiner_layers"),
                         ("context_refiner", "n_refiner_layers")):  # fmt: skip
        for i in range(config[count]):
            block = f"{stack}.{i}."
            for name in ("to_q", "to_k", "to_v", "to_out.0"):
                shapes[f"{block}attention.{name}.weight"] = (d, d)
            shapes |= {f"{block}attention.norm_{x}.weight": (head,) for x in "qk"}
            shapes |= {f"{block}feed_forward.w{x}.weight": (hidden, d) for x in "13"}
            shapes[f"{block}feed_forward.w2.weight"] = (d, hidden)
            for norm in ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2"):
                shapes[f"{block}{norm}.weight"] = (d,)
            if stack != "context_refiner":
                shapes[f"{block}adaLN_modulation.0.weight"] = (4 * d, time)
                shapes[f"{block}adaLN_modulation.0.bias"] = (4 * d,)
    state = {name: torch.randn(shape, generator=g) for name, shape in shapes.items()}
    for name, x in state.items():
        state[name] = (
            1 + 0.1 * x if "norm" in name else x * (0.5 / x.shape[-1] ** 0.5 if x.dim() > 1 else 0.1)
        )
    return {name: x.bfloat16() for name, x in state.items()}


# ---- one layer ---------------------------------------------------------------------------------------------


def pack_quanto(weight: Tensor) -> Packed:
    """optimum-quanto qint8: W = _data * _scale."""
    scale = (weight.float().abs().amax(1, keepdim=True) / 127).bfloat16()
    data = (weight.float() / scale.float()).round().clamp(-128, 127).to(torch.int8)
    one = torch.ones(1, dtype=torch.bfloat16)
    tensors = {"weight._data": data, "weight._scale": scale, "input_scale": one, "output_scale": one.clone()}
    return tensors, data.float() * scale.float()


def pack_fp8(
    scale_name: str | None, shape: str = "scalar", dtype: torch.dtype = torch.float8_e4m3fn
) -> Callable[[Tensor], Packed]:
    """Scaled fp8: W = weight * scale, plain where scale_name is None. shape of the scale: "scalar", "row" [N]
    or "column" [N, 1].
    """

    def pack(weight: Tensor) -> Packed:
        w = weight.float()
        if scale_name is None:
            return {"weight": w.to(dtype)}, w.to(dtype).float()
        amax = w.abs().amax() if shape == "scalar" else w.abs().amax(1, keepdim=True)
        scale = amax / torch.finfo(dtype).max
        codes = (w / scale).to(dtype)
        stored = scale.flatten() if shape == "row" else scale
        return {"weight": codes, scale_name: stored.clone()}, codes.float() * scale

    return pack


def pack_svdq(codes: str, scales: str = "usual", rank: int = RANK) -> Callable[[Tensor, int], Packed]:
    """Nunchaku's SVDQuant. scales, for fp4: "scalar", "channel", "both", "neither", or "usual": per channel
    where a layer is fused, else a scalar. `parts`: how many layers are fused in the weight."""

    def pack(weight: Tensor, parts: int = 1) -> Packed:
        g = torch.Generator().manual_seed(weight.shape[0])
        n, k = weight.shape
        smooth = (0.5 + torch.rand(k, generator=g)).bfloat16()
        smoothed = weight.float() * smooth.float()
        sketch = smoothed @ (smoothed.T @ (smoothed @ torch.randn(k, rank, generator=g)))
        basis = torch.linalg.qr(sketch).Q  # [n, rank]: the largest directions, near enough
        up = basis.bfloat16()
        down = (basis.T @ smoothed).bfloat16().float()
        rest = smoothed - up.float() @ down
        down = (down / smooth.float()).bfloat16()
        if codes == "int4":
            tensors, quantized = _int4(rest)
        else:
            tensors, quantized = _fp4(rest, parts, scales)
        tensors |= {
            "smooth_factor": pack_vector(smooth), "smooth_factor_orig": pack_vector(smooth),
            "proj_down": pack_down(down), "proj_up": pack_up(up),
        }  # fmt: skip
        return tensors, quantized / smooth.float() + up.float() @ down.float()

    return pack


def _int4(rest: Tensor) -> Packed:
    groups = rest.unflatten(1, (-1, 64))
    scale = (groups.abs().amax(2) / 7).bfloat16()
    code = (groups / scale.float()[..., None]).round().clamp(-8, 7)
    tensors = {
        "qweight": pack_qweight(code.flatten(1).to(torch.int16) & 15),
        "wscales": pack_int4_scales(scale),
    }
    return tensors, (code * scale.float()[..., None]).flatten(1)


def _fp4(rest: Tensor, parts: int, scales: str) -> Packed:
    n = len(rest)
    if scales == "usual":
        scales = "channel" if parts > 1 else "scalar"
    scalar = (rest.abs().amax() / (6 * 448)).bfloat16() if scales in ("scalar", "both") else torch.ones(())
    channel = torch.ones(n)
    if scales == "channel":
        per_part = rest.abs().reshape(parts, -1).amax(1) / (6 * 448)
        channel = per_part.bfloat16().float().repeat_interleave(n // parts)
    if scales == "both":
        channel = (torch.arange(n) % 3 + 1).float() / 2
    outer = scalar.float() * channel[:, None]
    groups = (rest / outer).unflatten(1, (-1, 16))
    inner = (groups.abs().amax(2) / 6).clamp(min=2**-9, max=448).to(torch.float8_e4m3fn)
    exact = groups / inner.float()[..., None]
    code = torch.bucketize(exact.abs(), (E2M1[:7] + E2M1[1:8]) / 2)  # of the nearest magnitude
    code += 8 * ((exact < 0) & (code > 0))
    tensors = {"qweight": pack_qweight(code.flatten(1)), "wscales": pack_fp4_scales(inner)}
    if scales in ("scalar", "both"):
        tensors["wtscale"] = scalar.reshape(1)
    if scales in ("channel", "both"):
        tensors["wcscales"] = pack_vector(channel.bfloat16())
    return tensors, (E2M1[code] * inner.float()[..., None]).flatten(1) * outer


# ---- Nunchaku's tile order, as its packers permute ---------------------------------------------------------


def pack_qweight(nibbles: Tensor) -> Tensor:
    n, k = nibbles.shape
    x = nibbles.to(torch.uint8).reshape(n // 128, 8, 2, 8, k // 64, 2, 4, 4, 2)
    x = x.permute(0, 4, 1, 3, 6, 2, 5, 7, 8).contiguous()
    return (x[..., 0] | (x[..., 1] << 4)).view(torch.int8).reshape(n, k // 2)


def pack_int4_scales(scales: Tensor) -> Tensor:
    n, g = scales.shape
    return scales.reshape(n // 128, 8, 2, 4, 2, g).permute(0, 5, 1, 3, 2, 4).reshape(g, n).contiguous()


def pack_fp4_scales(scales: Tensor) -> Tensor:
    n, g = scales.shape
    x = scales.view(torch.uint8).reshape(n // 128, 4, 4, 8, g // 4, 4).permute(0, 4, 3, 2, 1, 5)
    return x.reshape(g, n).contiguous().view(torch.float8_e4m3fn)


def pack_vector(vector: Tensor) -> Tensor:
    return vector.reshape(-1, 8, 2, 4, 2).permute(0, 1, 3, 2, 4).reshape(-1).contiguous()


def pack_up(up: Tensor) -> Tensor:
    n, r = up.shape
    return up.reshape(n // 16, 2, 8, r // 16, 2, 4, 2).permute(0, 3, 2, 5, 1, 4, 6).reshape(n, r).contiguous()


def pack_down(down: Tensor) -> Tensor:
    r, k = down.shape
    return (
        down.reshape(r // 16, 2, 8, k // 16, 2, 4, 2).permute(3, 0, 2, 5, 1, 4, 6).reshape(k, r).contiguous()
    )


# ---- the same order as index formulas: what a lane of the kernel loads -------------------------------------


def nibble_at(packed: Tensor, n: Tensor, k: Tensor, columns: int) -> Tensor:
    """The code of row n, column k."""
    p, h, g = n % 128 // 16, n % 16 // 8, n % 8
    kp, c, r = k % 64 // 32, k % 32 // 8, k % 8
    tile = n // 128 * (columns // 64) + k // 64
    word = (((tile * 8 + p) * 8 + g) * 4 + c) * 4 + h * 2 + kp
    byte = packed.flatten().view(torch.uint8)[4 * word + r // 2]
    return torch.where(r % 2 == 0, byte & 15, byte >> 4)


def int4_scale_index(n: Tensor, group: Tensor, groups: int) -> Tensor:
    a, b, c, e = n % 128 // 16, n % 16 // 8, n % 8 // 2, n % 2
    return (((n // 128 * groups + group) * 8 + a) * 4 + c) * 4 + b * 2 + e


def fp4_scale_index(n: Tensor, group: Tensor, groups: int) -> Tensor:
    s, q, lane = n % 128 // 32, n % 32 // 8, n % 8
    return ((((n // 128 * (groups // 4) + group // 4) * 8 + lane) * 4 + q) * 4 + s) * 4 + group % 4


def low_rank_index(channel: Tensor, r: Tensor, rank: int, down: bool) -> Tensor:
    tile = channel // 16 * (rank // 16) + r // 16
    row, column = (r, channel) if down else (channel, r)
    nh, nl = row % 16 // 8, row % 8
    kh, kl, e = column % 16 // 8, column % 8 // 2, column % 2
    return (((tile * 8 + nl) * 4 + kl) * 2 + nh) * 4 + kh * 2 + e


# ---- whole files -------------------------------------------------------------------------------------------


def comfy(state: Mapping[str, Tensor], prefix: str = "model.diffusion_model.") -> dict[str, Tensor]:
    """The original release's names, as ComfyUI's single files have them: qkv fused."""
    out = {}
    for name, x in state.items():
        if ".to_q.weight" in name:
            qkv = torch.cat([state[name.replace("to_q", to)] for to in ("to_q", "to_k", "to_v")])
            out[name.replace("to_q", "qkv")] = qkv
        elif not re.search(r"\.to_[kv]\.weight", name):
            for ours, theirs in COMFY_NAMES.items():
                name = name.replace(ours, theirs)
            out[name] = x
    out["norm_final.weight"] = torch.ones(state["x_pad_token"].shape[-1], dtype=torch.bfloat16)
    return {prefix + name: x.contiguous() for name, x in out.items()}


def nunchaku(
    state: Mapping[str, Tensor], pack: Callable[[Tensor, int], Packed], refiners: bool = True
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(the file's tensors, the state they stand for). refiners: whether those are quantized too."""
    tensors, exact = {}, dict(state)
    for base, sources in nunchaku_layers(state):
        weight = torch.cat([state[f"{source}.weight"] for source in sources])
        if refiners or base.startswith("layers."):
            packed, value = pack(weight, len(sources))
            tensors |= {f"{base}.{suffix}": x for suffix, x in packed.items()}
            for source, part in zip(sources, value.chunk(len(sources)), strict=True):
                exact[f"{source}.weight"] = part
        elif base.endswith("net.0.proj") or base.endswith("net.2"):
            tensors[f"{base}.weight"] = weight
        else:
            tensors |= {f"{source}.weight": state[f"{source}.weight"] for source in sources}
    return tensors | {n: x for n, x in state.items() if not LINEAR.search(n)}, exact


def nunchaku_layers(state: Mapping[str, Tensor]) -> Iterator[tuple[str, list[str]]]:
    """(Nunchaku's name, the layers it fuses in this order)."""
    for name in state:
        if name.endswith(".attention.to_q.weight"):
            block = name.removesuffix("attention.to_q.weight")
            yield f"{block}attention.to_qkv", [f"{block}attention.to_{x}" for x in "qkv"]
            yield f"{block}attention.to_out.0", [f"{block}attention.to_out.0"]
            yield f"{block}feed_forward.net.0.proj", [f"{block}feed_forward.w3", f"{block}feed_forward.w1"]
            yield f"{block}feed_forward.net.2", [f"{block}feed_forward.w2"]


def pack_layers(
    state: Mapping[str, Tensor], pack: Callable[[Tensor], Packed], rule: re.Pattern[str] = LINEAR
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(tensors, exact weights) with every matrix that `rule` matches packed."""
    tensors: dict[str, Tensor] = {}
    exact = {}
    for name, x in state.items():
        if rule.search(name):
            packed, exact[name] = pack(x)
            tensors |= {name.removesuffix("weight") + suffix: t for suffix, t in packed.items()}
        else:
            tensors[name] = exact[name] = x
    return tensors, exact


def quanto_map(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    layers = [name.removesuffix(".weight._data") for name in tensors if name.endswith("._data")]
    return {layer: {"weights": "qint8", "activations": "none"} for layer in layers}


def base64_json(table: Any) -> str:
    return base64.b64encode(json.dumps(table).encode()).decode()


def marker(form: str) -> Tensor:
    return torch.tensor(list(json.dumps({"format": form}).encode()), dtype=torch.uint8)


def write(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    save_file({name: x.contiguous().clone() for name, x in tensors.items()}, path, metadata)
    return path


def write_shards(folder: Path, tensors: Mapping[str, Tensor], count: int, index: bool = True) -> Path:
    """A diffusers folder: <stem>-00001-of-000NN.safetensors and, with `index`, the table of what is where."""
    folder.mkdir(parents=True, exist_ok=True)
    names = list(tensors)
    weight_map = {}
    for i in range(count):
        file = f"diffusion_pytorch_model-{i + 1:05}-of-{count:05}.safetensors"
        part = {name: tensors[name] for name in names[i::count]}
        write(folder / file, part)
        weight_map |= dict.fromkeys(part, file)
    if index:
        (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": weight_map})
        )
    return folder
