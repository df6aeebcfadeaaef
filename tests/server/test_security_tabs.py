"""What a client with a login may try on the page's tabs: every listener and question called past the page.

The listeners are those of the whole page, behind the whole server; the models' cards are those that come with
the program, in a folder that a test may write to.
"""

from __future__ import annotations

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

from shared.engine.configuration import EngineConfig
from shared.engine.engine import MAX_WAITING, Engine
from shared.jobs.records import Counts
from shared.ui.gallery.tab import ANSWERS
from tests.support.asgi import HOST
from tests.support.listeners import Page

ROOT = Path(__file__).resolve().parents[2]
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
    from shared.server.app import make_app
    from shared.server.credentials import Credentials
    from shared.server.login import LoginSessions
    from shared.server.origin import HostOriginCheck
    from shared.ui.app import build

    blocks = build(engine)
    app = make_app(engine, blocks, uploads, HostOriginCheck(), LoginSessions(Credentials()))
    return SimpleNamespace(engine=engine, app=app, page=Page(app, blocks), blocks=blocks)


def furnish(folder: Path) -> None:
    """What must not be read, as a text and as a picture; and a card and a preset to be attacked."""
    (folder / "secret.json").write_text(json.dumps([{"prompt": SECRET}]), "utf-8")
    Image.new("RGB", (64, 64), (1, 2, 3)).save(folder / "secret.png", pnginfo=None)
    root = folder / "root"
    card = json.loads((root / "defaults" / f"{MINI}.json").read_text("utf-8"))
    card["model"] |= {"name": f"Own {EVIL}", "description": EVIL}
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


def test_no_listener_does_harm_whatever_it_is_given(house):
    before, values = tree(house.folder), list(HOSTILE.values())
    numbers = listeners(house.open.blocks)
    for number in numbers:
        given = [values[(number + i) % len(values)] for i in range(60)]
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
    ["/etc/passwd", "{uploads}/../secret.json", "{folder}/secret.png", "{root}/defaults/z_image.json"],
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


# ---------------------------------------------------------------- questions


def question(house, name="look", data=None, **others):
    area = next(n for n, one in house.open.blocks.blocks.items() if one.elem_id == "gallery")
    body = {"data": data, "component_id": area, "fn_name": name, "session_hash": "a", **others}
    return house.open.page.ask("POST", QUESTION, body)


def test_questions_that_are_meant_are_answered(house):
    assert question(house, data={}).json["count"] == "0 pictures"
    assert question(house, "detail", {"ids": [10**9]}).json == {
        "error": "This picture is not there any more."
    }
    assert question(house, "discard", {"ids": [1, 2, -5]}).json["ids"] == []


@pytest.mark.parametrize("name", ANSWERS)
@pytest.mark.parametrize(
    "data",
    [None, "x", [1], {"ids": "x"}, {"ids": [True]}, {"ids": [10**40]}, {"ids": [["x"]]}, {"ids": [1] * 5000},
     {"after": "x"}, {"after": [1]}, {"after": ["x", "y"]}, {"after": [1e300, 10**30]}, {"after": {"a": 1}},
     {"words": ['"*()', {"a": 1}]}, {"words": "a\0b \"x"}, {"words": "NEAR( ^ OR - AND *"},
     {"words": "(" * 500}, {"size": "9" * 9 + "x" + "9" * 9}, {"size": "x"}, {"since": "9999-99-99"},
     {"since": "0001-01-01"}, {"until": "9999-12-31"}, {"model": EVIL}],
    ids=lambda data: str(data)[:30],
)  # fmt: skip
def test_no_question_fails(house, name, data):
    if name in ("purge", "find", "found"):  # these ask nothing
        return
    answer = question(house, name, data)
    assert answer.status == 200 and isinstance(answer.json, dict)
    assert str(house.folder) not in answer.body.decode()


@pytest.mark.parametrize(
    "status, others",
    [(404, {"component_id": 10**9}), (404, {"component_id": -1}), (404, {"component_id": "1"}),
     (404, {"component_id": [1]}), (404, {"component_id": True}), (404, {"component_id": 0}),
     (404, {"fn_name": "use"}), (404, {"fn_name": "__init__"}), (404, {"fn_name": "get_config"}),
     (404, {"fn_name": "_look"}), (404, {"fn_name": ["look"]}), (404, {"fn_name": None}),
     (404, {"fn_name": "look.__globals__"}), (413, {"data": "x" * (1 << 20)}),
     (400, {"data": json.loads("[" * 80 + "]" * 80)}), (400, {"data": {"words": "\ud800"}})],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
def test_no_other_name_answers(house, status, others):
    answer = question(house, **others)
    assert answer.status == status and answer.json["detail"]


@pytest.mark.parametrize("body", [b"", b"[]", b"x", b"\xff", b"null", b'{"data": NaN', b'{"a":' * 2000])
def test_what_is_no_question_is_refused(house, body):
    assert house.open.page.ask("POST", QUESTION, body).status in (400, 404)


def test_a_question_brings_no_files(house):
    before = tree(house.uploads)
    body = (
        b'--x\r\nContent-Disposition: form-data; name="data"; filename="../../a.html"\r\n\r\nx\r\n--x--\r\n'
    )
    headers = [*HOST, ("Content-Type", "multipart/form-data; boundary=x")]
    assert house.open.page.ask("POST", QUESTION, body, headers).status == 400
    assert tree(house.uploads) == before


# ---------------------------------------------------------------- paths that the page sends


def test_no_listener_shows_a_picture_of_this_computer(house):
    """Pictures are named by paths in the form: any other than the kept copies are not looked at."""
    page, path = house.open.page, str(house.folder / "secret.png")
    drawn = page.event("draw_image", "change")
    for values in ([path, ""], [path, "data:image/png;base64,AAAA"]):
        assert "data:image" not in page.run(drawn, values).text
    for name in ("draw_map", "draw_unpainted_map"):
        number = page.event(name, "change")
        for guide in (path, f"{path}|data:image/png;base64,AAAA"):
            assert "data:image" not in page.run(number, [guide, "canny", "", "64x64"]).text
    form = house.open.blocks.fns[page.event("submit", "click")].inputs
    values = page.usual(page.event("submit", "click"))
    for name in ("image_start", "image_guide"):
        given = [path if one.elem_id == name else value for one, value in zip(form, values, strict=True)]
        outcome = page.run(page.event("submit", "click"), given)
        assert not outcome.success, name
    assert not list((house.root / "outputs").rglob("inputs/*"))


@pytest.mark.parametrize(
    "choice",
    ["preset/../../secret.json", "preset//etc/passwd", "preset/..", "preset/con", "profile/../x", EVIL],
)
def test_no_preset_is_anywhere_else(house, choice):
    page, before = house.open.page, tree(house.folder)
    for event in ({"name": "remove"}, {"name": "rename"}):
        assert not page.run(page.event("change", "preset"), [choice, "new", MINI], event).success
    assert SECRET not in page.run(page.event("describe", "input"), [choice, MINI]).text
    assert tree(house.folder) == before


@pytest.mark.parametrize(
    "name", ["../x", "..", ".x", "/tmp/x", "a/b", "a\\b", "con", "nul.", "a:b", " ", "x\0", "C:x"]
)
def test_no_preset_gets_a_name_that_leads_out(house, name):
    page, before = house.open.page, tree(house.folder)
    renamed = page.event("change", "preset")
    assert not page.run(renamed, ["preset/mine.lset", name, MINI], {"name": "rename"}).success
    for saved in (page.event("keep", "click"), page.event("keep_instead", "replace")):
        assert not page.run(saved, [name, True, *page.usual(saved)[2:]]).success
    assert tree(house.folder) == before


# ---------------------------------------------------------------- what takes too much


def test_calls_that_wait_for_their_pictures_leave_the_page_free(house):
    """Gradio runs 40 events at a time, unless it is told otherwise."""
    open_, page = house.open, house.open.page
    (generate,) = page.numbers("generate")
    for number in range(45):
        body = {"fn_index": generate, "data": [{"prompt": "a"}], "session_hash": f"waiting{number}"}
        assert page.ask("POST", "/gradio_api/queue/join", body).status == 200
    (redraw,) = page.numbers("redraw")
    try:
        assert page.call(redraw, page.usual(redraw)).success
    finally:
        open_.engine.store.clear_waiting()


def test_no_list_of_jobs_is_endless(house, monkeypatch):
    """Neither the entries of a zip nor the items of a list make an object each before they are counted."""
    archive, listed = house.uploads / "many.zip", house.uploads / "many.json"
    with zipfile.ZipFile(archive, "w") as file_:
        for number in range(45_000):
            file_.writestr(f"an-entry-with-a-name-of-some-length-{number}", b"")
    listed.write_text(json.dumps([{}] * 1001), "utf-8")
    monkeypatch.setattr(zipfile, "ZipFile", None)
    page = house.open.page
    number = page.event("load_file", "upload")
    for path, said in ((archive, "more files"), (listed, "at most 1000")):
        outcome = page.run(number, ["tab", file(path)])
        assert not outcome.success and said in outcome.text
        path.unlink()


@pytest.mark.parametrize(
    "typed",
    ["0-1000000000 (+0.0001)", "1-200000", "0-1 [999999999]", "1-5 (+0)", "1-5 (+0.000000000000001)",
     ", ".join(map(str, range(201))), "1-" + "9" * 5000, "(" * 5000],
    ids=lambda text: text[:20],
)  # fmt: skip
def test_no_grid_is_endless(house, typed):
    body = {"prompt": "a", "grid": {"x": ["seed", typed]}}
    answer = house.open.page.ask("POST", "/api/v1/jobs", body)
    assert answer.status == 400
    many = {"x": ["seed", "1-100"], "y": ["num_inference_steps", "1-50"], "z": ["flow_shift", "1-9"]}
    assert house.open.page.ask("POST", "/api/v1/jobs", {"prompt": "a", "grid": many}).status == 400


@pytest.mark.parametrize(
    "prompt",
    ["{" * 10_000, "{a|" * 5000, "{a|b}" * 20_000, "__" * 30_000, "__a/../../secret__", "__/etc/passwd__",
     "__a" * 30_000, '! {A}="x"' + ',"y"' * 2000 + "\n{A}", "\\" * 50_000, "# " * 30_000],
    ids=lambda text: text[:20],
)  # fmt: skip
def test_no_prompt_takes_for_ever(house, prompt):
    """What is refused is refused; what is queued is a bounded number of jobs."""
    store = house.open.engine.store
    before = store.counts().queued
    answer = house.open.page.ask("POST", "/api/v1/jobs", {"prompt": prompt})
    assert answer.status in (201, 400) and SECRET not in answer.body.decode()
    assert store.counts().queued - before <= 500
    store.cancel_all()


def test_a_full_queue_stays_full(house, monkeypatch):
    store = house.open.engine.store
    job = house.open.engine.submit({"prompt": "a"})[0]
    monkeypatch.setattr(store, "counts", lambda: Counts(queued=MAX_WAITING))
    page = house.open.page
    event = {"act": "more", "id": job, "other": 0}
    assert str(MAX_WAITING) in page.run(page.event("act", "act"), ["tab"], event).text
    store.cancel_all()


def chunk(kind: bytes, content: bytes) -> bytes:
    """Of a PNG: length, type, data and CRC."""
    return len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")


@pytest.mark.parametrize("kind", ["a long text", "a bomb", "HTML"])
def test_no_dropped_picture_does_harm(house, kind):
    head = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", bytes([0, 0, 0, 16, 0, 0, 0, 16, 8, 0, 0, 0, 0]))
    texts = {
        "a long text": chunk(b"tEXt", b"comment\0" + b"x" * 20_000_000),
        "a bomb": chunk(b"iTXt", b"comment\0\1\0\0\0" + zlib.compress(bytes(100_000_000))),
        "HTML": chunk(b"tEXt", b"parameters\0" + f"{EVIL}\nSteps: 4, Model: {EVIL}, {EVIL}: 1".encode()),
    }
    path = house.uploads / "dropped.png"
    path.write_bytes(head + texts[kind] + chunk(b"IDAT", zlib.compress(bytes(17 * 16))) + chunk(b"IEND", b""))
    page = house.open.page
    number = page.event("read_picture", "upload")
    outcome = page.run(number, ["a tab", file(path), *page.usual(number)[2:]])
    assert outcome.success and len(outcome.text) < 100_000
    assert ("zgp-notice error" in outcome.text or 'role="alert"' in outcome.text) == (kind != "HTML")
    notices = outcome.text.replace(f"'value': '{EVIL}'", "")  # of the prompt's box, which is a text
    assert "<img" not in notices
    path.unlink()


# ---------------------------------------------------------------- --lock-config and --lock-model

LOCKED_WRITES = [
    ("change_defaults", "defaults", {"name": "keep"}),
    ("change_defaults", "defaults", {"name": "factory"}),
    ("act", "act", {"name": "save", "values": {"save_path": "/", "checkpoints_paths": "/"}}),
    ("act", "act", {"name": "restart", "values": {}}),
    ("act", "act", {"name": "defaults", "values": {}}),
    ("act", "act", {"name": "everything", "values": {}}),
    ("act", "act", {"act": "delete", "id": MINI, "mark": "x"}),
    ("act", "act", {"act": "forgotten", "id": MINI, "mark": ""}),
]


@pytest.mark.parametrize("name, trigger, event", LOCKED_WRITES, ids=lambda value: str(value)[:40])
def test_what_is_locked_is_not_written(house, name, trigger, event):
    page, before = house.locked.page, tree(house.folder)
    owner = "Preferences" if "name" in event else "Models"
    for number in page.numbers(name):
        if name == "act" and owner not in house.locked.blocks.fns[number].fn.__qualname__:
            continue
        outcome = page.run(number, page.usual(number), event)
        assert not outcome.success and "--lock-config" in outcome.text
    assert tree(house.folder) == before


def test_no_card_is_written_while_locked(house):
    page, before = house.locked.page, tree(house.folder)
    number = page.numbers("write")[0]
    for editing in (MINI, "own", ""):
        values = [editing, "a.safetensors", MINI, "Another", "", 4, 1]
        assert not page.run(number, values, states=True).success
    assert tree(house.folder) == before


def test_no_other_model_is_used_while_locked(house):
    page, engine = house.locked.page, house.locked.engine
    assert list(engine.catalog.models) == [MINI] and OTHER in house.open.engine.catalog.models
    for body in ({"model_type": OTHER}, {"grid": {"x": ["model_type", f"{MINI}, {OTHER}"]}}):
        answer = page.ask("POST", "/api/v1/jobs", {"prompt": "a", **body})
        assert answer.status == 400 and "--lock-model" in answer.json["detail"]
    assert page.ask("POST", "/v1/images/generations", {"prompt": "a", "model": OTHER}).status == 404
    generate = page.numbers("generate")[0]
    assert "--lock-model" in page.run(generate, [{"prompt": "a", "model_type": OTHER}, False]).text
    for name in ("submit", "forever", "submit_grid", "save_changes", "change_model"):
        for number in page.numbers(name):
            values = [OTHER if value == MINI else value for value in page.usual(number)]
            assert not page.run(number, values).success, name
    other = house.open.engine.submit({"prompt": "a", "model_type": OTHER})[0]
    event = {"act": "more", "id": other, "other": 0}
    assert "--lock-model" in page.run(page.event("act", "act"), ["tab"], event).text
    saved = house.uploads / "queue.json"
    saved.write_text(json.dumps([{"prompt": "a", "model_type": OTHER}]), "utf-8")
    waiting = engine.store.counts().queued
    told = page.run(page.event("load_file", "upload"), ["tab", file(saved)])
    assert "--lock-model" in told.text and engine.store.counts().queued == waiting
    saved.unlink()
    engine.store.cancel_all()


# ---------------------------------------------------------------- texts as HTML


def texts_as_html(house) -> dict[str, str]:
    from shared.engine import inventory
    from shared.jobs.records import ImageRecord
    from shared.ui.components import notice, viewer
    from shared.ui.create import form, grid, loras, presets, prompt
    from shared.ui.create.queue import panel
    from shared.ui.gallery import html as gallery_html
    from shared.ui.models import html as model_rows

    engine = house.open.engine
    own = engine.catalog.model("own")
    job = engine.store.job(engine.submit({"prompt": EVIL})[0])
    failed = replace(job, error=EVIL, settings={**job.settings, "model_type": EVIL})
    meta = {"prompt": EVIL, "model_type": EVIL, "activated_loras": [EVIL], "zgp": {"notes": [EVIL]}}
    path = str(house.root / "outputs" / f"{EVIL.replace('/', '')}.png")
    record = ImageRecord(
        id=1, job_id=1, index=0, path=path, seed=1, width=1, height=1, created=0.0, metadata=meta
    )
    engine.store.cancel_all()
    shelf = model_rows.Shelf(inventory.take_stock(engine), {}, 1, EVIL, None, [EVIL])
    return {
        "a notice": notice.notice_html([EVIL]),
        "a waiting job": panel._row(job, {}),
        "a failed job": panel._failure(failed, {}),
        "a picture": viewer.viewer_html([record], record, engine.catalog),
        "a picture's detail": gallery_html.detail_html(record, engine.catalog),
        "two pictures": gallery_html.compare_html(record, replace(record, seed=2), engine.catalog),
        "filters": gallery_html.options_html("Any", [(EVIL, EVIL, 1)]),
        "a preset's line": presets.lines_html([EVIL]),
        "a taken name": presets._taken_html(EVIL),
        "a prompt's line": prompt.line_html([EVIL], EVIL),
        "a prompt's problem": prompt.line_html([], problem=EVIL),
        "a template": prompt.offer_html([EVIL]),
        "wildcards": prompt.words_html([EVIL]),
        "a grid's problem": grid._problem(EVIL),
        "strengths": loras.problem_html(EVIL, 1),
        "a card": form.about_html(own),
        "the models": model_rows.shelf_html(shelf),
        "a question": model_rows.forget_html(EVIL, EVIL),
    }


def test_texts_from_outside_are_texts_in_the_page(house):
    for name, html in texts_as_html(house).items():
        assert "<img src=x" not in html and "&lt;img src=x" in html, name
