"""How long the gallery takes with many pictures: lists, searches, filters, small copies, reading a folder in.

    python -m benchmarks.gallery [--pictures 10000] [--rounds 20]

The pictures are small PNG files with the metadata of real ones, written into a temporary folder.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import gradio as gr
from PIL import Image

from benchmarks.report import header
from shared.engine.configuration import EngineConfig
from shared.engine.engine import Engine
from shared.gallery.collection import Collection, Found, Wanted
from shared.gallery.thumbnails import thumbnail
from shared.imaging import metadata
from shared.jobs.store import JobStore
from shared.ui.create.tab import Generate
from shared.ui.gallery.tab import PAGE, Gallery
from tests.support.browser import ROOT

SIZES = ((1024, 1024), (832, 1216), (1216, 832), (1280, 720), (768, 1344))
WORDS = """a the lighthouse portrait woman dawn storm oil painting photograph detailed soft light mountain
river city neon rain garden glass bridge winter forest old man cat market harbour dress film grain
macro""".split()
LORAS = [f"style {number}.safetensors" for number in range(40)]


def prompt(draw: random.Random, number: int) -> str:
    text = " ".join(draw.choices(WORDS, k=60))
    return (
        text + (" unicorn" if number % 997 == 0 else "") + (" 一只猫在雨中的城市" if number % 50 == 0 else "")
    )


def made(draw: random.Random, number: int) -> dict:
    width, height = draw.choice(SIZES)
    settings = {
        "model_type": draw.choice(("z_image", "z_image_base", "z_image_mini")),
        "prompt": prompt(draw, number),
        "resolution": f"{width}x{height}",
        "num_inference_steps": 8,
        "activated_loras": draw.sample(LORAS, number % 3),
    }
    return metadata.build(
        settings, seed=number, index=0, model_name="Z-Image", model_files={"a": "f" * 64}, notes=[], extra={}
    )


def fill(folder: Path, count: int) -> None:
    """The files, in folders of 500."""
    draw, image = random.Random(7), Image.new("RGB", (16, 16), "teal")
    for number in range(count):
        path = folder / f"{number // 500:04}" / f"{number:06}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path, pnginfo=metadata.png_chunks(made(draw, number)))


def spread(engine: Engine, count: int) -> None:
    """Real sizes and a year of days, which the small files do not have."""
    with engine.store.database.transaction() as cx:
        for number in range(1, count + 1):
            width, height = SIZES[number % len(SIZES)]
            values = (width, height, 1.7e9 + number * 31_536_000 / count, number % 20 == 0, number)
            cx.execute(
                "UPDATE images SET width = ?, height = ?, created = ?, favourite = ? WHERE id = ?", values
            )


def median(action: Callable[[], object], rounds: int) -> float:
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        action()
        times.append(time.perf_counter() - started)
    return 1000 * statistics.median(times)


def gallery_of(engine: Engine) -> Gallery:
    with gr.Blocks() as page:
        with gr.Tabs() as tabs, gr.Tab("Create"):
            create = Generate(engine, page)
        return Gallery(engine, page, tabs, create)


def measure(engine: Engine, count: int, rounds: int) -> None:
    collection = Collection(engine.store, engine.config.output_dir)
    questions = {
        "newest": Wanted(),
        "a word of nearly all prompts": Wanted(words="light"),
        "a word of one in a thousand": Wanted(words="unicorn"),
        "a Chinese word": Wanted(words="雨中"),
        "three words, a model, favourites": Wanted(words="cat rain neon", model="z_image", favourites=True),
        "a LoRA": Wanted(lora=LORAS[3]),
        "a size, oldest first": Wanted(size="1280x720", oldest_first=True),
        "words that no prompt has": Wanted(words="zebra"),
    }
    print(f"{'':36} {'first page':>11} {'count':>9}    (ms, {PAGE} a page)")
    for label, wanted in questions.items():
        page = median(partial(collection.page, wanted, limit=PAGE), rounds)
        print(f"{label:36} {page:11.1f} {median(partial(collection.count, wanted), rounds):9.1f}")
    middle = (1.7e9 + 31_536_000 / 2, count // 2)
    tab = gallery_of(engine)
    rows: dict[str, Callable[[], object]] = {
        "a page from the middle": partial(collection.page, Wanted(), middle, PAGE),
        "the lists of the filters": collection.choices,
        "first page as HTML, with its count": partial(tab.look, {}),
        "next page as HTML": partial(tab.look, {"after": list(middle)}),
    }
    for label, action in rows.items():
        print(f"{label:36} {median(action, rounds):11.1f}")


def small_copy(folder: Path) -> float:
    """Seconds for a small copy of a noisy 1024x1024 PNG, the slowest kind."""
    pixels = random.Random(3).randbytes(1024 * 1024 * 3)
    picture = folder / "noise.png"
    Image.frombytes("RGB", (1024, 1024), pixels).save(picture)
    started = time.perf_counter()
    thumbnail(picture, folder)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pictures", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=20, help="measurements of each kind")
    options = parser.parse_args()
    print(f"{header()}\n{options.pictures:,} pictures, medians of {options.rounds}\n")
    with tempfile.TemporaryDirectory() as temporary:
        outputs = Path(temporary) / "outputs"
        fill(outputs, options.pictures)
        engine = Engine(EngineConfig.at(ROOT, output_dir=outputs, database=outputs / ".zgp" / "zgp.sqlite3"))
        found = Found()
        time.sleep(11)  # files that were only just written are left to the worker
        started = time.perf_counter()
        Collection(engine.store, outputs).find(found)
        seconds = time.perf_counter() - started
        if found.added != options.pictures:
            sys.exit(f"Of {options.pictures} pictures {found.added} were found.")
        spread(engine, options.pictures)
        measure(engine, options.pictures, options.rounds)
        print(f"{'a small copy of a 1024x1024 PNG':36} {1000 * small_copy(Path(temporary)):11.1f}")
        print(f"\nreading the folder into an empty database: {seconds:.1f} s")
        opening = median(lambda: JobStore(engine.config.database), 3)
        print(f"opening the database, which looks for damage: {opening:.0f} ms")
        size = engine.config.database.stat().st_size
        print(f"the database: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
