"""Trains the Mini models, one stage at a time; each stage can stop and go on.

    python -m training.train text  --out RUN                 tokenizer, and the linear code of the latents
    python -m training.train base  --out RUN --seconds 2800 --batch 24 --lr 2.5e-3
    python -m training.train vae   --out RUN --seconds 1700
    python -m training.train turbo --out RUN --seconds 800 --batch 24 --lr 1e-3

A transformer stage that was stopped goes on when its command is run again.

The defaults are those of one CPU core, which is faster than two threads as soon as anything else runs; `vae`
may run beside `base` on another core, the latents do not depend on it. With a GPU use --batch 1024 and a
tenth of the time.
"""

from __future__ import annotations

import argparse
import copy
import logging
import math
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoTokenizer

from models.z_image.transformer_z_image import SEQ_MULTI_OF, ZImageTransformer2DModel
from training.command import begin, usual_parser
from training.data import Pool, make_pool, unconditional
from training.grammar import held_out, sample
from training.networks import VAE, AuxiliaryHead, forward_batch, make_transformer, make_vae, train_in_bf16
from training.render import jitter, render, to_batch
from training.sampling import sample_latents, sigmas, to_pictures, write_sheet
from training.score import judge, summarize
from training.text import features, make_encoder, tokenize, train_tokenizer

log = logging.getLogger("training")
SQUARE = {(128, 128): 1.0}
SIZES = {  # (height, width) in pixels -> how often, once the shapes are there
    (128, 128): 0.72,
    (128, 192): 0.09,
    (192, 128): 0.09,
    (192, 192): 0.07,
    (256, 256): 0.03,
}
SQUARE_UNTIL = 0.7  # share of the base stage that sees 128x128 only
CAPTION_SHARES = {32: 0.88, 64: 0.12}  # batches by padded caption length
SCALE, SHIFT = float(VAE["scaling_factor"]), float(VAE["shift_factor"])  # type: ignore[arg-type]
TEACHER_GUIDANCE = 2.5  # baked into the guidance-free Mini


class Clock:
    """Progress of a stage in seconds, over any number of runs."""

    def __init__(self, total: float, before: float, stop_after: float | None) -> None:
        self.total, self.before, self.started = total, before, time.monotonic()
        self.stop = min(total, before + stop_after) if stop_after else total
        self.paused = 0.0

    @property
    def elapsed(self) -> float:
        return self.before + time.monotonic() - self.started - self.paused

    @property
    def progress(self) -> float:
        return min(1.0, self.elapsed / self.total)

    def running(self) -> bool:
        return self.elapsed < self.stop


# ---------------------------------------------------------------- VAE


def patches(images: Tensor) -> Tensor:
    """[B, 3, H, W] -> [B, 192, H/8, W/8], one column of values for each latent pixel."""
    return F.pixel_unshuffle(images, 8)


def principal_latents(device: str) -> dict[str, Tensor]:
    """A linear code of 8x8 patches in 16 half-whitened principal components: the latents are defined by it,
    encoder and decoder learn it by regression, and the transformer never has to wait for them."""
    rng = random.Random(7)
    batch = jitter(to_batch([sample(rng) for _ in range(3000)]).to(device))
    x = patches(render(batch, 128, 128)[0]).permute(0, 2, 3, 1).flatten(0, 2)
    mean = x.mean(0)
    values, vectors = torch.linalg.eigh(((x - mean).T @ (x - mean) / len(x)).double())
    values, vectors = values.flip(0)[:16].float(), vectors.flip(1)[:, :16].float()
    gain = values.sqrt().rsqrt()
    gain = gain / ((x - mean) @ (vectors * gain)).std()
    log.info("16 components keep %.2f %% of the variance", 100 * values.sum() / x.var(0).sum())
    return {"mean": mean, "encode": vectors * gain, "decode": (vectors / gain).T}


def load_code(args: argparse.Namespace, device: str) -> dict[str, Tensor]:
    return {name: x.to(device) for name, x in torch.load(args.out / "code.pt").items()}


def encode_linear(code: dict[str, Tensor], images: Tensor) -> Tensor:
    """[B, 3, H, W] -> [B, 16, H/8, W/8], standard deviation 1."""
    x = patches(images).movedim(1, -1)
    return ((x - code["mean"]) @ code["encode"]).movedim(-1, 1)


def decode_linear(code: dict[str, Tensor], latents: Tensor) -> Tensor:
    """The inverse of `encode_linear`, as well as 16 of 192 components can."""
    return F.pixel_shuffle((latents.movedim(1, -1) @ code["decode"] + code["mean"]).movedim(-1, 1), 8)


def train_vae(args: argparse.Namespace, device: str) -> None:
    file = args.out / "vae.pt"
    torch.manual_seed(0)
    vae = make_vae().to(device, memory_format=torch.channels_last)
    code, before = load_code(args, device), 0.0
    if file.exists():
        state = torch.load(file, map_location=device)
        vae.load_state_dict(state["vae"])
        before = state["elapsed"]
    optimizer = torch.optim.AdamW(vae.parameters(), lr=args.lr or 3e-3, betas=(0.9, 0.99), weight_decay=1e-4)
    clock, rng = Clock(args.seconds, before, args.stop_after), random.Random(int(before))
    pool = to_batch([sample(rng) for _ in range(20_000 if device == "cuda" else 1000)]).to(device)
    step = 0
    while clock.running():
        set_rate(optimizer, args.lr or 3e-3, step, clock.progress, 0.5)
        side = random.choice((128, 128, 128, 192, 256))
        count = max(1, (args.batch or 8) * 128 * 128 // side**2)
        index = torch.randint(len(pool.back), (count,), device=device)
        images, _ = render(jitter(pool[index]), side, side)
        target = encode_linear(code, images)
        noisy = target + torch.rand(count, 1, 1, 1, device=device) * 0.15 * torch.randn_like(target)
        with torch.autocast(device, dtype=torch.bfloat16):
            moments, decoded = vae.encoder(images), vae.decoder(noisy / SCALE + SHIFT)
        mean, log_variance = moments.float().chunk(2, 1)
        error, difference = (mean - SHIFT) * SCALE - target, decoded.float() - images
        edges = difference.diff(dim=-1).abs().mean() + difference.diff(dim=-2).abs().mean()
        decoding = difference.abs().mean() + 0.5 * edges + difference.square().mean()
        loss = decoding + error.square().mean() + 1e-3 * (log_variance + 12).square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % 200 == 0 or step == 5:
            psnr = 10 * math.log10(4 / difference.square().mean().item())
            log.info(
                "vae %d %.0fs %.1f dB, encoder mse %.4f",
                step,
                clock.elapsed,
                psnr,
                error.square().mean().item(),
            )
    torch.save({"vae": vae.state_dict(), "elapsed": clock.elapsed}, file)


# ---------------------------------------------------------------- transformer


def make_optimizers(model: nn.Module, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of attention and feed-forward, AdamW for the rest."""
    matrices: list[Tensor] = []
    rest: list[Tensor] = []
    for name, parameter in model.named_parameters():
        inner = parameter.ndim == 2 and ("attention.to_" in name or "feed_forward" in name)
        (matrices if inner else rest).append(parameter)
    return [
        torch.optim.Muon(matrices, lr=rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=rate, betas=(0.9, 0.98), weight_decay=0.01),
    ]


def set_rate(optimizer: torch.optim.Optimizer, rate: float, step: int, progress: float, flat: float) -> None:
    """Warm-up over 100 steps, constant, then linear to zero from `flat` of the stage on."""
    decay = 1.0 if progress < flat else max(0.01, (1 - progress) / (1 - flat))
    for group in optimizer.param_groups:
        group["lr"] = rate * min(1.0, (step + 1) / 100) * decay


class Feeder:
    """Batches of one picture size and one caption length each."""

    def __init__(self, args: argparse.Namespace, device: str) -> None:
        folder = str(args.out / "tokenizer")
        self.device, self.batch = device, args.batch or 16
        tokenizer = AutoTokenizer.from_pretrained(folder)
        self.encoder = make_encoder(len(tokenizer)).to(device)
        pool = make_pool(folder, args.pool, seed=int(time.time()) % 10_000)
        self.buckets = {
            length: torch.nonzero(padded_lengths(pool) == length)[:, 0].to(device)
            for length in CAPTION_SHARES
        }
        log.info("pool by caption length %s", {k: len(v) for k, v in self.buckets.items()})
        self.pool: Pool = pool.to(device)
        self.nothing = unconditional(tokenizer)
        self.code = load_code(args, device)

    def words(self, name: str, count: int) -> tuple[Tensor, Tensor]:
        """`count` copies of one of the 'no prompt' captions: features and lengths."""
        ids, length = self.nothing[name]
        found = features(self.encoder, ids[None].to(self.device))
        return found.expand(count, -1, -1), torch.full((count,), length, device=self.device)

    def next(self, sizes: dict[tuple[int, int], float]) -> dict[str, Any]:
        """latents [B, 16, h, w], features, lengths, kept [B] (prompt not dropped), scenes and their
        coverage.
        """
        height, width = random.choices(list(sizes), list(sizes.values()))[0]
        longest = random.choices(list(CAPTION_SHARES), list(CAPTION_SHARES.values()))[0]
        bucket = self.buckets[longest]
        count = max(2, self.batch * 128 * 128 // (height * width))
        index = bucket[torch.randint(len(bucket), (count,), device=self.device)]
        ids, lengths = self.pool.ids[index, :longest].long(), self.pool.lengths[index].clone()
        kept = torch.rand(count, device=self.device) > 0.1
        name = "empty" if longest < 64 else random.choice(("empty", "negative"))
        nothing, nothing_length = self.nothing[name]
        blank = F.pad(nothing, (0, longest - len(nothing))).to(self.device)
        ids = torch.where(kept[:, None], ids, blank)
        lengths = torch.where(kept, lengths, nothing_length)
        batch = jitter(self.pool.scenes(index))
        images, cover = render(batch, height, width)
        return {
            "latents": encode_linear(self.code, images),
            "features": features(self.encoder, ids),
            "lengths": lengths,
            "kept": kept,
            "batch": batch,
            "cover": cover,
        }


def padded_lengths(pool: Pool) -> Tensor:
    return (pool.lengths + SEQ_MULTI_OF - 1) // SEQ_MULTI_OF * SEQ_MULTI_OF


def noise_levels(count: int, shift: float, high: float, device: str) -> Tensor:
    """Logit-normal sigmas, shifted, with a share `high` of them close to 1 where the layout is decided."""
    u = torch.sigmoid(torch.randn(count, device=device))
    sigma = shift * u / (1 + (shift - 1) * u)
    top = 1 - 0.08 * torch.rand(count, device=device).square()
    return torch.where(torch.rand(count, device=device) < high, top, sigma)


class Evaluator:
    """The adherence score of a transformer, in batches on the training device."""

    def __init__(self, args: argparse.Namespace, feeder: Feeder, count: int) -> None:
        self.scenes, self.feeder, self.out = held_out(count), feeder, args.out
        tokenizer = AutoTokenizer.from_pretrained(str(args.out / "tokenizer"))
        ids, lengths = tokenize(tokenizer, [s.caption for s in self.scenes])
        self.prompt = (features(feeder.encoder, ids.to(feeder.device)), lengths.to(feeder.device))

    @torch.no_grad()
    def __call__(self, model: nn.Module, name: str, *, side: int = 128, sheet: str = "", **how: Any) -> float:
        negative = self.feeder.words("negative", len(self.scenes))
        latents = sample_latents(model, self.prompt, negative, size=(side // 8, side // 8), **how)  # type: ignore[arg-type]
        pictures = to_pictures(decode_linear(self.feeder.code, latents))
        result = summarize([judge(p, s) for p, s in zip(pictures, self.scenes, strict=True)])
        log.info("%s %dpx %s: %s", name, side, how, result)
        if sheet:
            write_sheet(pictures[:48], self.out / sheet)
        return result.everything


def optimize(
    args: argparse.Namespace,
    name: str,
    device: str,
    model: ZImageTransformer2DModel,
    loss_of: Callable[[dict[str, Any], float], Tensor],
    feeder: Feeder,
    evaluate: Callable[[nn.Module, str], Any],
    extra: nn.Module | None = None,
    flat: float = 0.55,
) -> bool:
    """The loop both transformer stages share: rates, averaging, checkpoints, evaluation. True when
    complete.
    """
    file, rate = args.out / f"{name}.pt", args.lr or 2e-3
    average = copy.deepcopy(model).requires_grad_(False)
    optimizers = make_optimizers(model, rate)
    if extra is not None:
        optimizers.append(torch.optim.AdamW(extra.parameters(), lr=rate))
    modules = {"model": model, "average": average, **({"extra": extra} if extra is not None else {})}
    step, before = 0, 0.0
    if file.exists():
        state = torch.load(file, map_location=device)
        for key, module in modules.items():
            module.load_state_dict(state[key])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        step, before = state["step"], state["elapsed"]
    clock = Clock(args.seconds, before, args.stop_after)
    seen, losses, next_look = 0, [], before + args.look_every
    while clock.running():
        for optimizer in optimizers:
            set_rate(optimizer, rate, step, clock.progress, flat)
        data = feeder.next(SQUARE if extra is not None and clock.progress < SQUARE_UNTIL else SIZES)
        with torch.autocast(device, dtype=torch.bfloat16):
            loss = loss_of(data, clock.progress)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        decay = min(args.average, (step + 1) / (step + 10))
        torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
        step, seen = step + 1, seen + len(data["latents"])
        if step % 20 == 0:
            losses.append(loss.detach())
        if step % 500 == 0 or step in (5, 100):
            mean = torch.stack(losses).mean().item() if losses else loss.item()
            log.info("%s step %d %.0fs seen here %d loss %.4f", name, step, clock.elapsed, seen, mean)
            losses = []
        if clock.elapsed > next_look or not clock.running():
            started = time.monotonic()
            state = {k: m.state_dict() for k, m in modules.items()}
            state |= {
                "optimizers": [o.state_dict() for o in optimizers],
                "step": step,
                "elapsed": clock.elapsed,
            }
            torch.save(state, file)
            evaluate(average, f"{name}-{clock.elapsed:.0f}s")
            next_look = clock.elapsed + args.look_every
            clock.paused += time.monotonic() - started
    return clock.progress >= 1


def trainable(device: str) -> ZImageTransformer2DModel:
    return train_in_bf16(make_transformer()).to(device)


def train_base(args: argparse.Namespace, device: str) -> None:
    model, head = trainable(device), AuxiliaryHead(128).to(device)
    feeder = Feeder(args, device)
    look = Evaluator(args, feeder, args.count)

    def loss_of(data: dict[str, Any], progress: float) -> Tensor:
        latents = data["latents"]
        wide = math.sqrt(latents[0, 0].numel() / 256)  # larger pictures need more noise to hide as much
        shift, high = (4.0, 0.25) if progress < 0.12 else (2.0, 0.10)
        sigma = noise_levels(len(latents), shift * wide, high, device)
        noise = torch.randn_like(latents)
        x = torch.lerp(latents, noise, sigma[:, None, None, None])
        out, tokens = forward_batch(model, x, 1 - sigma, data["features"], data["lengths"])
        auxiliary = head.loss(tokens, data["batch"], data["cover"], data["kept"])
        weight = 0.5 if progress < 0.7 else 0.3
        return (out.float() - (latents - noise)).square().mean() + weight * auxiliary

    def evaluate(average: nn.Module, name: str) -> None:
        look(average, name, steps=12, guidance=2.5, shift=5.0, sheet=f"{name}.png")

    if not optimize(args, "base", device, model, loss_of, feeder, evaluate, extra=head):
        return
    final = trainable(device)
    final.load_state_dict(torch.load(args.out / "base.pt", map_location=device)["average"])
    for guidance in (1.5, 2.5, 3.5):
        for shift in (3.0, 6.0):
            look(final, "base", steps=30, guidance=guidance, shift=shift)
    for steps in (8, 2):
        look(final, "base", steps=steps, guidance=2.5, shift=3.0)
    look(final, "base", steps=30, guidance=0.0, shift=6.0)
    for side in (192, 256):
        look(final, "base", side=side, steps=30, guidance=2.5, shift=6.0, sheet=f"base{side}.png")


def train_turbo(args: argparse.Namespace, device: str) -> None:
    """Guidance distillation: the student's one forward equals the base's guided pair of forwards."""
    teacher = trainable(device).requires_grad_(False)
    teacher.load_state_dict(torch.load(args.out / "base.pt", map_location=device)["average"])
    student = trainable(device)
    student.load_state_dict(teacher.state_dict())
    feeder = Feeder(args, device)
    look = Evaluator(args, feeder, args.count)
    grid = torch.tensor(sigmas(8, 3.0)[:-1], device=device, dtype=torch.float32)

    def loss_of(data: dict[str, Any], progress: float) -> Tensor:
        latents = data["latents"]
        count = len(latents)
        sigma = noise_levels(count, 3.0, 0.15, device)
        on_grid = grid[torch.randint(len(grid), (count,), device=device)]
        sigma = torch.where(torch.rand(count, device=device) < 0.5, on_grid, sigma)
        noise = torch.randn_like(latents)
        x = torch.lerp(latents, noise, sigma[:, None, None, None])
        with torch.no_grad():
            positive, _ = forward_batch(teacher, x, 1 - sigma, data["features"], data["lengths"])
            negative, _ = forward_batch(teacher, x, 1 - sigma, *feeder.words("empty", count))
            target = positive.float() + TEACHER_GUIDANCE * (positive - negative).float()
        out, _ = forward_batch(student, x, 1 - sigma, data["features"], data["lengths"])
        return (out.float() - target).square().mean()

    def evaluate(average: nn.Module, name: str) -> None:
        look(average, name, steps=8, guidance=0.0, shift=3.0, sheet=f"{name}.png")

    args.lr = args.lr or 1e-3
    if not optimize(args, "turbo", device, student, loss_of, feeder, evaluate, flat=0.3):
        return
    final = trainable(device)
    final.load_state_dict(torch.load(args.out / "turbo.pt", map_location=device)["average"])
    for steps, side in ((4, 128), (8, 128), (16, 128), (8, 192), (8, 256)):
        look(final, "turbo", steps=steps, guidance=0.0, shift=3.0, side=side, sheet=f"turbo{side}.png")


def make_text(args: argparse.Namespace, device: str) -> None:
    train_tokenizer(args.out / "tokenizer")
    torch.save(principal_latents("cpu"), args.out / "code.pt")


STAGES = {"text": make_text, "vae": train_vae, "base": train_base, "turbo": train_turbo}


def main() -> None:
    parser = usual_parser(__doc__)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument(
        "--out", type=Path, required=True, help="folder of this run; keep it out of the repository"
    )
    parser.add_argument("--seconds", type=float, default=300, help="length of the whole stage")
    parser.add_argument("--stop-after", type=float, help="seconds to run now; a later run goes on")
    parser.add_argument("--batch", type=int, help="pictures of 128x128 in a step")
    parser.add_argument("--pool", type=int, default=100_000, help="captioned scenes")
    parser.add_argument("--lr", type=float, help="peak learning rate")
    parser.add_argument("--average", type=float, default=0.998, help="decay of the averaged weights")
    parser.add_argument("--look-every", type=float, default=600, help="seconds between evaluations")
    parser.add_argument("--count", type=int, default=96, help="held-out prompts per evaluation")
    args = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    STAGES[args.stage](args, begin(args))


if __name__ == "__main__":
    main()
