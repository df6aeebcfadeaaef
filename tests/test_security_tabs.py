"""What a client with a login may try on the page's tabs: every listener and question called past the page.

The listeners are those of the whole page, behind the whole server; the models' cards are those that come with
the program, in a folder that a test may write to.
"""

from __future__ import annotations

import io
import json
import shutil
import zipfile
import zlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import gradio as gr
import pytest
from PIL import Image

from shared.engine.engine import MAX_WAITING, Engine, EngineConfig
from shared.engine.records import Counts
from shared.ui.gallery import ANSWERS
from tests.asgi import HOST
from tests.listeners import Page

ROOT = Path(__file__).resolve().parents[1]
SECRET = "the-secret-of-this-computer"
EVIL = "<img src=x onerror=alert(1)>"
MINI, OTHER = "z_image_mini", "z_image"
QUESTION = "/gradio_api/component_server"
STREAMS = {"follow"}  # they end with the tab


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    """Two servers over one folder: `open`, and `locked` with --lock-config and --lock-model."""
    folder = tmp_path_factory.mktemp("tabs")
    root, uploads = folder / "root", folder / "uploads"
    for name in ("loras/z_image", "wildcards", "ckpts", "finetunes"):
        (root / name).mkdir(parents=True)
    uploads.mkdir()
    for name in ("defaults", "profiles"):
        shutil.copytree(ROOT / name, root / name)
    furnish(folder)
    config = EngineConfig.at(root, warm=False, gpu="cpu", file_folder=root, saved=root / "settings")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(uploads))
        opened = served(Engine(config), uploads)
        locked = served(Engine(replace(config, lock_config=True, lock_model=True)), uploads)
        yield SimpleNamespace(folder=folder, root=root, uploads=uploads, open=opened, locked=locked)
        for one in (opened, locked):
            one.page.close()
            one.engine.stop()


def served(engine: Engine, uploads: Path) -> SimpleNamespace:
    from shared.server.access import Access
    from shared.server.app import make_app
    from shared.server.doors import Doors
    from shared.server.hosts import Hosts
    from shared.ui.app import build

    blocks = build(engine)
    app = make_app(engine, blocks, uploads, Hosts(), Doors(Access()))
    return SimpleNamespace(engine=engine, app=app, page=Page(app, blocks), blocks=blocks)


def furnish(folder: Path) -> None:
    """What must not be read, as a text and as a picture; and a card and a preset to be attacked."""
    (folder / "secret.json").write_text(json.dumps([{"prompt": SECRET}]), "utf-8")
    Image.new("RGB", (64, 64), (1, 2, 3)).save(folder / "secret.png", pnginfo=None)
    root = folder / "root"
    card = {"model": {"name": "Own", "architecture": MINI, "description": EVIL, "URLs": MINI}}
    (root / "finetunes" / "own.json").write_text(json.dumps(card), "utf-8")
    (root / "loras" / "z_image" / "mine.lset").write_text('{"loras": [], "loras_mult": ""}', "utf-8")


def file(path: Path | str) -> dict[str, object]:
    """A path as Gradio's own page sends one that it has uploaded."""
    return {"path": str(path), "orig_name": "a.png", "meta": {"_type": "gradio.FileData"}}


def tree(folder: Path) -> dict[str, bytes]:
    """Every file but those of the queue."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and ".zgp" not in path.parts
    }


# ---------------------------------------------------------------- every listener


def listeners(blocks: gr.Blocks) -> list[int]:
    return [n for n, one in blocks.fns.items() if one.fn and one.name not in STREAMS]


HOSTILE = {
    "nothing": None,
    "a list": [[[["x"]]]],
    "an object": {"a": {"b": EVIL}},
    "a text": EVIL,
    "a zero": "a\0b",
    "a huge number": 10**40,
    "a path": "/etc/passwd",
    "a way up": "../../../../secret.json",
}
EVENT = ("id", "act", "name", "values", "ids", "other", "mark", "kept")


@pytest.mark.parametrize("turn", range(3))
def test_no_listener_does_harm_whatever_it_is_given(house, turn):
    """Each input gets other hostile values from turn to turn."""
    before, values = tree(house.folder), list(HOSTILE.values())
    numbers = listeners(house.open.blocks)
    for number in numbers:
        given = [values[(number + i + turn) % len(values)] for i in range(60)]
        event = {name: given[i] for i, name in enumerate(EVENT)}
        outcome = house.open.page.run(number, given[: len(house.open.blocks.fns[number].inputs)], event)
        leaks = [one for one in leaked(house) if one in outcome.text]
        assert not leaks, (number, house.open.blocks.fns[number].name, outcome.text)
    assert tree(house.folder) == before


def leaked(house) -> list[str]:
    """What no answer may have in it."""
    return [SECRET, "root:x:", "Traceback", str(ROOT)]


FILES = (gr.File, gr.UploadButton, gr.JSON)


@pytest.mark.parametrize(
    "name",
    ["/etc/passwd", "{folder}/secret.json", "{folder}/secret.png", "{root}/defaults/z_image.json",
     "{uploads}/../secret.png"],
)  # fmt: skip
def test_no_listener_takes_a_file_that_was_not_uploaded(house, name):
    path = name.format(folder=house.folder, root=house.root, uploads=house.uploads)
    before, seen = tree(house.uploads), 0
    for number in listeners(house.open.blocks):
        for i, component in enumerate(house.open.blocks.fns[number].inputs):
            for given in (file(path), json.dumps([file(path)])) if isinstance(component, FILES) else ():
                values = house.open.page.usual(number)
                values[i], seen = given, seen + 1
                outcome = house.open.page.run(number, values)
                assert not (isinstance(given, dict) and outcome.success), (number, outcome.text)
                assert SECRET not in outcome.text and "file=" not in outcome.text, (number, outcome.text)
    assert seen > 40 and tree(house.uploads) == before


def test_the_same_over_the_wire(house):
    """The checks of the test above are those of the server, not only of the function that it calls."""
    page, before = house.open.page, tree(house.uploads)
    number = page.event("add_address", "click")
    address = "https://example.org/a.safetensors"
    told = page.call(number, [MINI, [], address])
    assert told.success and address in told.text
    told = page.call(number, [MINI, [file("/etc/passwd")], address])
    assert not told.success and "was not uploaded" in told.text
    assert not page.call(number, [MINI, json.dumps([file("/etc/passwd"), address]), address]).success
    assert tree(house.uploads) == before
