"""Bytes over the bus per step while weights are streamed, by both engines, and by mmgp as it is shipped.

    python -m benchmarks.bus [--steps 4]

Counted on the CPU with stand-ins for the card that only count, for a random transformer with the real one's
34 blocks, narrow. The counts hold for a card; speed, overlap and VRAM are not measured here. The second
column is relative to the weights that one step streams: 1.00 is each streamed block once.
"""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import torch

from benchmarks.report import header
from models.z_image.transformer_z_image import Conditioning, ZImageConfig, ZImageTransformer2DModel

CONFIG = ZImageConfig(dim=192, n_heads=4, axes_dims=(16, 16, 16), cap_feat_dim=64)
ENGINES = {"nothing resident": (0, True), "15 blocks resident": (15, True), "no prefetch": (0, False)}
SHIPPED = {"as shipped": True, "as shipped, asyncTransfers=False": False}


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


def engine(name: str, resident: int, prefetch: bool, steps: int) -> tuple[float, int]:
    """(bytes per step, bytes of the blocks that a step streams)"""
    from shared.gpu.offloading import Residency
    from shared.gpu.placement import Placement, resident_blocks
    from tests.support.counting import CountingTransport

    transformer, card = model(), CountingTransport() if name == "stream" else counting_card()
    residency = (
        Residency(torch.device("cpu"), transport=card)
        if isinstance(card, CountingTransport)
        else Residency(torch.device("cuda"), engine="mmgp")
    )
    residency.place(transformer, Placement(resident, prefetch=prefetch))
    each_step = [*transformer.noise_refiner, *transformer.layers]
    stays = resident_blocks([list(transformer.noise_refiner), list(transformer.layers)], resident)
    streamed = sum(block_bytes(block) for block in each_step if block not in stays)
    with residency.use(transformer):
        return per_step(transformer, steps, lambda: card.moved), streamed


def counting_card() -> Any:
    """Enough of torch.cuda for mmgp to plan and to copy: for a process of its own, where it stays."""
    import pytest

    from tests.support.fake_cuda import FakeCuda

    card = FakeCuda()
    card.install(pytest.MonkeyPatch())
    return card


def shipped(asynchronous: bool, steps: int) -> tuple[float, int]:
    """As `engine`, by mmgp's own hooks and names."""
    from mmgp import offload

    card, transformer = counting_card(), model()
    transformer._offload_hooks = ["prepare"]  # type: ignore[assignment]
    offload.profile(
        {"transformer": transformer},
        profile_no=4,
        quantizeTransformer=False,
        convertWeightsFloatTo=None,
        pinnedMemory=False,
        asyncTransfers=asynchronous,
        budgets={"transformer": 1},
        verboseLevel=0,
    )
    streamed = block_bytes(transformer.noise_refiner) + block_bytes(transformer.layers)
    return per_step(transformer, steps, lambda: card.moved), streamed


def rows(steps: int) -> Iterator[tuple[str, float, int]]:
    for name, (resident, prefetch) in ENGINES.items():
        yield f"stream, {name}", *engine("stream", resident, prefetch, steps)
    for name in (*ENGINES, *SHIPPED) if find_spec("mmgp") else ():
        command = [sys.executable, "-m", "benchmarks.bus", "--steps", str(steps), "--mmgp", name]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        moved, streamed = json.loads(output.splitlines()[-1])
        yield f"mmgp, {name}", moved, streamed


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--mmgp", choices=[*ENGINES, *SHIPPED], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.mmgp:
        one = options.mmgp
        counted = (
            shipped(SHIPPED[one], options.steps)
            if one in SHIPPED
            else engine("mmgp", *ENGINES[one], options.steps)
        )
        print(json.dumps(counted))
        return
    logging.basicConfig(level=logging.WARNING)
    print(f"{header()}\n\n| | MB per step | times the streamed weights |\n|---|---|---|")
    for name, moved, streamed in rows(options.steps):
        print(f"| {name} | {moved / 1e6:.2f} | {moved / streamed:.2f} |")


if __name__ == "__main__":
    main()
