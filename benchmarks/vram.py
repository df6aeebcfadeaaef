"""Peak memory and seconds per picture on simulated 8, 10, 12 and 16 GB cards: both engines, and diffusers'.

    python -m benchmarks.vram [--cards 8 10 12 16] [--size 1024] [--steps 8] [--caption 128] [--only WORD ...]

Each measurement is a process of its own that may allocate no more than the simulated card has; what the CUDA
context takes is subtracted. Random weights of Z-Image's size; transformer and VAE, without text encoder.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch

from benchmarks import models
from benchmarks.report import card, header
from shared.gpu.offload_engines import SLOTS

CONTEXT_GB = 0.6  # what CUDA itself and its libraries take of a card
RESERVE_GB = 0.9  # activations of one layer and of the latents at 1024 x 1024

KINDS: dict[str, Callable[[Any], Any] | None] = {"bf16": None, "int8": models.int8, "int4": models.int4}
OURS = {f"{engine} {kind}": (engine, make) for engine in SLOTS for kind, make in KINDS.items()}
DIFFUSERS = ("diffusers model offload", "diffusers group offload", "diffusers sequential")
VARIANTS = (*OURS, *DIFFUSERS)


def simulate(device: torch.device, gigabytes: float) -> None:
    """Let this process see and use a card of that size."""
    if device.type != "cuda":
        return
    real, size = torch.cuda.get_device_properties(device).total_memory, int(gigabytes * 1e9)
    allowed = int(size - CONTEXT_GB * 1e9)
    torch.cuda.set_per_process_memory_fraction(min(1.0, allowed / real), device)

    def memory(of: Any = None) -> tuple[int, int]:
        return max(0, allowed - torch.cuda.memory_reserved(device)), size

    mock.patch.object(torch.cuda, "mem_get_info", memory).start()


def resident_blocks(model: Any, gigabytes: float, slots: int) -> int:
    """How many of the main layers stay on a card of that size beside those that pass through."""
    layer = sum(t.numel() * t.element_size() for t in model.layers[0].state_dict().values())
    whole = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    room = (gigabytes - CONTEXT_GB - RESERVE_GB) * 1e9 - (whole - len(model.layers) * layer) - slots * layer
    return max(0, min(len(model.layers), int(room / layer)))


def ours(work: models.Work, variant: str, gigabytes: float) -> Callable[[], Any]:
    from shared.gpu.offloading import Residency
    from shared.gpu.placement import Placement

    model = models.transformer(work, torch.device("cpu"))
    engine, layer = OURS[variant]
    if layer is not None:
        model = models.quantized(model, layer)
    residency = Residency(work.device, engine=engine)
    residency.place(model, Placement(resident_blocks=resident_blocks(model, gigabytes, SLOTS[engine])))
    decoder = models.vae(work)
    latents = models.our_pipeline(work, model, decoder, output_type="latent")

    def picture() -> Any:
        with residency.use(model):
            latent = latents()
        residency.evict(model)
        return decoder.decode(latent.to(decoder.device, decoder.dtype), return_dict=False)[0]

    return picture


def diffusers(work: models.Work, variant: str) -> Callable[[], Any]:
    model = models.diffusers_transformer(models.transformer(work, torch.device("cpu")))
    pipe, picture = models.diffusers_pipeline(work, model, models.vae(work).to("cpu"))
    if work.device.type != "cuda":
        return picture
    if variant == "diffusers model offload":
        pipe.enable_model_cpu_offload(device=work.device)
    elif variant == "diffusers sequential":
        pipe.enable_sequential_cpu_offload(device=work.device)
    else:
        pipe.transformer.enable_group_offload(
            onload_device=work.device, offload_type="block_level", num_blocks_per_group=1, use_stream=True
        )
        pipe.vae.to(work.device)
    return picture


@torch.inference_mode()
def measure(work: models.Work, variant: str, gigabytes: float) -> dict[str, float | str]:
    """Second run of the picture: seconds, and the peak that this process had allocated."""
    simulate(work.device, gigabytes)
    on_card = work.device.type == "cuda"
    try:
        make = ours(work, variant, gigabytes) if variant in OURS else diffusers(work, variant)
        make()
        if on_card:
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        make()
        if on_card:
            torch.cuda.synchronize()
    except torch.OutOfMemoryError:
        return {"problem": "out of memory"}
    peak = torch.cuda.max_memory_reserved() if on_card else 0
    return {
        "seconds": time.perf_counter() - started,
        "gigabytes": peak / 1e9 + (CONTEXT_GB if on_card else 0),
    }


def in_a_process(arguments: list[str], variant: str, gigabytes: float) -> str:
    """One cell of the table."""
    command = [sys.executable, "-m", "benchmarks.vram", *arguments, "--one", variant, str(gigabytes)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return f"failed: {reason[:60]}"
    result = json.loads(done.stdout.splitlines()[-1])
    return result.get("problem") or f"{result['seconds']:.2f} s, {result['gigabytes']:.1f} GB"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cards", type=float, nargs="+", default=[8, 10, 12, 16], help="GB of each card")
    parser.add_argument("--size", type=int, default=1024, help="pixels of a side")
    parser.add_argument("--steps", type=int, default=8, help="forwards per picture")
    parser.add_argument("--caption", type=int, default=128, help="tokens of the prompt")
    parser.add_argument("--only", nargs="+", default=[""], metavar="WORD", help="columns with such a word")
    parser.add_argument("--device", default="cuda", help=argparse.SUPPRESS)
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--one", nargs=2, metavar=("VARIANT", "GB"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    device = torch.device(args.device)
    name = card(device)
    config = models.TINY if args.tiny else models.FULL
    work = models.Work(args.size, args.caption, args.steps, device, config)
    if args.one:
        print(json.dumps(measure(work, args.one[0], float(args.one[1]))))
        return
    print(f"{name}\n{header()}\n{args.size}x{args.size}, {args.caption} caption tokens, {args.steps} steps\n")
    columns = [variant for variant in VARIANTS if any(word in variant for word in args.only)]
    print("| " + " | ".join([f"{'card':7}", *(f"{variant:23}" for variant in columns)]) + " |")
    print("|" + "|".join(["-" * 9, *["-" * 25 for _ in columns]]) + "|")
    passed = [f"--{key}={getattr(args, key)}" for key in ("size", "steps", "caption", "device")]
    passed += ["--tiny"] if args.tiny else []
    for gigabytes in args.cards:
        cells = (f"{in_a_process(passed, variant, gigabytes):23}" for variant in columns)
        print("| " + " | ".join([f"{gigabytes:4.0f} GB", *cells]) + " |", flush=True)


if __name__ == "__main__":
    main()
