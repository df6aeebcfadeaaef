"""The worker on files of the real size with random weights, on a CPU: its memory, and when Cancel is heard.

    python -m benchmarks.full_size FOLDER [--transformer int8|bf16] [--full-precision] [--size 64] [--keep]

FOLDER gets 11 GB (with bf16 17 GB) of files in a folder of their own, which goes at the end. Anonymous
memory is what the process holds beyond the files that it has mapped (Linux: VmRSS - RssFile), sampled.
--full-precision: as on a processor that does not multiply bfloat16, where all computes in float32.
"""

from __future__ import annotations

import argparse
import base64
import json
import math
import shutil
import struct
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.report import header
from shared.engine.configuration import EngineConfig
from shared.engine.engine import Engine
from shared.jobs.records import ENDED
from tests.support.browser import ROOT

MODEL = "z_image"
BLOCKS = ("layers.", "noise_refiner.", "context_refiner.", "model.layers.")  # whose linear layers are int8
NAMES = {"bf16": "ZImageTurbo_bf16.safetensors", "int8": "ZImageTurbo_quanto_bf16_int8.safetensors"}
POOL_BYTES = 64 << 20  # random numbers, written again and again from changing places
SAMPLE_SECONDS = 0.02
HEARD_AFTER = 0.5  # seconds into a phase at which it is cancelled
WITHOUT_BF16 = (
    "import torch; torch.ops.mkldnn._is_mkldnn_bf16_supported = lambda: False;"
    "from shared.worker import worker; worker.main()"
)


# ---- files -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Piece:
    """One tensor of a file. spread: of its values, a standard deviation; 0: they are all `value`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    spread: float = 0.0
    value: float = 0.0

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * (1 if self.dtype == "I8" else 2)


def pieces(module: nn.Module, int8: bool) -> Iterator[Piece]:
    """The tensors of a model on torch's meta device, with values of a size that keeps a forward finite."""
    for name, tensor in module.state_dict().items():
        layer, _, last = name.rpartition(".")
        shape = tuple(tensor.shape)
        spread = 1 / math.sqrt(math.prod(shape[1:])) if len(shape) > 1 else 0.0
        linear = last == "weight" and type(module.get_submodule(layer)) is nn.Linear
        if int8 and linear and name.startswith(BLOCKS):
            yield Piece(f"{layer}.weight._data", "I8", shape, 1.0)
            yield Piece(f"{layer}.weight._scale", "BF16", (shape[0], 1), value=spread / 73)  # of -127..127
            yield Piece(f"{layer}.input_scale", "BF16", (1,), value=1.0)
            yield Piece(f"{layer}.output_scale", "BF16", (1,), value=1.0)
        else:
            yield Piece(name, "BF16", shape, spread, value=float("norm" in name and last == "weight"))


def write(path: Path, module: nn.Module, int8: bool = False) -> None:
    found = list(pieces(module, int8))
    table, end = dict[str, Any](), 0
    if int8:
        layers = [p.name.removesuffix(".weight._data") for p in found if p.dtype == "I8"]
        kinds = {layer: {"weights": "qint8", "activations": "none"} for layer in layers}
        encoded = base64.b64encode(json.dumps(kinds).encode()).decode()
        table["__metadata__"] = {"quantization_format": "quanto", "quantization_map_base64": encoded}
    for piece in found:
        table[piece.name] = {
            "dtype": piece.dtype, "shape": piece.shape, "data_offsets": [end, end + piece.bytes]
        }  # fmt: skip
        end += piece.bytes
    text = json.dumps(table).encode()
    text += b" " * (-len(text) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    integers = torch.randint(-127, 128, (POOL_BYTES,), dtype=torch.int8)
    normal = torch.randn(POOL_BYTES // 2)
    with part.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for piece in found:
            floats = normal[: math.prod(piece.shape)]
            pool = integers if piece.dtype == "I8" else (floats * piece.spread + piece.value).bfloat16()
            _fill(file, pool.view(torch.uint8).numpy().data, piece.bytes)
    part.replace(path)


def _fill(file: Any, pool: memoryview, count: int) -> None:
    while count:
        count -= file.write(pool[: min(count, len(pool))])


def make_files(folder: Path, transformer: str) -> None:
    """All that the card of Z-Image Turbo needs, in the places where downloads go."""
    from diffusers import AutoencoderKL
    from transformers import Qwen3Config, Qwen3Model

    from models.z_image.family import QWEN3_4B
    from models.z_image.transformer_z_image import ZImageTransformer2DModel

    qwen = {**QWEN3_4B, "model_type": "qwen3", "rms_norm_eps": 1e-6, "tie_word_embeddings": True}
    with torch.device("meta"):
        model = ZImageTransformer2DModel()
        vae = AutoencoderKL.from_config(json.loads((ROOT / "models/z_image/configs/vae.json").read_text()))
        encoder = nn.ModuleDict({"model": Qwen3Model(Qwen3Config(**qwen))})
    write(folder / "Qwen3" / "qwen3_quanto_bf16_int8.safetensors", encoder, int8=True)
    write(folder / "ZImageTurbo_VAE_bf16.safetensors", vae)
    (folder / "Qwen3" / "config.json").write_text(json.dumps(qwen))
    mini = ROOT / "models/z_image/mini/text_encoder"  # its few tokens are the first ones of the large table
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(mini / name, folder / "Qwen3")
    bpe = json.loads((mini / "tokenizer.json").read_text("utf-8"))["model"]
    (folder / "Qwen3" / "vocab.json").write_text(json.dumps(bpe["vocab"]))
    (folder / "Qwen3" / "merges.txt").write_text("#version: 0.2\n")
    write(folder / NAMES[transformer], model, int8=transformer == "int8")


# ---- jobs --------------------------------------------------------------------------------------------------


@dataclass
class Course:
    """A job's phases in their order: seconds of each, and the most memory in it, bytes."""

    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    anonymous: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    mapped: int = 0
    status: str = ""
    error: str | None = None

    def note(self, phase: str, seconds: float, status: Mapping[str, int]) -> None:
        self.seconds[phase] += seconds
        self.anonymous[phase] = max(self.anonymous[phase], status["VmRSS"] - status["RssFile"])
        self.mapped = max(self.mapped, status["RssFile"])


def memory_of(pid: int) -> dict[str, int]:
    """Bytes of /proc/PID/status; zeros once the process has gone."""
    found = {"VmRSS": 0, "RssFile": 0}
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return found
    for line in lines:
        name, _, value = line.partition(":")
        if name in found:
            found[name] = int(value.split()[0]) << 10
    return found


def run(engine: Engine, prompt: str, size: int, cancel_in: str = "") -> tuple[Course, float]:
    """(a job's course, seconds from its cancelling to its end). cancel_in: the phase that is cut short."""
    settings = {"model_type": MODEL, "prompt": prompt, "resolution": f"{size}x{size}"}
    job_id, _ = engine.submit({**settings, "num_inference_steps": 1, "seed": 1})
    course, last, cancelled = Course(), time.perf_counter(), 0.0
    while True:
        time.sleep(SAMPLE_SECONDS)
        job, now = engine.store.job(job_id), time.perf_counter()
        phase = job.phase or "Starting"
        course.note(phase, now - last, memory_of(engine.worker_pid or 0))
        last = now
        if job.status in ENDED:
            course.status, course.error = job.status, job.error
            return course, now - cancelled if cancelled else 0.0
        if not cancelled and phase == cancel_in and course.seconds[phase] >= HEARD_AFTER:
            engine.cancel(job_id)
            cancelled = now


def print_course(name: str, course: Course) -> None:
    if course.status != "done":
        raise SystemExit(f"{name}: {course.status} ({course.error})")
    most = max(course.anonymous, key=lambda phase: course.anonymous[phase])
    times = ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in course.seconds.items())
    peak = f"{course.anonymous[most] / 1e6:,.0f} MB ({most})"
    print(f"| {name} | {times} | {peak} | {course.mapped / 1e9:.1f} GB |", flush=True)


def measure(config: EngineConfig, size: int) -> None:
    fresh = f"a red circle above a blue square, {time.time_ns()}"
    print("| a fresh worker's job | seconds | peak of anonymous memory | mapped files |\n|---|---|---|---|")
    for name in ("new prompt", "the same prompt, known"):
        engine = Engine(config)
        engine.start()
        try:
            print_course(name, run(engine, fresh, size)[0])
        finally:
            engine.stop()
    engine = Engine(config)
    engine.start()
    print("\n| cancelled in | status | seconds until the job has ended |\n|---|---|---|")
    try:
        for phase in ("Loading model", "Encoding prompt"):
            course, seconds = run(engine, f"{fresh}, {phase}", size, cancel_in=phase)
            print(f"| {phase} | {course.status} | {seconds:.2f} |", flush=True)
    finally:
        engine.stop()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where the files go")
    parser.add_argument("--transformer", choices=NAMES, default="int8", help="what its file has")
    parser.add_argument("--full-precision", action="store_true", help="compute in float32 in any case")
    parser.add_argument("--size", type=int, default=64, help="of the picture, pixels")
    parser.add_argument("--keep", action="store_true", help="leave the files for another run")
    options = parser.parse_args()
    folder: Path = options.folder.resolve() / "zgp-full-size"
    places: dict[str, Any] = {"ckpts": folder, "output_dir": folder / "outputs"}
    if options.full_precision:
        places["worker_command"] = (sys.executable, "-c", WITHOUT_BF16)
    config = EngineConfig.at(ROOT, database=folder / "outputs" / "jobs.sqlite3", gpu="cpu", **places)
    print(header())
    try:
        if not (folder / NAMES[options.transformer]).exists():  # a run before kept it
            started = time.perf_counter()
            make_files(folder, options.transformer)
            print(f"files written in {time.perf_counter() - started:.0f} s")
        print(f"{options.transformer}, one step, {options.size}x{options.size}\n", flush=True)
        measure(config, options.size)
    finally:
        if not options.keep:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
