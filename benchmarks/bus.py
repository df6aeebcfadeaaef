"""Bytes over the bus per step while weights are streamed: ours, and mmgp's where it is installed.

    python -m benchmarks.bus [--steps 4]

Counted on the CPU with a stand-in for the card that only counts, for a random transformer with the real
one's 34 blocks, narrow. The counts hold for a card; speed, overlap and VRAM are not measured here. The second
column is relative to the weights that one step streams: 1.00 is each streamed block once.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import torch

from benchmarks.report import header
from models.z_image.transformer_z_image import Conditioning, ZImageConfig, ZImageTransformer2DModel

CONFIG = ZImageConfig(dim=192, n_heads=4, axes_dims=(16, 16, 16), cap_feat_dim=64)
OURS = {"nothing resident": (0, True), "15 layers resident": (15, True), "no prefetch": (0, False)}
MMGP = {
    "as shipped": (True, False),
    "asyncTransfers=False": (False, False),
    "prefetch repaired": (True, True),
}


def model() -> ZImageTransformer2DModel:
    torch.manual_seed(0)
    return ZImageTransformer2DModel(CONFIG).eval().requires_grad_(False)


def block_bytes(blocks: Any) -> int:
    return sum(p.numel() * p.element_size() for p in blocks.parameters())


@torch.inference_mode()
def per_step(transformer: ZImageTransformer2DModel, steps: int, moved: Callable[[], int]) -> float:
    """Bytes per step, after a first one that fills what stays."""
    conditioning: Conditioning = transformer.prepare(torch.randn(20, CONFIG.cap_feat_dim), 8, 8)
    before = 0
    for step in range(steps + 1):
        if step == 1:
            before = moved()
        transformer([torch.randn(16, 8, 8)], torch.tensor([0.5]), [conditioning])
    return (moved() - before) / steps


def ours(resident: int, prefetch: bool, steps: int) -> tuple[float, int]:
    """(bytes per step, bytes of the blocks that a step streams)"""
    from shared.offloading import Residency
    from shared.placement import Placement, resident_blocks
    from tests.counting import CountingTransport

    transformer, transport = model(), CountingTransport()
    residency = Residency(torch.device("cpu"), transport=transport)
    residency.place(transformer, Placement(resident, prefetch=prefetch))
    each_step = [*transformer.noise_refiner, *transformer.layers]
    stays = resident_blocks([list(transformer.noise_refiner), list(transformer.layers)], resident)
    streamed = sum(block_bytes(block) for block in each_step if block not in stays)
    with residency.use(transformer):
        return per_step(transformer, steps, lambda: transport.moved), streamed


class CountingCard:
    """Enough of torch.cuda for mmgp to plan and to copy: "cuda" tensors are clones, counted."""

    def __init__(self) -> None:
        self.moved = 0

    def to(self, real: Callable[..., Any], tensor: Any, *args: Any, **options: Any) -> Any:
        def on_cpu(x: Any) -> Any:
            return torch.device("cpu") if str(x).startswith("cuda") else x

        arguments = [on_cpu(x) for x in args]
        settings = {name: on_cpu(x) for name, x in options.items()}
        result = real(tensor, *arguments, **settings)
        if arguments == list(args) and settings == options:
            return result
        self.moved += result.numel() * result.element_size()
        return result.clone()

    def install(self) -> None:
        real = torch.Tensor.to
        torch.Tensor.to = lambda tensor, *a, **o: self.to(real, tensor, *a, **o)  # type: ignore[method-assign, assignment]
        torch.Tensor.cuda = lambda tensor, *_, **__: tensor  # type: ignore[method-assign]  # of arguments
        stream = types.SimpleNamespace(synchronize=lambda: None)
        stand_ins: dict[str, Any] = {
            "get_device_properties": lambda *_: types.SimpleNamespace(total_memory=1 << 34, name="counting"),
            "Stream": lambda *_, **__: stream,
            "default_stream": lambda *_: stream,
            "current_stream": lambda *_: stream,
            "stream": lambda _: contextlib.nullcontext(),
            "synchronize": lambda *_: None,
            "empty_cache": lambda: None,
            "memory_reserved": lambda *_: 0,
            "memory_allocated": lambda *_: 0,
        }
        for name, stand_in in stand_ins.items():
            setattr(torch.cuda, name, stand_in)
        torch.set_default_device = lambda device: None


def mmgp(asynchronous: bool, repaired: bool, steps: int) -> tuple[float, int]:
    """As `ours`; in a process of its own, because the stand-in replaces parts of torch."""
    from mmgp import offload

    card = CountingCard()
    card.install()
    transformer = model()
    transformer._offload_hooks = ["prepare"]  # type: ignore[assignment]
    manager = offload.profile(
        {"transformer": transformer},
        profile_no=4,
        quantizeTransformer=False,
        convertWeightsFloatTo=None,
        pinnedMemory=False,
        asyncTransfers=asynchronous,
        budgets={"transformer": 1},
        verboseLevel=0,
    )
    if repaired:  # full names are compared with short ones, so that every prefetched block is loaded again
        names = manager.prev_blocks_names
        manager.prev_blocks_names = {k: v.split("/", 1)[1] if v else v for k, v in names.items()}
    streamed = block_bytes(transformer.noise_refiner) + block_bytes(transformer.layers)
    return per_step(transformer, steps, lambda: card.moved), streamed


def rows(steps: int) -> Iterator[tuple[str, float, int]]:
    for name, (resident, prefetch) in OURS.items():
        yield f"ours, {name}", *ours(resident, prefetch, steps)
    for name in MMGP if find_spec("mmgp") else ():
        command = [sys.executable, "-m", "benchmarks.bus", "--steps", str(steps), "--mmgp", name]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        moved, streamed = json.loads(output.splitlines()[-1])
        yield f"mmgp, {name}", moved, streamed


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--mmgp", choices=MMGP, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.mmgp:
        print(json.dumps(mmgp(*MMGP[options.mmgp], options.steps)))
        return
    logging.basicConfig(level=logging.WARNING)
    print(f"{header()}\n\n| | MB per step | times the streamed weights |\n|---|---|---|")
    for name, moved, streamed in rows(options.steps):
        print(f"| {name} | {moved / 1e6:.2f} | {moved / streamed:.2f} |")


if __name__ == "__main__":
    main()
