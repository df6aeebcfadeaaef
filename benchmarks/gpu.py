"""Seconds per forward and per picture on a CUDA card: against diffusers, everything resident; then streamed.

    python -m benchmarks.gpu [--size 1024] [--steps 8] [--caption 128] [--rounds 5]

Models of Z-Image's size with random weights; medians of alternating runs after a warm-up, by CUDA events. The
int8 rows compute on the int8 tensor cores where comfy-kitchen is installed; their PSNR is against our bf16.
The second table streams the weights by either engine and compares with the same forward all resident.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from benchmarks import models
from benchmarks.report import card, header
from shared.gpu.offload_engines import SLOTS

Runs = Mapping[str, Callable[[], Any]]


def seconds(run: Callable[[], Any], device: torch.device) -> float:
    if device.type != "cuda":
        started = time.perf_counter()
        run()
        return time.perf_counter() - started
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000


def medians(runs: Runs, rounds: int, device: torch.device) -> dict[str, float]:
    """Each run twice to warm up (and compile), then in turns."""
    for run in runs.values():
        run()
        run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(seconds(run, device))
    return {name: statistics.median(values) for name, values in times.items()}


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    """Decibels between pictures in 0..1."""
    error = float((a.double() - b.double()).square().mean())
    return math.inf if error == 0 else -10 * math.log10(error)


def variants(work: models.Work, backend: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """(our transformers, diffusers') by the name of their row. Same tensors but for int8."""
    bf16 = models.transformer(work, work.device)
    ours = {"ours": bf16, "ours compiled": models.twin(bf16)}
    int8 = models.quantized(bf16, models.int8)
    ours |= {"ours int8": int8, "ours int8 compiled": models.twin(int8)}
    for name, model in ours.items():
        if "compiled" in name:
            model.compile(backend=backend)
    peers = {"diffusers": models.diffusers_transformer(bf16)}
    peers["diffusers compiled"] = models.diffusers_transformer(bf16)
    peers["diffusers compiled"].compile_repeated_blocks(backend=backend, dynamic=True)
    return ours, peers


@torch.inference_mode()
def measure(work: models.Work, rounds: int, backend: str) -> list[str]:
    """The table's lines."""
    ours, peers = variants(work, backend)
    decoder = models.vae(work)
    forwards = {name: models.diffusers_forward(work, model) for name, model in peers.items()}
    forwards |= {name: models.our_forward(work, model) for name, model in ours.items()}
    pictures = {name: models.diffusers_pipeline(work, model, decoder)[1] for name, model in peers.items()}
    pictures |= {name: models.our_pipeline(work, model, decoder) for name, model in ours.items()}
    per_forward, per_picture = (medians(runs, rounds, work.device) for runs in (forwards, pictures))
    reference = pictures["ours"]()
    lines = [f"| {'':20} | ms per forward | s per picture | against diffusers | PSNR to ours |"]
    lines.append(f"|{'-' * 22}|----------------|---------------|-------------------|--------------|")
    for name in forwards:
        ratio = per_picture["diffusers"] / per_picture[name]
        lines.append(
            f"| {name:20} | {per_forward[name] * 1000:14.1f} | {per_picture[name]:13.3f} | {ratio:16.2f}x "
            f"| {psnr(pictures[name](), reference):9.1f} dB |"
        )
    return lines


@torch.inference_mode()
def measure_streamed(work: models.Work, rounds: int) -> list[str]:
    """The second table's lines: each engine with nothing and with half of the blocks on the card."""
    from shared.gpu.offloading import Residency
    from shared.gpu.placement import Placement

    lines = [f"| {'':32} | ms per forward | of resident |", f"|{'-' * 34}|----------------|-------------|"]
    for kind, layer in (("bf16", None), ("int8", models.int8)):
        model = models.transformer(work, torch.device("cpu"))
        model = model if layer is None else models.quantized(model, layer)
        blocks = len(model.noise_refiner) + len(model.context_refiner) + len(model.layers)
        resident = 0.0
        for name, engine, count in (
            ("all resident", "stream", None), *((f"{engine}, {k} of {blocks} blocks resident", engine, k)
            for engine in SLOTS for k in (blocks // 2, 0)),
        ):  # fmt: skip
            residency = Residency(work.device, engine=engine)
            residency.place(model, Placement(resident_blocks=count))
            with residency.use(model):
                forward = models.our_forward(work, model)
                (time_,) = medians({name: forward}, rounds, work.device).values()
            residency.forget()
            resident = resident or time_
            lines.append(f"| {kind + ', ' + name:32} | {time_ * 1000:14.1f} | {time_ / resident:10.2f}x |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, default=1024, help="pixels of a side")
    parser.add_argument("--steps", type=int, default=8, help="forwards per picture")
    parser.add_argument("--caption", type=int, default=128, help="tokens of the prompt")
    parser.add_argument("--rounds", type=int, default=5, help="timed runs of each row")
    parser.add_argument("--device", default="cuda", help=argparse.SUPPRESS)
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    device = torch.device(args.device)
    name = card(device)
    config, backend = (models.TINY, "aot_eager") if args.tiny else (models.FULL, "inductor")
    work = models.Work(args.size, args.caption, args.steps, device, config)
    print(f"{name}\n{header()}\n{args.size}x{args.size}, {args.caption} caption tokens, {args.steps} steps\n")
    print("\n".join(measure(work, args.rounds, backend)) + "\n", flush=True)
    print("\n".join(measure_streamed(work, args.rounds)))


if __name__ == "__main__":
    main()
