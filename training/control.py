"""Teaches Mini to follow edges and to repaint, with a control network of the 2.1 kind beside it.

    python -m training.control --out RUN --seconds 1800
    python -m training.control_score --control RUN/control.safetensors

The Mini stays as it is. The network starts as a copy of some of its blocks with silent hints, and learns by
the loss that trained the base, from the pictures of `lessons.py`. RUN keeps the state: run the command again
to go on.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from models.z_image.control import INPAINT_CHANNELS, OWN, ControlLayout, Hints, ZImageControlModel, context
from models.z_image.transformer_z_image import SEQ_MULTI_OF, ZImageConfig, ZImageTransformer2DModel
from training.command import begin, usual_parser
from training.grammar import held_out
from training.lessons import Lessons, edge_maps, misnamed
from training.lora import MINI
from training.networks import TRANSFORMER, forward_batch, train_in_bf16
from training.render import render, to_batch
from training.sampling import sample_latents, to_pictures, write_sheet
from training.train import SCALE, SHIFT, Clock, make_optimizers, noise_levels, set_rate

log = logging.getLogger("training")

BASE = MINI / "transformer.safetensors"
NAME = "control"
LAYERS = 3  # as in the published files, the number of layers says which of the base's they stand beside
STRENGTHS = (0.7, 1.0)  # of the hints while learning: what people choose
STEPS, FLOW_SHIFT = 8, 3.0  # of the Mini's card


# ---------------------------------------------------------------- the network and its loss


def make_control(base: ZImageTransformer2DModel, config: ZImageConfig, layers: int) -> ZImageControlModel:
    """A control network that starts as copies of the base's blocks; its hints start at zero."""
    step = config.n_layers // layers
    places = tuple(range(0, config.n_layers, step))[:layers]
    net = ZImageControlModel(config, ControlLayout(INPAINT_CHANNELS, places, OWN))
    copies = zip(net.control_layers, (base.layers[place] for place in places), strict=True)
    for block, source in (*copies, *zip(net.control_noise_refiner, base.noise_refiner, strict=True)):
        block.load_state_dict(source.state_dict(), strict=False)  # the base has no projections
    for name, parameter in net.named_parameters():
        if ".after_proj." in name:
            nn.init.zeros_(parameter)
    return net


def hints(
    net: ZImageControlModel, base: ZImageTransformer2DModel, contexts: Tensor, strength: float
) -> Hints:
    """What the network adds to a batch's forwards. contexts: [B, 33, h, w]."""
    embedded = torch.cat([net.embed(context, base.x_pad_token) for context in contexts])
    return Hints(net, [embedded], strength)


def control_loss(
    net: ZImageControlModel,
    base: ZImageTransformer2DModel,
    latents: Tensor,
    words: tuple[Tensor, Tensor],
    contexts: Tensor,
) -> Tensor:
    """The flow matching loss of base and network together, half of it at the Mini's own noise levels."""
    count, device = len(latents), str(latents.device)
    line = torch.linspace(1, 1 / STEPS, STEPS, device=device)
    own = (FLOW_SHIFT * line / (1 + (FLOW_SHIFT - 1) * line))[torch.randint(STEPS, (count,), device=device)]
    sigma = torch.where(
        torch.rand(count, device=device) < 0.5, own, noise_levels(count, FLOW_SHIFT, 0.1, device)
    )
    noise = torch.randn_like(latents)
    x = torch.lerp(latents, noise, sigma[:, None, None, None])
    control = hints(net, base, contexts, random.uniform(*STRENGTHS))
    out, _ = forward_batch(base, x, 1 - sigma, *words, control=control)
    return (out.float() - (latents - noise)).square().mean()


# ---------------------------------------------------------------- training


def load_base() -> ZImageTransformer2DModel:
    model = ZImageTransformer2DModel(TRANSFORMER)
    model.load_state_dict(load_file(BASE))
    return model.requires_grad_(False)


def train(args: argparse.Namespace, device: str) -> None:
    file, started = args.out / "control.pt", int(time.time())
    torch.manual_seed(started)
    base = load_base()
    net = make_control(base, TRANSFORMER, LAYERS)
    for model in (base, net):
        train_in_bf16(model).to(device)
    optimizers = make_optimizers(net, args.lr)
    step, before = 0, 0.0
    if file.exists():
        state = torch.load(file, map_location=device)
        net.load_state_dict(state["net"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        step, before = state["step"], state["elapsed"]
    lessons = Lessons(args.batch, started, device)
    clock = Clock(args.seconds, before, args.stop_after)
    losses: list[float] = []

    def save() -> None:
        saved = [optimizer.state_dict() for optimizer in optimizers]
        state = {"net": net.state_dict(), "optimizers": saved, "step": step, "elapsed": clock.elapsed}
        torch.save(state, file)
        how = f"{step} steps of {args.batch} pictures, {clock.elapsed:.0f} s, Z-Image Mini"
        export(net, args.out / f"{NAME}.safetensors", how)

    for latents, words, contexts in lessons:
        if not clock.running():
            break
        for optimizer in optimizers:
            set_rate(optimizer, args.lr, step, clock.progress, 0.5)
        with torch.autocast(device, dtype=torch.bfloat16):
            loss = control_loss(net, base, latents, words, contexts)
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step += 1
        losses.append(loss.item())
        if step % 100 == 0:
            log.info("control step %d %.0fs loss %.4f", step, clock.elapsed, sum(losses) / len(losses))
            losses.clear()
            save()
    save()
    write_sheet(preview(net, base, lessons), args.out / f"{NAME}.png", columns=4)


def export(net: nn.Module, path: Path, how: str) -> None:
    """The network in fp16 under the published names."""
    tensors = {name: x.detach().to("cpu", torch.float16).contiguous() for name, x in net.state_dict().items()}
    metadata = {
        "format": "pt",
        "modelspec.description": "Edges and repainting, for the built-in Mini models.",
        "software": json.dumps({"name": "ZGP training/control.py"}),
        "training_info": json.dumps({"how": how}),
    }
    save_file(tensors, path, metadata)


@torch.no_grad()
def preview(net: ZImageControlModel, base: ZImageTransformer2DModel, lessons: Lessons) -> list[np.ndarray]:
    """Edges in the first row; below them what held-out prompts with wrong shapes make of them."""
    parts = lessons.parts
    scenes = [s for s in held_out(60, seed=5) if parts.padded_length(s.caption) == SEQ_MULTI_OF][:4]
    edges = edge_maps(render(to_batch(scenes).to(lessons.device), 128, 128)[0], random.Random(1))
    words = parts.words([misnamed(scene.caption, random.Random(2)) for scene in scenes])
    contexts = torch.stack([context(INPAINT_CHANNELS, x) for x in lessons.encode(edges)]).to(edges)
    control = hints(net, base, contexts, 0.9)
    latents = sample_latents(base, words, None, steps=STEPS, guidance=0, shift=FLOW_SHIFT, control=control)
    return to_pictures(edges) + to_pictures(parts.vae.decode(latents / SCALE + SHIFT).sample)


def main() -> None:
    parser = usual_parser(__doc__)
    parser.add_argument(
        "--out", type=Path, required=True, help="folder of this run: state, network and preview"
    )
    parser.add_argument("--seconds", type=float, default=1800, help="length of the whole training")
    parser.add_argument("--stop-after", type=float, help="seconds to run now; a later run goes on")
    parser.add_argument("--batch", type=int, default=16, help="pictures of 128x128 in a step")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate")
    args = parser.parse_args()
    train(args, begin(args))


if __name__ == "__main__":
    main()
