"""Our pipeline against diffusers' on the same weights, prompts and noise, in one run.

    python -m benchmarks.cpu [--rounds 5]
    python -m benchmarks.cpu --loras

The second measures what LoRAs on every linear of the blocks cost a forward.

Times are medians of alternating runs, so that a busy machine slows both alike; compare the ratios. Peak
memory is what a run adds to the process that has just loaded the model, each in a process of its own.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import psutil
import torch

from benchmarks.report import header
from shared.gpu import heap

PROMPT = "a red circle above a blue square on a yellow background"


@dataclass(frozen=True)
class Workload:
    """size: pixels of a side. guidance: both sides' scale. transformer: a random one of these dimensions.

    dtype: of both transformers; ours takes bfloat16 by itself for a bfloat16 file on a CPU that multiplies
    it.
    """

    name: str
    steps: int
    guidance: float
    size: int
    transformer: dict[str, Any] | None = None
    dtype: torch.dtype = torch.float32


MIDDLE = dict(
    dim=768, n_layers=10, n_refiner_layers=2, n_heads=12, axes_dims=[16, 24, 24], axes_lens=[1536, 512, 512]
)
WORKLOADS = (
    Workload("Mini, 8 steps, 128x128", 8, 0.0, 128),
    Workload("Mini Base, 30 steps, guidance, 128x128", 30, 2.5, 128),
    Workload("Mini, 8 steps, 256x256", 8, 0.0, 256),
    Workload("random 0.1 B, 2 steps, 512x512 (1024 tokens)", 2, 0.0, 512, MIDDLE),
    Workload("random 0.1 B, 2 steps, guidance, 512x512", 2, 2.5, 512, MIDDLE),
    Workload("random 0.1 B bf16, 2 steps, 512x512", 2, 0.0, 512, MIDDLE, torch.bfloat16),
)


#: widths at which LoRAs are measured: the middle model's, and one layer of Z-Image's own
LORA_WORKLOADS = (
    Workload("random 0.1 B, width 768, 1024 tokens", 1, 0.0, 512, MIDDLE),
    Workload("width 3840, 1 + 1 layers, 256 tokens", 1, 0.0, 256, dict(n_layers=1, n_refiner_layers=1)),
)
LORA_RANKS = (0, 16, 128)


def ours(work: Workload) -> Any:
    """Our pipeline with the Mini's text encoder and VAE and the workload's transformer."""
    from models.z_image.transformer_z_image import ZImageConfig, ZImageTransformer2DModel
    from tests.support import mini

    _, pipe = mini.load("z_image_mini_base")
    if work.transformer:
        torch.manual_seed(0)
        config = ZImageConfig.from_dict({**work.transformer, "cap_feat_dim": 96})
        pipe.transformer = ZImageTransformer2DModel(config).to(work.dtype).eval().requires_grad_(False)
    return pipe


def theirs(work: Workload, pipe: Any) -> Any:
    """diffusers' pipeline around the same parts and weights."""
    from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
    from transformers import Qwen3Model

    from tests.support import mini

    config = {k: v for k, v in asdict(pipe.transformer.config).items() if k != "patch_size"}
    transformer = ZImageTransformer2DModel(**config, n_kv_heads=config["n_heads"]).eval()
    transformer.load_state_dict(pipe.transformer.state_dict())
    transformer.to(work.dtype)
    encoder = Qwen3Model.from_pretrained(mini.ROOT / "models/z_image/mini/text_encoder", dtype=torch.float32)
    result = ZImagePipeline(
        FlowMatchEulerDiscreteScheduler(shift=6.0), pipe.vae, encoder.eval(), pipe.tokenizer, transformer
    )
    result.set_progress_bar_config(disable=True)
    return result


def runner(pipe: Any, work: Workload, **more: Any) -> Callable[[], Any]:
    """One picture from fixed noise; the same negative prompt on both sides."""
    noise = torch.randn(1, 16, work.size // 8, work.size // 8, generator=torch.Generator().manual_seed(0))
    arguments = dict(
        prompt=PROMPT,
        negative_prompt="blurry, low quality",
        height=work.size,
        width=work.size,
        num_inference_steps=work.steps,
        guidance_scale=work.guidance,
        **more,
    )
    return lambda: pipe(**arguments, latents=noise.clone())


def both(work: Workload) -> dict[str, Callable[[], Any]]:
    pipe = ours(work)
    return {"ours": runner(pipe, work, flow_shift=6.0), "diffusers": runner(theirs(work, pipe), work)}


def count_forwards(run: Callable[[], Any], transformer_class: Any) -> int:
    """Sequences that went through the transformer in one run."""
    calls = 0
    original = transformer_class.forward

    def counting(self: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += len(x)
        return original(self, x, *args, **kwargs)

    transformer_class.forward = counting
    try:
        run()
    finally:
        transformer_class.forward = original
    return calls


def median_times(runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in runs}
    for name in runs:  # warm-up
        runs[name]()
    for _ in range(rounds):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in times.items()}


def lora_file(transformer: Any, rank: int) -> Any:
    """A random LoRA on every linear of the blocks."""
    from pathlib import Path

    from shared.loras.adapters import LowRank
    from shared.loras.inspection import Verdict
    from shared.loras.reader import LoraFile

    linears = {
        name: module
        for name, module in transformer.named_modules()
        if isinstance(module, torch.nn.Linear) and ("attention" in name or "feed_forward" in name)
    }
    adapters = {
        name: (LowRank(torch.randn(rank, m.in_features), torch.randn(m.out_features, rank) * 1e-3, 1.0),)
        for name, m in linears.items()
    }
    return LoraFile(Path(f"rank {rank}"), Verdict(), adapters, {})


def lora_costs(work: Workload, rounds: int) -> dict[int, tuple[float, float]]:
    """rank -> (median seconds of a run, median of its ratio to the run without LoRAs in the same round)."""
    from shared.loras.apply import attach

    pipe = ours(work)
    run = runner(pipe, work, output_type="latent")
    files = {rank: [(lora_file(pipe.transformer, rank), 0.8)] if rank else [] for rank in LORA_RANKS}
    times: dict[int, list[float]] = {rank: [] for rank in LORA_RANKS}
    run()
    for _ in range(rounds):
        for rank in LORA_RANKS:
            attach(pipe.transformer, files[rank])
            started = time.perf_counter()
            run()
            times[rank].append(time.perf_counter() - started)
    return {
        rank: (
            statistics.median(taken),
            statistics.median(one / base for one, base in zip(taken, times[0], strict=True)),
        )
        for rank, taken in times.items()
    }


def print_lora_costs(rounds: int) -> None:
    print(f"| {'workload':40} | LoRA    | seconds | cost |\n|{'-' * 42}|---------|---------|------|")
    for work in LORA_WORKLOADS:
        for rank, (seconds, ratio) in lora_costs(work, rounds).items():
            what, cost = (f"rank {rank}", f"{ratio - 1:+.1%}") if rank else ("none", "")
            print(f"| {work.name:40} | {what:8}| {seconds:7.3f} | {cost:5}|", flush=True)


def added_memory(run: Callable[[], Any]) -> float:
    """MB that a run adds at its peak to the memory before it."""
    process, done = psutil.Process(), threading.Event()
    gc.collect()
    heap.trim()  # what was freed while loading would otherwise hide allocations
    before = peak = process.memory_info().rss

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    run()
    done.set()
    watcher.join()
    return (peak - before) / 1e6


def measure_memory(index: int, side: str) -> float:
    """In a process of its own: allocations of an earlier run would hide this one's."""
    command = [sys.executable, "-m", "benchmarks.cpu", "--memory", str(index), side]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5, help="timed runs of each side")
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="CPU threads of both sides"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object per workload")
    parser.add_argument("--loras", action="store_true", help="measure the cost of LoRAs instead")
    parser.add_argument("--memory", nargs=2, metavar=("WORKLOAD", "SIDE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.memory:
        work = WORKLOADS[int(args.memory[0])]
        pipe = ours(work)
        chosen = runner(pipe, work, flow_shift=6.0)
        if args.memory[1] == "diffusers":
            chosen = runner(theirs(work, pipe), work)
        print(added_memory(chosen))
        return

    if args.loras:
        print(f"{header()}\n{args.threads} threads, medians of {args.rounds} rounds\n")
        print_lora_costs(args.rounds)
        return

    from diffusers import ZImageTransformer2DModel as Peer

    from models.z_image.transformer_z_image import ZImageTransformer2DModel as Own

    print(f"{header()}\n{args.threads} threads, medians of {args.rounds} alternating runs\n")
    print(f"| {'workload':46} | ours s | diffusers s | faster | forwards | ours MB | diffusers MB |")
    print(f"|{'-' * 48}|--------|-------------|--------|----------|---------|--------------|")
    for index, work in enumerate(WORKLOADS):
        runs = both(work)
        times = median_times(runs, args.rounds)
        forwards = (count_forwards(runs["ours"], Own), count_forwards(runs["diffusers"], Peer))
        memory = [measure_memory(index, side) for side in ("ours", "diffusers")]
        if args.json:
            print(json.dumps({"workload": work.name, **times, "forwards": forwards, "memory_mb": memory}))
            continue
        ratio = times["diffusers"] / times["ours"]
        print(
            f"| {work.name:46} | {times['ours']:6.3f} | {times['diffusers']:11.3f} | {ratio:5.2f}x "
            f"| {forwards[0]:3} / {forwards[1]:3}| {memory[0]:7.0f} | {memory[1]:12.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
