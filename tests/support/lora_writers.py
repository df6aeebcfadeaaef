"""LoRA files as each trainer writes them, all from one set of factors. Independent of the code under test.

A writer turns {module: (A [r, in], B [out, r], alpha)} into (tensors by key, metadata). What the file must do
is known beforehand: alpha / r * B @ A for each module.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

RANK, ALPHA = 4, 2.0
CONFIG = dict(
    dim=96, n_layers=2, n_refiner_layers=1, n_heads=3, norm_eps=1e-5, cap_feat_dim=40, in_channels=16,
    rope_theta=256.0, t_scale=1000.0, axes_dims=[8, 12, 12], axes_lens=[512, 64, 64], all_patch_size=[2],
    all_f_patch_size=[1], qk_norm=True, n_kv_heads=3,
)  # fmt: skip
DIM = 96
ATTENTION = ("to_q", "to_k", "to_v")
SHAPES = {
    **{f"layers.{i}.attention.{name}": (DIM, DIM) for i in range(2) for name in (*ATTENTION, "to_out.0")},
    **{f"layers.{i}.feed_forward.{name}": (256, DIM) for i in range(2) for name in ("w1", "w3")},
    **{f"layers.{i}.feed_forward.w2": (DIM, 256) for i in range(2)},
}
EVERYWHERE = SHAPES | {
    "layers.0.adaLN_modulation.0": (4 * DIM, DIM),
    "noise_refiner.0.attention.to_q": (DIM, DIM),
    "context_refiner.0.feed_forward.w1": (256, DIM),
    "all_x_embedder.2-1": (DIM, 64),
    "all_final_layer.2-1.linear": (64, DIM),
    "all_final_layer.2-1.adaLN_modulation.1": (DIM, DIM),
    "t_embedder.mlp.0": (1024, 256),
    "cap_embedder.1": (DIM, 40),
}

Factors = dict[str, tuple[Tensor, Tensor, float]]
Content = tuple[dict[str, Tensor], dict[str, str]]


def factors(
    shapes: dict[str, tuple[int, int]] = SHAPES, rank: int = RANK, alpha: float = ALPHA, seed: int = 0
) -> Factors:
    g = torch.Generator().manual_seed(seed)
    return {
        name: (torch.randn(rank, columns, generator=g), 0.1 * torch.randn(rows, rank, generator=g), alpha)
        for name, (rows, columns) in shapes.items()
    }


def deltas(given: Factors) -> dict[str, Tensor]:
    """What every file made of these factors adds to the weights."""
    return {name: alpha / len(a) * (b @ a) for name, (a, b, alpha) in given.items()}


def save(path: Path, content: Content) -> Path:
    tensors, metadata = content
    save_file({key: tensor.contiguous().clone() for key, tensor in tensors.items()}, path, metadata or None)
    return path


def underscored(name: str) -> str:
    return name.replace(".", "_")


@dataclass(frozen=True)
class Style:
    """How a trainer spells a plain LoRA. folds: the alpha is in the factors. alphas: it is in the file."""

    prefix: str = ""
    down: str = ".lora_A.weight"
    up: str = ".lora_B.weight"
    alphas: bool = False
    spell: Callable[[str], str] = str
    metadata: dict[str, str] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32

    def __call__(self, given: Factors) -> Content:
        tensors = {}
        for name, (a, b, alpha) in given.items():
            stem = self.prefix + self.spell(name)
            scale = 1.0 if self.alphas else alpha / len(a)
            tensors[stem + self.down] = (a * math.copysign(math.sqrt(abs(scale)), scale)).to(self.dtype)
            tensors[stem + self.up] = (b * math.sqrt(abs(scale))).to(self.dtype)
            if self.alphas:
                tensors[stem + ".alpha"] = torch.tensor(alpha, dtype=self.dtype)
        return tensors, dict(self.metadata)


KOHYA = dict(down=".lora_down.weight", up=".lora_up.weight", alphas=True)


def original(name: str) -> str:
    """The names of the original code, for modules that are not fused there."""
    table = {
        "attention.to_out.0": "attention.out",
        "all_x_embedder.2-1": "x_embedder",
        "all_final_layer.2-1.": "final_layer.",
    }
    for ours, theirs in table.items():
        name = name.replace(ours, theirs)
    return name


def stacked(given: Factors, stem: str, names: list[str]) -> tuple[Tensor, Tensor, float]:
    """Several modules' factors as one: the A's stacked, the B's on the diagonal; alpha grows too."""
    a = torch.cat([given[stem + name][0] for name in names])
    b = torch.block_diag(*(given[stem + name][1] for name in names))
    return a, b, given[stem + names[0]][2] * len(names)


def fused(given: Factors, keep_split: bool = False) -> Factors:
    """q, k, v as attention.qkv and to_out.0 as attention.out, the ways of musubi's converter and ComfyUI."""
    out: Factors = {}
    for name, factor in given.items():
        stem, _, last = name.rpartition("attention.")
        if last in ATTENTION:
            out[f"{stem}attention.qkv"] = stacked(given, f"{stem}attention.", list(ATTENTION))
        out[original(name)] = factor
    if keep_split:
        return out | given
    return {name: factor for name, factor in out.items() if name.rpartition("attention.")[2] not in ATTENTION}


def nunchaku(given: Factors) -> Factors:
    """to_qkv, net.0.proj (w3's rows, then w1's) and net.2."""
    out: Factors = {}
    for i in range(2):
        stem = f"layers.{i}."
        out[f"{stem}attention.to_qkv"] = stacked(given, f"{stem}attention.", list(ATTENTION))
        out[f"{stem}attention.to_out.0"] = given[f"{stem}attention.to_out.0"]
        out[f"{stem}feed_forward.net.0.proj"] = stacked(given, f"{stem}feed_forward.", ["w3", "w1"])
        out[f"{stem}feed_forward.net.2"] = given[f"{stem}feed_forward.w2"]
    return out


def after(change: Callable[[Factors], Factors], style: Style) -> Callable[[Factors], Content]:
    return lambda given: style(change(given))


def peft_header(given: Factors) -> Content:
    """SimpleTuner: the factors as they are, alpha / r in the header's JSON; one module by a pattern."""
    names = list(given)
    config = {
        "transformer.r": RANK,
        "transformer.lora_alpha": 99.0,
        "transformer.alpha_pattern": {name: given[name][2] for name in names},
    }
    tensors = unscaled("transformer.")(given)
    return tensors, {"format": "pt", "lora_adapter_metadata": json.dumps(config)}


def unscaled(prefix: str) -> Callable[[Factors], dict[str, Tensor]]:
    def write(given: Factors) -> dict[str, Tensor]:
        tensors = {}
        for name, (a, b, _) in given.items():
            tensors[f"{prefix}{name}.lora_A.weight"] = a
            tensors[f"{prefix}{name}.lora_B.weight"] = b
        return tensors

    return write


def mixed(given: Factors) -> Content:
    """Every module in another style: each key is to be judged by itself."""
    styles = [
        Style("diffusion_model."),
        Style("lora_unet_", spell=underscored, **KOHYA),
        Style("base_model.model.transformer."),
        Style("", down=".lora_A.default.weight", up=".lora_B.default.weight"),
    ]
    tensors: dict[str, Tensor] = {}
    for i, (name, factor) in enumerate(given.items()):
        tensors |= styles[i % len(styles)]({name: factor})[0]
    return tensors, {}


AI_TOOLKIT = {
    "software": json.dumps({"name": "ai-toolkit", "repo": "https://github.com/ostris/ai-toolkit"}),
    "ss_base_model_version": "zimage",
}

# flavour of the file -> (writer, what the reader must call it)
WRITERS: dict[str, tuple[Callable[[Factors], Content], str]] = {
    "ai-toolkit": (Style("diffusion_model.", metadata=AI_TOOLKIT), "ai-toolkit"),
    "ai-toolkit, no metadata": (Style("diffusion_model."), "ai-toolkit"),
    "musubi": (Style("lora_unet_", spell=underscored, **KOHYA), "kohya"),
    "musubi, converted to other": (Style("diffusion_model."), "ai-toolkit"),
    "musubi, converted for ComfyUI": (
        after(fused, Style("lora_unet_", spell=underscored, **KOHYA)),
        "kohya",
    ),
    "OneTrainer legacy": (Style("transformer.", **KOHYA), "OneTrainer"),
    "OneTrainer kohya": (Style("lora_unet_", spell=underscored, **KOHYA), "kohya"),
    "OneTrainer comfy": (Style("diffusion_model.", alphas=True), "OneTrainer"),
    "OneTrainer original": (Style("", alphas=True), "OneTrainer"),
    "OneTrainer diffusers": (Style("transformer."), "diffusers"),
    "DiffSynth": (Style("", ".lora_A.default.weight", ".lora_B.default.weight"), "DiffSynth"),
    "DiffSynth, prefixed": (
        Style("diffusion_model.", ".lora_A.default.weight", ".lora_B.default.weight"),
        "DiffSynth",
    ),
    "diffusers": (Style("transformer."), "diffusers"),
    "diffusers, PEFT header": (peft_header, "diffusers"),
    "bare PEFT": (Style(""), "diffusers"),
    "model": (Style("model."), ""),
    "raw PEFT": (Style("base_model.model."), "PEFT"),
    "raw PEFT around a transformer": (Style("base_model.model.transformer."), "PEFT"),
    "model.diffusion_model": (Style("model.diffusion_model."), "ComfyUI"),
    "VideoX-Fun": (
        Style("lora_unet__", ".lora_down.weight", ".lora_up.weight", spell=underscored),
        "VideoX-Fun",
    ),
    "lora_transformer": (Style("lora_transformer_", spell=underscored, **KOHYA), "kohya"),
    "LyCORIS' plain LoRA": (Style("lycoris_", spell=underscored, **KOHYA), "LyCORIS"),
    "dotted": (Style("diffusion_model.", ".lora.down.weight", ".lora.up.weight", True), "ComfyUI"),
    "dotted A, B": (Style("transformer.", ".lora.A.weight", ".lora.B.weight"), "diffusers"),
    "old diffusers": (Style("transformer.", "_lora.down.weight", "_lora.up.weight"), "diffusers"),
    "ComfyUI, A and B": (after(fused, Style("diffusion_model.")), "ComfyUI"),
    "ComfyUI, down and up": (after(fused, Style("diffusion_model.", **KOHYA)), "ComfyUI"),
    "Anime-Z": (
        after(lambda f: fused(f, True), Style("lora_unet_", spell=underscored, **KOHYA)),
        "kohya",
    ),
    "Nunchaku": (after(nunchaku, Style("transformer.", **KOHYA)), "OneTrainer"),
    "mixed": (mixed, "kohya"),
    "bf16": (Style("diffusion_model.", alphas=True, dtype=torch.bfloat16), "OneTrainer"),
}  # fmt: skip


# ---------------------------------------------------------------- other algorithms, and their own references


@dataclass(frozen=True)
class Other:
    """A file of another algorithm and what it makes of a weight: change(name, W) -> W' - W in float32."""

    tensors: dict[str, Tensor]
    change: dict[str, Callable[[Tensor], Tensor]]
    metadata: dict[str, str] = field(default_factory=dict)


def _each(
    write: Callable[[str, int, int, torch.Generator], Any],
    prefix: str,
    spell: Callable[[str], str],
    shapes: dict[str, tuple[int, int]] = SHAPES,
) -> Other:
    g = torch.Generator().manual_seed(7)
    tensors: dict[str, Tensor] = {}
    change: dict[str, Callable[[Tensor], Tensor]] = {}
    for name, (rows, columns) in shapes.items():
        found, change[name] = write(name, rows, columns, g)
        tensors |= {f"{prefix}{spell(name)}.{factor}": tensor for factor, tensor in found.items()}
    return Other(tensors, change)


def loha(rank: int = 3, prefix: str = "lora_unet_", spell: Callable[[str], str] = underscored) -> Other:
    def write(name: str, rows: int, columns: int, g: torch.Generator) -> Any:
        a, b, c, d = (
            torch.randn(*shape, generator=g) * 0.3
            for shape in ((rows, rank), (rank, columns), (rows, rank), (rank, columns))
        )
        found = {"hada_w1_a": a, "hada_w1_b": b, "hada_w2_a": c, "hada_w2_b": d, "alpha": torch.tensor(1.5)}
        return found, lambda w, d_=1.5 / rank * (a @ b) * (c @ d): d_

    return _each(write, prefix, spell)


def lokr(
    low_rank: bool = False, prefix: str = "lycoris_", spell: Callable[[str], str] = underscored
) -> Other:
    """Full matrices carry the huge alpha that ai-toolkit writes, which means nothing."""

    def write(name: str, rows: int, columns: int, g: torch.Generator) -> Any:
        w1 = torch.randn(4, 2, generator=g) * 0.3
        shape = (rows // 4, columns // 2)
        if not low_rank:
            w2 = torch.randn(*shape, generator=g) * 0.1
            full = torch.kron(w1, w2)
            return {"lokr_w1": w1, "lokr_w2": w2, "alpha": torch.tensor(9999999999.0)}, lambda w: full
        a, b = torch.randn(shape[0], 3, generator=g) * 0.3, torch.randn(3, shape[1], generator=g) * 0.3
        scaled = 6.0 / 3 * torch.kron(w1, a @ b)
        return {"lokr_w1": w1, "lokr_w2_a": a, "lokr_w2_b": b, "alpha": torch.tensor(6.0)}, lambda w: scaled

    return _each(write, prefix, spell)


def dora(
    axis: str = "out",
    suffix: str = "dora_scale",
    prefix: str = "transformer.",
    column: bool = True,
    shapes: dict[str, tuple[int, int]] = SHAPES,
) -> Other:
    """magnitude * V / |V| with V = W + delta, spelled by OneTrainer, PEFT or ai-toolkit."""

    def write(name: str, rows: int, columns: int, g: torch.Generator) -> Any:
        a, b = torch.randn(RANK, columns, generator=g), torch.randn(rows, RANK, generator=g) * 0.1
        m = torch.rand(rows if axis == "out" else columns, generator=g) + 0.5

        def change(w: Tensor) -> Tensor:
            v = w + b @ a
            if axis == "out":
                return m[:, None] * v / v.norm(dim=1, keepdim=True) - w
            return m[None, :] * v / v.norm(dim=0, keepdim=True) - w

        shaped = m[None, :] if axis == "in" else m[:, None] if column else m
        return {"lora_A.weight": a, "lora_B.weight": b, suffix: shaped}, change

    return _each(write, prefix, str, shapes)


def full_diff(prefix: str = "diffusion_model.") -> Other:
    def write(name: str, rows: int, columns: int, g: torch.Generator) -> Any:
        d = torch.randn(rows, columns, generator=g) * 0.1
        return {"diff": d}, lambda w: d

    return _each(write, prefix, str)


def lycoris_oft(
    block: int = 8,
    constraint: float = 0.0,
    shapes: dict[str, tuple[int, int]] = SHAPES,
    rescaled: bool = False,
) -> Other:
    """diag-OFT: W's rows in blocks, each turned by ((I + Q) (I - Q)^-1)^T, Q = blocks - blocks^T."""

    def write(name: str, rows: int, columns: int, g: torch.Generator) -> Any:
        blocks = torch.randn(rows // block, block, block, generator=g) * 0.2
        q = blocks - blocks.transpose(1, 2)
        if constraint and q.norm() > constraint * rows:
            q = q * constraint * rows / (q.norm() + 1e-8)

        m = torch.rand(rows, 1, generator=g) + 0.5 if rescaled else torch.ones(rows, 1)

        def change(w: Tensor) -> Tensor:
            out = w.clone()
            for i in range(len(q)):
                r = (torch.eye(block) + q[i]) @ torch.inverse(torch.eye(block) - q[i])
                out[i * block : (i + 1) * block] = r.T @ w[i * block : (i + 1) * block]
            return m * out - w

        found = {"oft_blocks": blocks, "alpha": torch.tensor(constraint)}
        return found | ({"rescale": m} if rescaled else {}), change

    return _each(write, "lycoris_", underscored, shapes)


def neumann(q: Tensor) -> Tensor:
    """PEFT's usual series."""
    return torch.eye(len(q)) + 2 * q + 2 * q @ q + 2 * q @ q @ q + q @ q @ q @ q


def peft_oft(
    block: int = 8,
    shapes: dict[str, tuple[int, int]] = SHAPES,
    rotate: Callable[[Tensor], Tensor] = neumann,
    prefix: str = "transformer.",
    limit: float = 0.0,
) -> Other:
    """OFT of PEFT and OneTrainer: the layer sees x @ R, R = rotate(Q), so W' = W @ R^T.

    limit: PEFT's "eps" of a constrained OFT; each Q is at most that over the root of their number.
    """

    def write(name: str, rows: int, columns: int, g: torch.Generator) -> Any:
        count = columns // block
        triangles = torch.randn(count, block * (block - 1) // 2, generator=g) * 0.1
        r = torch.zeros(columns, columns)
        for i in range(count):
            q = torch.zeros(block, block)
            place = 0
            for row in range(block):
                for column in range(row + 1, block):
                    q[row, column], q[column, row] = triangles[i, place], -triangles[i, place]
                    place += 1
            most = limit / math.sqrt(count)
            if limit and q.norm() > most:
                q = q * most / q.norm()
            at = slice(i * block, (i + 1) * block)
            r[at, at] = rotate(q)
        return {"oft_R.weight": triangles}, lambda w: w @ r.T - w

    return _each(write, prefix, str, shapes)


def lycoris_boft(block: int = 8, constraint: float = 0.0, rescaled: bool = False) -> Other:
    """Stages that mix rows 2^i * block / 2 apart: reshaped to [c, 2, k], swapped to [c, k, 2], turned by
    (I + Q) (I - Q)^-1 in blocks, and swapped back.
    """

    def write(name: str, rows: int, columns: int, g: torch.Generator) -> Any:
        stages = (rows // block & -(rows // block)).bit_length()  # as often as the blocks can be halved
        blocks = torch.randn(stages, rows // block, block, block, generator=g) * 0.2
        q = blocks - blocks.transpose(-1, -2)
        if constraint and q.norm() > constraint * rows:
            q = q * constraint * rows / q.norm()
        m = torch.rand(rows, 1, generator=g) + 0.5 if rescaled else torch.ones(rows, 1)

        def change(w: Tensor) -> Tensor:
            out = w
            for i in range(stages):
                k = 2**i * block // 2
                order = torch.arange(rows).view(-1, 2, k).transpose(1, 2).flatten()
                one = torch.eye(block)
                r = torch.block_diag(*((one + a) @ torch.inverse(one - a) for a in q[i]))
                mixed = torch.empty_like(out)
                mixed[order] = r @ out[order]
                out = mixed
            return m * out - w

        found = {"oft_blocks": blocks, "alpha": torch.tensor(constraint)}
        return found | ({"rescale": m} if rescaled else {}), change

    return _each(write, "lycoris_", underscored)


def peft_boft(block: int = 8, stages: int = 3) -> Other:
    """W' = s * W @ (B_n .. B_1)^T with B_i = P_i D_i P_i^T, D_i = Cayley of the blocks' skew halves, and P_i
    the even and then the odd runs of block / 2 inputs in each group of block * 2^i.
    """

    def write(name: str, rows: int, columns: int, g: torch.Generator) -> Any:
        blocks = torch.randn(stages, columns // block, block, block, generator=g) * 0.3
        s, run = torch.rand(rows, 1, generator=g) + 0.5, block // 2
        butterfly = torch.eye(columns)
        for i in range(stages):
            q = [0.5 * (a - a.T) for a in blocks[i]]
            d = torch.block_diag(*((torch.eye(block) - a) @ torch.inverse(torch.eye(block) + a) for a in q))
            runs, p = 2 * 2**i, torch.zeros(columns, columns)
            places = [*range(0, runs, 2), *range(1, runs, 2)]
            for start in range(0, columns, block * 2**i):
                for to, place in enumerate(places):
                    for j in range(run):
                        p[start + to * run + j, start + place * run + j] = 1
            butterfly = p @ d @ p.T @ butterfly
        return {"boft_R": blocks, "boft_s": s}, lambda w: s * (w @ butterfly.T) - w

    return _each(write, "base_model.model.", str)


OTHERS: dict[str, tuple[Callable[[], Other], str]] = {
    "LoHa, musubi": (loha, "LoHa"),
    "LoHa, dotted": (lambda: loha(3, "diffusion_model.", str), "LoHa"),
    "LoHa, rank too high for a pair": (lambda: loha(12), "LoHa"),
    "LoKr, ai-toolkit's old names": (lokr, "LoKr"),
    "LoKr, dotted": (lambda: lokr(False, "diffusion_model.", str), "LoKr"),
    "LoKr, low rank": (lambda: lokr(True), "LoKr"),
    "LoKr, low rank, kohya": (lambda: lokr(True, "lora_unet_"), "LoKr"),
    "DoRA, everywhere": (lambda: dora(shapes=EVERYWHERE), "DoRA"),
    "DoRA of inputs, everywhere": (lambda: dora("in", shapes=EVERYWHERE), "DoRA"),
    "OFT, LyCORIS, everywhere": (lambda: lycoris_oft(shapes=EVERYWHERE), "OFT"),
    "OFT, PEFT, everywhere": (lambda: peft_oft(shapes=EVERYWHERE), "OFT"),
    "DoRA, OneTrainer": (lambda: dora("in"), "DoRA"),
    "DoRA, LyCORIS": (dora, "DoRA"),
    "DoRA, PEFT": (lambda: dora("out", "lora_magnitude_vector.weight", column=False), "DoRA"),
    "DoRA, ai-toolkit": (lambda: dora("out", "magnitude", "diffusion_model.", False), "DoRA"),
    "differences": (full_diff, "diff"),
    "OFT, LyCORIS": (lycoris_oft, "OFT"),
    "OFT, LyCORIS, constrained": (lambda: lycoris_oft(8, 0.01), "OFT"),
    "OFT, LyCORIS, rescaled": (lambda: lycoris_oft(rescaled=True), "OFT"),
    "OFT, PEFT": (peft_oft, "OFT"),
    "BOFT, LyCORIS": (lycoris_boft, "BOFT"),
    "BOFT, LyCORIS, constrained": (lambda: lycoris_boft(4, 0.01), "BOFT"),
    "BOFT, LyCORIS, rescaled": (lambda: lycoris_boft(2, rescaled=True), "BOFT"),
    "BOFT, PEFT": (peft_boft, "BOFT"),
    "BOFT, PEFT, one stage": (lambda: peft_boft(4, 1), "BOFT"),
}


# ---------------------------------------------------------------- habits that change what a file means


def scaled_oft(block: int = 8) -> Other:
    """OneTrainer's scaled OFT: the marker oft_R.scaled_oft, angles divided by 2 sqrt(block - 1)."""

    def write(name: str, rows: int, columns: int, g: torch.Generator) -> Any:
        triangles = torch.randn(columns // block, block * (block - 1) // 2, generator=g)
        rotations = []
        for angles in triangles / (2 * math.sqrt(block - 1)):
            q = torch.zeros(block, block)
            q[tuple(torch.triu_indices(block, block, 1))] = angles
            q = q - q.T
            rotations.append(torch.eye(block) + 2 * q + 2 * q @ q + 2 * q @ q @ q + q @ q @ q @ q)
        r = torch.block_diag(*rotations)
        return {"oft_R.weight": triangles, "oft_R.scaled_oft": torch.tensor(True)}, lambda w: w @ r.T - w

    return _each(write, "transformer.", str)


def peft_loha(alpha: float, rank: int, adapter: str = "") -> Other:
    """PEFT's LoHa: alpha / r from adapter_config.json. Its factors are parameters without ".weight"."""

    def write(name: str, rows: int, columns: int, g: torch.Generator) -> Any:
        a, b, c, d = (
            torch.randn(*shape, generator=g) * 0.3
            for shape in ((rows, rank), (rank, columns), (rows, rank), (rank, columns))
        )
        found = {"hada_w1_a": a, "hada_w1_b": b, "hada_w2_a": c, "hada_w2_b": d}
        return {key + adapter: t for key, t in found.items()}, lambda w: alpha / rank * (a @ b) * (c @ d)

    return _each(write, "base_model.model.", str)


def peft_lokr(alpha: float, rank: int, full: bool, adapter: str = "") -> Other:
    """PEFT's LoKr: alpha / r of the configuration, whether its second factor is full or a product."""

    def write(name: str, rows: int, columns: int, g: torch.Generator) -> Any:
        w1 = torch.randn(4, 2, generator=g) * 0.3
        a, b = torch.randn(rows // 4, rank, generator=g), torch.randn(rank, columns // 2, generator=g) * 0.1
        found = {"lokr_w1": w1} | ({"lokr_w2": a @ b} if full else {"lokr_w2_a": a, "lokr_w2_b": b})
        return {key + adapter: t for key, t in found.items()}, lambda w: alpha / rank * torch.kron(w1, a @ b)

    return _each(write, "base_model.model.", str)
