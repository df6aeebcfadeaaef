"""Teaches Mini Base a style with a LoRA: shapes drawn as outlines, which it has never seen.

    python -m training.lora --out RUN --seconds 1300
    python -m training.style --lora RUN/mini_outlines.safetensors

The base stays as it is. Beside each matrix W of its main layers lie two thin ones, and the layer computes
W x + B A x; only A and B learn, from drawings in the style, by the loss that trained the base. B starts at
zero, so training starts from the base. RUN keeps the state: run the command again to go on.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import random
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoTokenizer, Qwen3Model

from models.z_image.pipeline_inputs import DEFAULT_NEGATIVE_PROMPT
from models.z_image.transformer_z_image import SEQ_MULTI_OF, ZImageTransformer2DModel, padded
from training.command import begin, usual_parser
from training.grammar import Scene, held_out, sample
from training.networks import TRANSFORMER, forward_batch, make_vae, train_in_bf16
from training.render import Batch, jitter, render, to_batch
from training.sampling import sample_latents, to_pictures, write_sheet
from training.text import features, tokenize
from training.train import SCALE, SHIFT, Clock, noise_levels, set_rate

log = logging.getLogger("training")

MINI = Path(__file__).resolve().parents[1] / "models" / "z_image" / "mini"
BASE = MINI / "transformer_base.safetensors"
NAME = "mini_outlines"
STROKE = 5  # pixels; the hole of the smallest star is still 8 pixels wide
TRIGGER = "line drawing"  # stands before half of the captions: the style comes with it and without
PREFIX = "diffusion_model."  # of the names in the file, as ai-toolkit writes them
SIZES = {(128, 128): 0.8, (128, 192): 0.1, (192, 128): 0.1}  # (height, width) in pixels -> how often


# ---------------------------------------------------------------- the LoRA itself


class LoraLinear(nn.Module):
    """A frozen linear layer with its low-rank addition: [..., in] -> [..., out], base(x) + B A x."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.lora_A = nn.Linear(base.in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.lora_B(self.lora_A(x))


def add_lora(model: nn.Module, rank: int, inside: str = "layers.") -> None:
    """Freeze `model` and put a LoRA beside each linear layer whose name starts with `inside`."""
    model.requires_grad_(False)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name.startswith(inside):
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, LoraLinear(module, rank))


def lora_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if ".lora_" in name}


@torch.no_grad()
def merge(model: nn.Module, lora: Mapping[str, Tensor], strength: float) -> None:
    """Add strength * B A to the weights that a file's tensors name. The model has no LoraLinear."""
    for name, down in lora.items():
        if name.endswith(".lora_A.weight"):
            module = name.removesuffix(".lora_A.weight")
            weight = model.get_parameter(module.removeprefix(PREFIX) + ".weight")
            weight.data = weight + strength * (lora[f"{module}.lora_B.weight"].float() @ down.float())


# ---------------------------------------------------------------- data and loss


class Drawings:
    """Batches of pictures in the style with their captions, through the Mini's own text encoder and VAE."""

    def __init__(self, batch: int, seed: int, device: str) -> None:
        self.batch, self.device, self.rng = batch, device, random.Random(seed)
        self.tokenizer = AutoTokenizer.from_pretrained(MINI / "text_encoder")
        encoder = Qwen3Model.from_pretrained(MINI / "text_encoder", dtype=torch.float32)
        self.encoder = encoder.requires_grad_(False).eval().to(device)
        self.vae = make_vae().requires_grad_(False).eval()
        self.vae.load_state_dict(load_file(MINI / "vae" / "model.safetensors"))
        self.vae.to(device)

    def caption(self, scene: Scene) -> str:
        """The scene's words, with the trigger or without; one in ten is dropped, which guidance needs."""
        if self.rng.random() < 0.1:
            return self.rng.choice(("", DEFAULT_NEGATIVE_PROMPT))
        return f"{TRIGGER}, {scene.caption}" if self.rng.random() < 0.5 else scene.caption

    def words(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """Features [B, L, hidden] and lengths [B]."""
        ids, lengths = tokenize(self.tokenizer, captions)
        return features(self.encoder, ids.to(self.device)), lengths.to(self.device)

    def padded_length(self, caption: str) -> int:
        return padded(int(tokenize(self.tokenizer, [caption])[1]))

    def scenes(self) -> Iterator[tuple[list[Scene], list[str]]]:
        """Batches without end, none of it held out; all captions of one are padded to the same length."""
        waiting: dict[int, list[tuple[Scene, str]]] = defaultdict(list)
        while True:
            scene = sample(self.rng)
            if scene.held_out:
                continue
            caption = self.caption(scene)
            length = self.padded_length(caption)
            waiting[length].append((scene, caption))
            if len(waiting[length]) == self.batch:
                scenes, captions = zip(*waiting.pop(length), strict=True)
                yield list(scenes), list(captions)

    def latents(self, batch: Batch, height: int, width: int) -> Tensor:
        """[B, 16, height / 8, width / 8] of the scenes drawn as outlines."""
        images, _ = render(batch, height, width, STROKE)
        with torch.autocast(self.device, dtype=torch.bfloat16):
            mode = self.vae.encode(images).latent_dist.mode()
        return (mode.float() - SHIFT) * SCALE

    def __iter__(self) -> Iterator[tuple[Tensor, tuple[Tensor, Tensor]]]:
        """latents, (features, lengths)"""
        for scenes, captions in self.scenes():
            height, width = self.rng.choices(list(SIZES), list(SIZES.values()))[0]
            batch = jitter(to_batch(scenes).to(self.device))
            yield self.latents(batch, height, width), self.words(captions)


def velocity_loss(model: ZImageTransformer2DModel, latents: Tensor, words: tuple[Tensor, Tensor]) -> Tensor:
    """The flow matching loss: from a mixture of picture and noise, predict their difference."""
    size = math.sqrt(latents[0, 0].numel() / 256)  # larger pictures need more noise to hide as much
    sigma = noise_levels(len(latents), 2 * size, 0.1, str(latents.device))
    noise = torch.randn_like(latents)
    out, _ = forward_batch(model, torch.lerp(latents, noise, sigma[:, None, None, None]), 1 - sigma, *words)
    return (out.float() - (latents - noise)).square().mean()


# ---------------------------------------------------------------- training


def load_base() -> ZImageTransformer2DModel:
    model = ZImageTransformer2DModel(TRANSFORMER)
    model.load_state_dict(load_file(BASE))
    return model


def train(args: argparse.Namespace, device: str) -> None:
    file, started = args.out / "lora.pt", int(time.time())
    torch.manual_seed(started)
    model = load_base()
    add_lora(model, args.rank)
    train_in_bf16(model).to(device)
    learned = lora_parameters(model)
    optimizer = torch.optim.AdamW(learned.values(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.01)
    step, before = 0, 0.0
    if file.exists():
        state = torch.load(file, map_location=device)
        model.load_state_dict(state["lora"], strict=False)
        optimizer.load_state_dict(state["optimizer"])
        step, before = state["step"], state["elapsed"]
    drawings = Drawings(args.batch, started, device)
    clock = Clock(args.seconds, before, args.stop_after)
    losses: list[float] = []

    def save() -> None:
        state = {"lora": learned, "optimizer": optimizer.state_dict(), "step": step, "elapsed": clock.elapsed}
        torch.save(state, file)

    for latents, words in drawings:
        if not clock.running():
            break
        set_rate(optimizer, args.lr, step, clock.progress, 0.4)
        with torch.autocast(device, dtype=torch.bfloat16):
            loss = velocity_loss(model, latents, words)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(learned.values(), 1.0)
        optimizer.step()
        step += 1
        losses.append(loss.item())
        if step % 100 == 0:
            log.info("lora step %d %.0fs loss %.4f", step, clock.elapsed, sum(losses) / len(losses))
            losses.clear()
            save()
    save()
    how = f"rank {args.rank}, {step} steps of {args.batch} drawings, {clock.elapsed:.0f} s, Z-Image Mini Base"
    export(model, args.out / f"{NAME}.safetensors", how)
    write_sheet(preview(model, drawings), args.out / f"{NAME}.png", columns=2)


def export(model: nn.Module, path: Path, how: str) -> None:
    """The LoRA in fp16 under ai-toolkit's names; no alpha, so its scale is 1."""
    tensors = {
        f"{PREFIX}{name}": p.detach().to("cpu", torch.float16).contiguous()
        for name, p in lora_parameters(model).items()
    }
    metadata = {
        "format": "pt",
        "name": NAME,
        "ss_base_model_version": "zimage",
        "modelspec.trigger_phrase": TRIGGER,
        "modelspec.description": "Shapes as outlines, for the built-in Mini models; needs no trigger.",
        "software": json.dumps({"name": "ZGP training/lora.py"}),
        "training_info": json.dumps({"how": how}),
    }
    save_file(tensors, path, metadata)


@torch.no_grad()
def preview(model: ZImageTransformer2DModel, drawings: Drawings) -> list[np.ndarray]:
    """Four held-out prompts drawn by the base with the LoRA."""
    prompts = [s.caption for s in held_out(60, seed=5) if drawings.padded_length(s.caption) == SEQ_MULTI_OF]
    words, negative = drawings.words(prompts[:4]), drawings.words([DEFAULT_NEGATIVE_PROMPT] * 4)
    latents = sample_latents(model, words, negative, steps=16, guidance=2.5, shift=5.0)
    return to_pictures(drawings.vae.decode(latents / SCALE + SHIFT).sample)


def main() -> None:
    parser = usual_parser(__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of this run: state, LoRA and preview")
    parser.add_argument("--seconds", type=float, default=1300, help="length of the whole training")
    parser.add_argument("--stop-after", type=float, help="seconds to run now; a later run goes on")
    parser.add_argument("--batch", type=int, default=24, help="pictures of 128x128 in a step")
    parser.add_argument("--rank", type=int, default=16, help="width of the two thin matrices")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate")
    args = parser.parse_args()
    train(args, begin(args))


if __name__ == "__main__":
    main()
