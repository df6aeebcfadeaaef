"""Turns the guided base into a model of one to four forwards: TwinFlow (arXiv 2512.05150).

    python -m training.twinflow --out RUN --seconds 900

RUN needs tokenizer/, code.pt and base.pt. A warm start (RUN/twinflow_warm.pt, made once) regresses the base's
guided trajectories; then the full method runs, and RUN/twinflow.pt keeps the averaged weights with the best
score. Run it again to go on from there.

Times: t = 1 is noise, t = 0 the image, x_t = t * z + (1 - t) * x, and F(x_t, t, tt) is the mean velocity
(x_t - x_tt) / (t - tt) on the way from t to tt; F(x, t, t) is the velocity itself. Negative times are the
twin trajectory, whose images are the model's own one-step samples.
"""

from __future__ import annotations

import argparse
import copy
import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn
from transformers import AutoTokenizer

from models.z_image.transformer_z_image import ADALN_EMBED_DIM, ZImageTransformer2DModel, dit_time
from models.z_image.unified_sampler import resolve, sample
from training.command import begin, usual_parser
from training.grammar import held_out
from training.networks import TRANSFORMER, forward_batch, train_in_bf16
from training.sampling import sample_latents, to_pictures
from training.score import PALETTE, judge, summarize
from training.text import features, tokenize
from training.train import TEACHER_GUIDANCE, Feeder, decode_linear, make_optimizers

log = logging.getLogger("training")

SIZES = {(128, 128): 0.8, (128, 192): 0.07, (192, 128): 0.07, (192, 192): 0.06}
TEACHER_GRID = (0.0, 0.143, 0.4, 1.0)  # three steps of the schedule with shift 3, as parts of the way
DELTA = 0.01  # length of the first step of the RCGM target
ENHANCED = 0.5  # guidance that the enhanced target adds
EMA = 0.99
RECTIFY_STEPS = 200  # steps until the rectification acts in full: the twin branch has to be learned first

#: velocity F of (x, t, tt) for captions the caller has bound
Field = Callable[[Tensor, Tensor, Tensor], Tensor]


class TwinModel(nn.Module):
    """The transformer with the second time embedder, and what only training needs.

    `twin` is added to the time embedding of negative times. Without it both branches would be the same:
    this family embeds |t|, and on (t, t) and (-t, -t) the distance to the target is 0 either way.
    """

    def __init__(self, model: ZImageTransformer2DModel) -> None:
        super().__init__()
        self.model = model
        width = min(model.config.dim, ADALN_EMBED_DIM)
        self.twin = nn.Parameter(0.1 * torch.randn(width, generator=torch.Generator().manual_seed(0)))

    def forward(self, x: Tensor, t: Tensor, tt: Tensor, caption: tuple[Tensor, Tensor]) -> Tensor:
        """F [B, 16, H, W] of x at times t, tt [B]; caption: features [B, L, hidden] and lengths [B]."""
        with torch.autocast(x.device.type, enabled=False):  # 0.01 apart must stay apart
            temb = self.model.embed_twin_time(dit_time(t), dit_time(tt)) + (t < 0)[:, None] * self.twin
        out, _ = forward_batch(self.model, x, None, *caption, temb=temb)
        return -out.float()

    def exported(self) -> dict[str, Tensor]:
        """The tensors of the shipped file: without the twin vector, which no picture needs."""
        return self.model.state_dict()


def from_base(weights: Mapping[str, Tensor]) -> TwinModel:
    """A student that computes what the base computes: the second embedder begins at an output of 0."""
    model = train_in_bf16(ZImageTransformer2DModel(TRANSFORMER, second_time_embedder=True))
    second = {
        name.replace("t_embedder.", "t_embedder_2."): (torch.zeros_like(x) if ".mlp.2." in name else x)
        for name, x in weights.items()
        if name.startswith("t_embedder.")
    }
    model.load_state_dict({**weights, **second})
    return TwinModel(model)


# ---------------------------------------------------------------- the formulas


def wide(t: Tensor) -> Tensor:
    """[B] -> [B, 1, 1, 1]"""
    return t[:, None, None, None]


def mix(z: Tensor, x: Tensor, t: Tensor) -> Tensor:
    """x_t of noise z and image x at |t|."""
    return torch.lerp(x, z, wide(t.abs()))


@dataclass(frozen=True)
class Parts:
    """Which rows of a batch train what; four parts, as equal as the batch allows."""

    e2e: slice
    mul: slice
    any: slice
    adv: slice
    real: slice  # all but adv

    @staticmethod
    def of(count: int) -> Parts:
        if count < 4:
            raise ValueError(f"a batch of {count} cannot be split in four; give at least 4 pictures")
        n = count // 4
        return Parts(
            slice(0, n),
            slice(n, 2 * n),
            slice(2 * n, count - n),
            slice(count - n, count),
            slice(0, count - n),
        )


def draw_times(count: int, curve: tuple[float, float, float] = (1.0, 1.0, 1.0)) -> tuple[Tensor, Tensor]:
    """t and tt [B]: t ~ Beta(a, b) * c, then what each part asks for."""
    a, b, c = curve
    t = (torch.distributions.Beta(a, b).sample((count,)) * c).clamp_min(1e-3)
    u, parts = torch.rand(count), Parts.of(count)
    tt = torch.zeros(count)
    t[parts.e2e] = 1.0
    tt[parts.mul] = (t - u * t * 0.05)[parts.mul]
    tt[parts.any] = (t - u * t)[parts.any]
    t[parts.adv] = -t[parts.adv]
    tt[parts.adv] = t[parts.adv]
    return t, tt


def rcgm_target(
    field: Field, f: Tensor, x: Tensor, t: Tensor, tt: Tensor, velocity: Tensor, order: int
) -> Tensor:
    """The target of F(x, t, tt): one short step along `velocity`, then `order` jumps of `field` to tt.

    The mean velocity over the whole way must agree with both. Their disagreement, divided by the short
    step's length, is clamped to +-1. Rows whose way is shorter than DELTA get `velocity` itself.
    """
    far = (t - tt) >= DELTA
    start = torch.where(far, t - DELTA, tt)
    point, integral = x - DELTA * velocity, torch.zeros_like(x)
    for k in range(order):
        now, then = (start + (tt - start) * part for part in (k / order, (k + 1) / order))
        if k + 1 == order:
            then = tt  # exactly: a target of 0 has a meaning of its own
        jump = wide(now - then) * field(point, now, then)
        point, integral = point - jump, integral + jump
    disagreement = wide((t - tt) / DELTA) * f - integral / DELTA - velocity
    return f - torch.where(wide(far), disagreement, f - velocity).clamp(-1, 1)


def loss_rows(f: Tensor, target: Tensor, alpha: float = 1.0, c: float = 1e-3) -> Tensor:
    """[B]: squared error under Barron's general robust loss as a weight, scaled by 1 / c.

    With alpha 1 about the root mean square, so that a few bad rows do not rule the batch.
    """
    square = (f - target).square().flatten(1).mean(1)
    weight = (square.detach() / c**2 / abs(alpha - 2) + 1) ** (alpha / 2 - 1)
    return weight * square / c


def time_weight(t: Tensor, tt: Tensor) -> Tensor:
    """[B]: short ways count up to four times as much as the whole way; 1 on the twin trajectory."""
    weight = torch.tan((1 - (t.abs() - tt.abs())) * math.pi / 2.5) + 1
    return torch.where(t < 0, torch.ones_like(t), weight)


def rectification(field: Field, x: Tensor, z: Tensor, t: Tensor) -> Tensor:
    """The gradient for F of one-step samples x: twin minus real velocity on x noised to t, within +-1.

    It moves the samples from where the twin trajectory (their own distribution) leads to where the real one
    leads; it vanishes when both agree.
    """
    point = mix(z, x, t)
    both = field(torch.cat((point, point)), torch.cat((-t, t)), torch.cat((-t, t)))
    fake, real = both.chunk(2)
    return (fake - real).clamp(-1, 1)


# ---------------------------------------------------------------- the two losses


def bind(model: TwinModel, caption: tuple[Tensor, Tensor], rows: slice = slice(None)) -> Field:
    """The model's field for some rows' captions; for twice as many pictures the captions repeat."""
    text, lengths = caption[0][rows], caption[1][rows]

    def field(x: Tensor, t: Tensor, tt: Tensor) -> Tensor:
        times = len(x) // len(text)
        return model(x, t, tt, (text.repeat(times, 1, 1), lengths.repeat(times)))

    return field


class WarmStart:
    """Regression to the mean velocities of the base's guided trajectories, three Euler steps each."""

    def __init__(self, student: TwinModel, base: ZImageTransformer2DModel, feeder: Feeder) -> None:
        self.student, self.base, self.feeder = student, base, feeder

    def guided(self, x: Tensor, t: Tensor, caption: tuple[Tensor, Tensor]) -> Tensor:
        positive, _ = forward_batch(self.base, x, 1 - t, *caption)
        negative, _ = forward_batch(self.base, x, 1 - t, *self.feeder.words("empty", len(x)))
        return -(positive + TEACHER_GUIDANCE * (positive - negative)).float()

    def times(self, count: int) -> tuple[Tensor, Tensor]:
        """40 % from pure noise to the image, 35 % from anywhere to the image, the rest to anywhere."""
        t, kind = torch.rand(count).clamp_min(0.02), torch.rand(count)
        t = torch.where(kind < 0.4, torch.ones_like(t), t)
        between = t * torch.where(torch.rand(count) < 0.5, torch.ones_like(t), torch.rand(count))
        return t, torch.where(kind < 0.75, torch.zeros_like(t), between)

    def __call__(self, data: Mapping[str, Any], step: int) -> tuple[Tensor, dict[str, float]]:
        x, caption = data["latents"], (data["features"], data["lengths"])
        t, tt = (each.to(x.device) for each in self.times(len(x)))
        start = mix(torch.randn_like(x), x, t)
        with torch.no_grad():
            point, mean = start, torch.zeros_like(x)
            for now, then in zip(TEACHER_GRID, TEACHER_GRID[1:], strict=False):
                velocity = self.guided(point, t + (tt - t) * now, caption)
                point = point - wide((t - tt) * (then - now)) * velocity
                mean = mean + (then - now) * velocity
        return (self.student(start, t, tt, caption) - mean).square().mean(), {}


class TwinFlow:
    """The full method on one batch. `average`: the EMA of the student, which makes the targets."""

    def __init__(
        self, student: TwinModel, average: TwinModel, feeder: Feeder, order: int, rectify: float = 0.5
    ) -> None:
        self.student, self.average, self.feeder = student, average, feeder
        self.order, self.rectify = order, rectify

    @torch.no_grad()
    def velocity(self, x_t: Tensor, t: Tensor, straight: Tensor, caption: tuple[Tensor, Tensor]) -> Tensor:
        """The enhanced target z - x + ratio * (v(caption) - v(nothing)), the latter from the EMA model."""
        with_prompt = self.average(x_t, t, t, caption)
        without = self.average(x_t, t, t, self.feeder.words("empty", len(x_t)))
        return straight + ENHANCED * (with_prompt - without)

    def __call__(self, data: Mapping[str, Any], step: int) -> tuple[Tensor, dict[str, float]]:
        x, caption = data["latents"].clone(), (data["features"], data["lengths"])
        count, parts = len(x), Parts.of(len(x))
        t, tt = (each.to(x.device) for each in draw_times(count))
        z = torch.randn_like(x)
        with torch.no_grad():
            noise, own = torch.randn_like(x[parts.adv]), bind(self.student, caption, parts.adv)
            ones = torch.ones(len(noise), device=x.device)
            x[parts.adv] = noise - own(noise, ones, torch.zeros_like(ones))
        x_t = mix(z, x, t)
        f = self.student(x_t, t, tt, caption)

        with torch.no_grad():
            target, real = z - x, parts.real
            text = (caption[0][real], caption[1][real])
            target[real] = self.velocity(x_t[real], t[real], target[real], text)
            smooth = bind(self.average, caption, real)
            target[real] = rcgm_target(
                smooth, f.detach()[real], x_t[real], t[real], tt[real], target[real], self.order
            )
        rows = loss_rows(f, target) * time_weight(t, tt)

        f_e2e = f[parts.e2e]
        with torch.no_grad():
            sample_e2e = x_t[parts.e2e] - f_e2e  # t is 1
            level = torch.rand(len(f_e2e), device=x.device)
            gradient = rectification(
                bind(self.student, caption, parts.e2e), sample_e2e, torch.randn_like(f_e2e), level
            )
        weight = self.rectify * min(1.0, step / RECTIFY_STEPS)
        rectified = loss_rows(f_e2e, (f_e2e - gradient).detach()).mean()
        shares = {name: rows[getattr(parts, name)].mean().item() for name in ("e2e", "mul", "any", "adv")}
        seen = {**shares, "branches differ": gradient.square().mean().sqrt().item()}
        return rows.mean() + weight * rectified, seen


# ---------------------------------------------------------------- the score


def cleanness(picture: np.ndarray) -> float:
    """The share of pixels [H, W, 3] within 32 of 255 of a named colour; 0.99 for the drawings themselves.

    It goes on telling models apart where the prompts' parts are all right.
    """
    distance = ((picture[..., None, :].astype(np.float32) - PALETTE) ** 2).sum(-1).min(-1)
    return float((distance < 32**2).mean())


class Look:
    """Scores a model with the unified sampler on held-out prompts."""

    def __init__(self, out: Path, feeder: Feeder, count: int, seed: int = 0) -> None:
        self.scenes, self.feeder, self.out = held_out(count, seed), feeder, out
        tokenizer = AutoTokenizer.from_pretrained(str(out / "tokenizer"))
        ids, lengths = tokenize(tokenizer, [s.caption for s in self.scenes])
        self.prompt = (features(feeder.encoder, ids.to(feeder.device)), lengths.to(feeder.device))
        make = torch.Generator().manual_seed(seed)
        self.noise = torch.randn(count, 16, 16, 16, generator=make).to(feeder.device)

    @torch.no_grad()
    def draw(self, model: TwinModel, steps: int, **overrides: Any) -> list[Any]:
        """Pictures of `steps` forwards, each with its own stream of step noise."""

        def predict(xs: list[Tensor], t: float, tt: float) -> list[Tensor]:
            x = torch.stack(xs).float()
            times = (torch.full((len(x),), value, dtype=torch.float64, device=x.device) for value in (t, tt))
            return list(model(x, *times, self.prompt).double())

        streams = [torch.Generator().manual_seed(k) for k in range(len(self.noise))]
        latents = sample(predict, list(self.noise), resolve("unified", steps, overrides), streams)
        return to_pictures(decode_linear(self.feeder.code, torch.stack(latents).float()))

    @torch.no_grad()
    def draw_base(self, base: ZImageTransformer2DModel, **how: Any) -> list[Any]:
        """Pictures of the base by Euler's rule, from the same noise."""
        negative = self.feeder.words("negative", len(self.scenes))
        latents = sample_latents(base, self.prompt, negative, seed=0, **how)
        return to_pictures(decode_linear(self.feeder.code, latents))

    def judge(self, pictures: list[Any], name: str) -> tuple[float, float]:
        """The share of pictures with everything right, and how clean they are."""
        result = summarize([judge(p, s) for p, s in zip(pictures, self.scenes, strict=True)])
        clean = sum(map(cleanness, pictures)) / len(pictures)
        log.info("%s: %s, clean %.1f %%", name, result, 100 * clean)
        return result.everything, clean

    def __call__(self, model: TwinModel, name: str) -> tuple[float, float]:
        """The means over 1, 2 and 4 steps with the presets."""
        scores = [self.judge(self.draw(model, steps), f"{name}, {steps} steps") for steps in (1, 2, 4)]
        return sum(s for s, _ in scores) / len(scores), sum(c for _, c in scores) / len(scores)


# ---------------------------------------------------------------- the loop


def run(
    student: TwinModel,
    average: TwinModel,
    loss_of: Callable[[Mapping[str, Any], int], tuple[Tensor, dict[str, float]]],
    feeder: Feeder,
    *,
    name: str,
    seconds: float,
    rate: float,
    flat: float,
    look_every: float,
    look: Callable[[TwinModel, str], Any],
) -> None:
    """Warm-up, constant rate until `flat` of the time, linear decay; `average` follows with EMA."""
    optimizers = [
        *make_optimizers(student.model, rate),
        torch.optim.AdamW([student.twin], lr=rate, weight_decay=0.0),
    ]
    started, looked, paused, step = time.monotonic(), 0.0, 0.0, 0
    device = feeder.device
    while (elapsed := time.monotonic() - started - paused) < seconds:
        decay = 1.0 if elapsed < flat * seconds else max(0.02, (1 - elapsed / seconds) / (1 - flat))
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * min(1.0, (step + 1) / 50) * decay
        data = feeder.next(SIZES)
        with torch.autocast(device, dtype=torch.bfloat16):
            loss, seen = loss_of(data, step)
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step += 1
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(student.parameters()), 1 - EMA)
        if step % 50 == 0 or step == 3:
            parts = ", ".join(f"{key} {value:.3f}" for key, value in seen.items())
            log.info("%s step %d %.0fs loss %.4f %s", name, step, elapsed, loss.item(), parts)
        if elapsed > looked + look_every:
            before = time.monotonic()
            with torch.autocast(device, dtype=torch.bfloat16):
                look(average, f"{name} {elapsed:.0f}s")
            looked, paused = elapsed, paused + time.monotonic() - before
    with torch.autocast(device, dtype=torch.bfloat16):
        look(average, f"{name} end")


def saved(model: TwinModel) -> dict[str, Any]:
    return {"average": model.exported(), "twin": model.twin.detach()}


def load_into(model: TwinModel, file: Path, device: str) -> dict[str, Any]:
    state = torch.load(file, map_location=device)
    model.model.load_state_dict(state["average"])
    with torch.no_grad():
        model.twin.copy_(state["twin"])
    return state


def train(args: argparse.Namespace, device: str) -> None:
    warm, best = args.out / "twinflow_warm.pt", args.out / "twinflow.pt"
    weights = torch.load(args.out / "base.pt", map_location=device)["average"]
    base = train_in_bf16(ZImageTransformer2DModel(TRANSFORMER)).to(device).requires_grad_(False)
    base.load_state_dict(weights)
    student = from_base(weights).to(device)
    average = copy.deepcopy(student).requires_grad_(False)
    feeder = Feeder(args, device)
    look = Look(args.out, feeder, args.count, seed=1)  # not the prompts of the final score
    how = {"look_every": args.look_every}

    if not warm.exists():
        run(
            student,
            average,
            WarmStart(student, base, feeder),
            feeder,
            name="warm",
            seconds=args.warm,
            rate=args.warm_lr,
            flat=0.5,
            look=look,
            **how,
        )
        torch.save(saved(average), warm)
    state = load_into(student, best if best.exists() else warm, device)
    average.load_state_dict(student.state_dict())
    top = tuple(state.get("score", (-1.0, 0.0)))

    def keep_the_best(model: TwinModel, name: str) -> None:
        nonlocal top
        score = look(model, name)
        if score >= top:  # a tie of right pictures goes to the cleaner ones
            top = score
            torch.save(saved(model) | {"score": score}, best)

    keep_the_best(average, "start")
    method = TwinFlow(student, average, feeder, args.order, args.rectify)
    run(
        student,
        average,
        method,
        feeder,
        name="twinflow",
        seconds=args.seconds,
        rate=args.lr,
        flat=0.3,
        look=keep_the_best,
        **how,
    )


@torch.no_grad()
def report(args: argparse.Namespace, device: str) -> None:
    """The table and the picture of docs/twinflow.md, from RUN/twinflow.pt and RUN/base.pt."""
    weights = torch.load(args.out / "base.pt", map_location=device)["average"]
    base = ZImageTransformer2DModel(TRANSFORMER).to(device)
    base.load_state_dict(weights)
    model = from_base(weights).to(device)
    load_into(model, args.out / "twinflow.pt", device)
    look = Look(args.out, Feeder(args, device), args.count)
    rows: dict[str, list[Any]] = {}

    def show(name: str, pictures: list[Any], shown: bool = True) -> None:
        look.judge(pictures, name)
        if shown:
            rows[name] = pictures[:8]

    for steps in (1, 2, 4):
        show(f"TwinFlow, {steps}", look.draw(model, steps))
        plain = look.draw_base(base, steps=steps, guidance=0.0, shift=args.shift)
        show(f"base, {steps}", plain)
    show("TwinFlow, 4, style few", look.draw(model, 4, sampling_style="few"), shown=False)
    for steps, shown in ((1, False), (2, False), (30, True)):
        guided = look.draw_base(base, steps=steps, guidance=TEACHER_GUIDANCE, shift=args.shift)
        show(f"base, {steps} guided", guided, shown)
    write_rows(rows, args.out / "twinflow.png")


def write_rows(rows: Mapping[str, list[Any]], path: Path) -> None:
    """One labelled row of pictures for each entry."""
    side, left = 98, 110
    sheet = Image.new("RGB", (left + 8 * side, len(rows) * side), "white")
    write = ImageDraw.Draw(sheet)
    for y, (name, pictures) in enumerate(rows.items()):
        write.text((4, y * side + side // 2 - 6), name, fill="black")
        for x, picture in enumerate(pictures):
            sheet.paste(Image.fromarray(picture).resize((96, 96)), (left + x * side, y * side))
    sheet.save(path)


def main() -> None:
    parser = usual_parser(__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the training run")
    parser.add_argument("--seconds", type=float, default=900, help="length of the full method")
    parser.add_argument("--warm", type=float, default=420, help="seconds of warm start, if none is there")
    parser.add_argument("--batch", type=int, default=24, help="pictures of 128x128 in a step")
    parser.add_argument("--pool", type=int, default=60_000, help="captioned scenes")
    parser.add_argument("--warm-lr", type=float, default=1e-3, help="peak learning rate of the warm start")
    parser.add_argument("--lr", type=float, default=1e-4, help="peak learning rate of the full method")
    parser.add_argument("--order", type=int, choices=(1, 2), default=2, help="order of the RCGM target")
    parser.add_argument("--rectify", type=float, default=0.5, help="weight of the rectification")
    parser.add_argument("--look-every", type=float, default=100, help="seconds between scores")
    parser.add_argument("--count", type=int, default=96, help="held-out prompts of a score")
    parser.add_argument("--shift", type=float, default=5.0, help="schedule shift of the base in the report")
    parser.add_argument("--report", action="store_true", help="only score RUN/twinflow.pt beside the base")
    args = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    (report if args.report else train)(args, begin(args))


if __name__ == "__main__":
    main()
