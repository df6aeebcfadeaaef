"""A model family without torch whose prompts say what happens, and a worker process that uses it."""

import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from models.family import Family
from shared.errors import Cancelled, UserError
from shared.gpu.footprint import Needs, Offers, PartSize, Variant
from shared.weights.files import Required

GIB = 1 << 30
CARDS = {
    "fake": {"model": {"name": "Fake", "architecture": "fake", "URLs": ["fake.bin"]}, "resolution": "64x64"},
    "other": {
        "model": {"name": "Other", "architecture": "fake", "URLs": ["other.bin"]},
        "resolution": "64x64",
    },
    "absent": {"model": {"name": "Absent", "architecture": "fake", "URLs": ["absent.bin"]}},
}


def make_root(folder: Path) -> Path:
    """A project folder with three cards: "fake" and "other" are on disk, "absent" is not."""
    for name in ("defaults", "finetunes"):
        (folder / name).mkdir(parents=True)
    for name, card in CARDS.items():
        (folder / "defaults" / f"{name}.json").write_text(json.dumps(card), encoding="utf-8")
    for name in ("fake.bin", "other.bin"):
        (folder / name).write_bytes(b"weights of " + name.encode())
    return folder


@dataclass
class Generation:
    images: Any
    notes: list[str] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)


class Handler(Family):
    @staticmethod
    def query_model_def(base_type, model_def):
        return {"guidance": False, "size_multiple": 16, "min_size": 64, "max_size": 8192}

    @staticmethod
    def query_model_files(base_type, model_def):
        return [Required("transformer", model_def["URLs"])]

    @staticmethod
    def update_default_settings(base_type, model_def, ui_defaults):
        ui_defaults["num_inference_steps"] = 3

    @staticmethod
    def validate_generative_settings(base_type, model_def, settings):
        return "The fake model draws no dragons." if "dragon" in settings["prompt"] else None

    @staticmethod
    def load_model(model_filename, base_model_type, **options):
        return Processor(options), {}


class Planned(Handler):
    """Says what it needs: on a card of 8 GiB its ladder has four rungs."""

    @staticmethod
    def query_offers(base_type, model_def, folders=None, float_bytes=2):
        return Offers((Variant(model_def["URLs"][0], "bf16", PartSize(0, (GIB // 2,) * 20)),))

    @staticmethod
    def query_memory(base_type, model_def, settings, folders=None, *, lora_bytes=0):
        return Needs(denoise=GIB // 2, decode={None: GIB, 512: GIB // 2, 256: GIB // 4}, linear_flops=1e13)


class Processor:
    """The first word of the prompt is a command; "at PATH" names a file it waits for, or marks."""

    def __init__(self, options):
        self.options = options
        self.plans = []

    def apply_plan(self, plan):
        self.plans.append(plan)

    def generate(self, settings, *, seeds, on_phase, on_step, interrupt):
        command, _, argument = settings["prompt"].partition(" ")
        if command in COMMANDS:
            COMMANDS[command](argument)
        steps = settings["num_inference_steps"]
        on_phase("Denoising")
        for step in range(1, steps + 1):
            if command == "hold":
                on_step(step, steps, lambda: [picture(seed) for seed in seeds])
                while not Path(argument).exists() and not interrupt():
                    time.sleep(0.005)
            if interrupt():
                raise Cancelled
            on_step(step, steps, lambda: [picture(seed) for seed in seeds])
        on_phase("Decoding")
        return Generation(decoded(command, argument, seeds), ["a note"], {"options": sorted(self.options)})


def decoded(command, argument, seeds):
    for number, seed in enumerate(seeds):
        if command == "crash_after_first" and number == 1 and not Path(argument).exists():
            Path(argument).touch()
            die()
        yield picture(seed)


def picture(seed):
    return Image.new("RGB", (64, 64), (seed % 256, 0, 0))


def die(argument=""):
    os.abort()


def crash_once(marker):
    if not Path(marker).exists():
        Path(marker).touch()
        die()


def user_error(argument):
    raise UserError("The fake model cannot do that: ask for something else.")


def memory_error(argument):
    raise MemoryError


def surprise(argument):
    raise LookupError("nobody expected this")


def cuda_error(marker):
    if not Path(marker).exists():
        Path(marker).touch()
        raise RuntimeError("CUDA error: an illegal memory access was encountered")


COMMANDS = {
    "crash": die,
    "crash_once": crash_once,
    "user_error": user_error,
    "memory_error": memory_error,
    "surprise": surprise,
    "cuda_error": cuda_error,
}


def handler_for(architecture):
    if architecture != "fake":
        raise UserError(f"There is no model family for the architecture '{architecture}'.")
    return Handler


if __name__ == "__main__":
    from shared.worker import worker

    worker.main(handler_for=handler_for)
