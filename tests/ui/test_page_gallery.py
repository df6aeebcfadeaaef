"""The tab Gallery in a real browser, and its HTML without one."""

from __future__ import annotations

import base64
import io
import json
import os
import zipfile
from pathlib import Path
from types import SimpleNamespace

import gradio as gr
import pytest
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo

from shared.engine.configuration import EngineConfig
from shared.engine.engine import Engine
from shared.errors import UserError
from shared.gallery import archive as packing
from shared.gallery.archive import pack
from shared.gallery.collection import Collection, Tile, Wanted
from shared.gallery.thumbnails import forget_thumbnail, ready_thumbnail, thumbnail
from shared.imaging import metadata
from shared.jobs.records import ImageRecord
from shared.jobs.store import JobStore
from shared.ui.components.viewer import line_of
from shared.ui.create.tab import Generate
from shared.ui.gallery.html import compare_html, detail_html, options_html, tile_html
from shared.ui.gallery.tab import Gallery
from tests.support.browser import ROOT, Visit, serve

MINI = "z_image_mini"
EVIL = '"><img src=x onerror=alert(1)>'
MANY = 200  # several parts of the list


# ---------------------------------------------------------------- without a browser


def a_record(**changes) -> ImageRecord:
    values = dict(
        id=7, job_id=1, index=0, path="/o/a.png", seed=5, width=128, height=64, created=1.7e9,
        metadata={"model_type": MINI, "prompt": "a star", "num_inference_steps": 5, "guidance_scale": "odd"},
    )  # fmt: skip
    return ImageRecord(**{**values, **changes})


def test_texts_of_pictures_are_never_html(models):
    meta = {
        "prompt": EVIL,
        "model_type": EVIL,
        "activated_loras": [EVIL],
        "zgp": {"notes": [EVIL]},
        EVIL: EVIL,
    }
    evil = a_record(metadata=meta, path=f"/o/{EVIL}.png")
    tile = Tile(7, Path(f"/o/{EVIL}.png"), 8, 8, 5, 1.7e9, True, EVIL)
    pages = [
        detail_html(evil, models),
        detail_html(a_record(metadata={"zgp": 3}, place="trash"), models),
        compare_html(evil, a_record(), models),
        tile_html(tile, "a.webp"),
        options_html("Any", [(EVIL, EVIL, 3)]),
    ]
    for html in pages:
        assert "<img src=x" not in html and "onerror=alert(1)>" not in html.replace("&gt;", "")


def test_what_is_special_stands_before_what_is_usual(models):
    special, _, usual = detail_html(a_record(), models).partition("<details>")
    assert "<dt>Steps</dt><dd>5</dd>" in special and not usual
    like_always = {**models.model(MINI).defaults, "prompt": "x"}
    special, usual = detail_html(a_record(metadata=like_always), models).split("<details>")
    assert "Steps" not in special and "<dt>Steps</dt><dd>8</dd>" in usual


def test_only_differences_are_compared(models):
    other = a_record(seed=6, metadata={**a_record().metadata, "num_inference_steps": 8})
    html = compare_html(a_record(), other, models)
    assert "<tr><th>Seed</th><td>5</td><td>6</td></tr>" in html
    assert "<tr><th>Steps</th><td>5</td><td>8</td></tr>" in html and html.count("<tr>") == 3
    assert "Their settings are the same." in compare_html(a_record(), a_record(), models)


def test_a_small_copy_is_made_once_and_goes_with_its_picture(tmp_path):
    picture = tmp_path / "a" / "noise.png"
    picture.parent.mkdir()
    Image.effect_noise((600, 400), 90).save(picture)
    assert ready_thumbnail(picture, tmp_path) is None
    copy = thumbnail(picture, tmp_path)
    assert Image.open(copy).size == (320, 213)
    moved = picture.rename(tmp_path / "noise.png")
    assert ready_thumbnail(moved, tmp_path) == copy
    forget_thumbnail(moved, tmp_path)
    assert not copy.exists()
    moved.write_bytes(b"no picture" * 20_000)
    assert thumbnail(moved, tmp_path) == moved


def values_of(number: int, path: Path, defaults: dict) -> tuple:
    """The row of a picture in the colour that its prompt names; its file is written."""
    colour = "red" if number == MANY - 3 else "blue" if number % 2 else "green"
    settings = {
        **defaults,
        "prompt": f"a {colour} circle, number {number}",
        "num_inference_steps": number % 5 + 4,
    }
    meta = metadata.build(settings, seed=number, index=0, model_name="", model_files={}, notes=[], extra={})
    image = Image.new("RGB", (128, 128), "white")
    ImageDraw.Draw(image).ellipse((24, 24, 104, 104), fill=colour)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, pnginfo=metadata.png_chunks(meta))
    return number, str(path), number, 1.7e9 + number, json.dumps(meta)


def an_engine(outputs, models) -> Engine:
    """With two pictures."""
    engine = Engine(EngineConfig.at(ROOT, output_dir=outputs, database=outputs / ".zgp" / "zgp.sqlite3"))
    for number in range(2):
        job = engine.store.submit({})
        path = outputs / f"{number}.png"
        meta = json.loads(values_of(number, path, models.model(MINI).defaults)[-1])
        engine.store.add_image(
            job, index=0, path=str(path), seed=number, width=128, height=128, metadata=meta
        )
    return engine


@pytest.fixture(scope="module")
def tab(tmp_path_factory, models):
    engine = an_engine(tmp_path_factory.mktemp("tab"), models)
    with gr.Blocks() as page:
        with gr.Tabs() as tabs, gr.Tab("Create"):
            create = Generate(engine, page)
        return Gallery(engine, page, tabs, create)


def test_the_create_tab_deletes_with_an_undo(tmp_path, models):
    engine = an_engine(tmp_path, models)
    with gr.Blocks() as page:
        create = Generate(engine, page)
    file = engine.config.output_dir / "1.png"
    updates = create.acts.discard(SimpleNamespace(id=2))
    assert not file.exists() and 'data-undo="2"' in updates[create.notice]
    assert "number 0" in updates[create.viewer] and "1 picture<" in updates[create.recent]
    updates = create.acts.restore(SimpleNamespace(ids=[2]))
    assert file.exists() and "number 1" in updates[create.viewer]
    assert 'data-act="favour" data-id="2" aria-pressed="true"' in create.acts.favour(SimpleNamespace(id=2))


def test_answers_to_the_page(tab):
    first = tab.area.look({"words": "circle"})
    assert first["count"] == "2 pictures" and first["html"].count('role="option"') == 2
    assert tab.area.thumbs({"ids": [1, 2, 99]}).keys() == {"1", "2"}
    assert "Z-Image Mini" in tab.area.choices({})["model"]
    assert "number 0" in tab.area.detail({"ids": [1]})["html"]
    assert tab.area.discard({"ids": [1, 2]}) == {"ids": [1, 2], "said": "2 pictures deleted."}
    assert tab.area.look({"trash": True})["count"] == "2 pictures" and tab.area.choices({})["trash"] == 2
    assert tab.area.restore({"ids": [1]})["said"] == "1 picture brought back."
    assert tab.area.purge({})["said"] == "1 picture deleted for good."
    assert tab.area.look({})["count"] == "1 picture"


@pytest.mark.parametrize(
    "name, asked, said",
    [
        ("look", {"since": "soon"}, "expected a day"),
        ("look", {"size": "large"}, "expected width x height"),
        ("detail", {"ids": [5]}, "not there any more"),
        ("detail", {"ids": "5"}, "reload the page"),
        ("detail", None, "reload the page"),
        ("discard", {"ids": [2**70]}, "reload the page"),
        ("compare", {"ids": [1]}, "Choose two"),
    ],
)
def test_odd_questions_are_answered_with_a_sentence(tab, name, asked, said):
    assert said in getattr(tab.area, name)(asked)["error"]


def a_sheet(**axes) -> ImageRecord:
    meta = {"model_type": MINI, "prompt": "a star", "num_inference_steps": 5, "seed": 5}
    return a_record(metadata={**meta, "zgp": {"grid": {"axes": axes}}})


def test_a_grid_says_what_varies(models):
    sheet = a_sheet(x=["num_inference_steps", "2, 8"], y=["seed", "1-3"])
    line = "Grid: Steps 2, 8 × Seed 1-3 · Z-Image Mini · 128 × 64"
    assert line_of(sheet, models) == line and line in detail_html(sheet, models)
    assert line_of(a_sheet(x=["model_type", "A, B"]), models) == "Grid: Model A, B · 128 × 64"
    odd = [
        {"x": "seed"},
        {"x": ["no setting", "1"]},
        {"x": [["seed"], 1]},
        {"x": ["seed"]},
        {"w": ["seed", "1"]},
    ]
    for axes in odd:
        assert "Grid" not in line_of(a_sheet(**axes), models)
    long = a_sheet(x=["prompt", EVIL + "x" * 200])
    assert len(line_of(long, models)) < 150 and "<img src=x" not in detail_html(long, models)


def test_the_settings_of_a_grid_fill_its_group_again(tmp_path, models):
    engine = an_engine(tmp_path, models)
    with gr.Blocks() as page:
        create = Generate(engine, page)
    job = engine.store.submit({})
    sheet = a_sheet(y=["num_inference_steps", "2, 8"], z=["unified_gap", "1"], x=["NAG_tau", "2, 3"])
    sheet.metadata["zgp"]["grid"]["axes"]["z"] = ["time_dist_ctrl", "1"]  # does nothing on the Mini
    engine.store.add_image(
        job, index=0, path=str(tmp_path / "0.png"), seed=5, width=9, height=9, metadata=sheet.metadata
    )
    values = tuple(component.value for component in create.form.inputs)
    updates = create.use_settings(SimpleNamespace(id=3), *values)
    grid = create.form.grid
    assert [updates[grid.settings[axis]]["value"] for axis in "xyz"] == ["NAG_tau", "num_inference_steps", ""]
    assert [updates[grid.values[axis]] for axis in "xyz"] == ["2, 3", "2, 8", ""]
    assert updates[create.form.controls["num_inference_steps"]]["value"] == 5
    assert "Sheets of its grid" in updates[create.notice] and set(updates) <= set(create.filled)
    assert (
        grid.settings["x"] not in create.use_settings(SimpleNamespace(id=1), *values)
        or "value" not in (create.use_settings(SimpleNamespace(id=1), *values)[grid.settings["x"]])
    )  # a picture of its own leaves the group as it is


def test_several_pictures_become_one_zip(tmp_path, monkeypatch):
    files = [tmp_path / name for name in ("a/one.png", "b/one.png", "b/ONE.png")]
    for file in files:
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(str(file).encode())
    path = pack(files, tmp_path / "zips")
    with zipfile.ZipFile(path) as archive:
        held = {name: archive.read(name) for name in archive.namelist()}
    assert len({name.lower() for name in held}) == 3
    assert sorted(held.values()) == sorted(file.read_bytes() for file in files)
    os.utime(path.parent, (1, 1))
    assert pack(files[:1], tmp_path / "zips").exists() and not path.exists()
    monkeypatch.setattr(packing, "MOST_BYTES", 3)
    with pytest.raises(UserError, match="select fewer"):
        pack(files, tmp_path / "zips")
    with pytest.raises(UserError, match="not|None"):
        pack([], tmp_path / "zips")


# ---------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def server(tmp_path_factory, models):
    if not models.models[MINI].available:
        pytest.skip("the Mini models' weights are not here")
    outputs = tmp_path_factory.mktemp("gallery") / "outputs"
    store = JobStore(outputs / ".zgp" / "zgp.sqlite3")
    with store.database.transaction() as cx:  # one, because each takes the disk's time
        cx.execute("INSERT INTO jobs (status, settings, source, created) VALUES ('done', '{}', 'ui', 1)")
        for number in range(MANY):
            cx.execute(
                "INSERT INTO images (job_id, number, path, seed, width, height, created, metadata)"
                " VALUES (1, ?, ?, ?, 128, 128, ?, ?)",
                values_of(number, outputs / "day" / f"{number}.png", models.model(MINI).defaults),
            )
    with serve(outputs) as running:
        yield running


class GalleryVisit(Visit):
    """A tab that shows the gallery."""

    def __init__(self, browser, url, **options):
        super().__init__(browser, url, **options)
        self.tab.get_by_role("tab", name="Gallery").click()
        self.shots = self.tab.locator(".zgp-shot")
        self.shots.first.wait_for()

    def count(self, said):
        self.tab.wait_for_function(
            "(said) => document.querySelector('[data-count]').textContent === said", arg=said
        )

    def search(self, words, said):
        self.tab.locator("#gallery [name=words]").fill(words)
        self.count(said)

    def shown(self, text):
        self.tab.locator("dialog[open] .zgp-about").get_by_text(text, exact=True).first.wait_for()


VISIT = GalleryVisit


@pytest.mark.browser
def test_search_look_and_use(visit, server):
    page = visit()
    page.count(f"{MANY} pictures")
    page.tab.wait_for_function(
        "[...document.querySelectorAll('.zgp-shot img')].slice(0, 9).every((one) => one.naturalWidth)"
    )
    page.search("red circle", "1 picture")
    page.search("purple", "0 pictures")
    assert "fewer words" in page.tab.locator(".zgp-none").inner_text()
    page.search("", f"{MANY} pictures")
    page.shots.first.focus()
    page.tab.keyboard.press("ArrowRight")
    page.tab.keyboard.press("Enter")
    page.shown(f"a green circle, number {MANY - 2}")
    page.tab.keyboard.press("ArrowRight")
    page.shown(f"a red circle, number {MANY - 3}")
    page.tab.locator("dialog [data-act=use]").click()
    page.tab.wait_for_function(f"document.querySelector('#seed input').value === '{MANY - 3}'")
    page.tab.locator("#generate").wait_for()
    assert page.value("prompt") == f"a red circle, number {MANY - 3}"
    assert "Changed: Prompt" in page.tab.locator("#notice").inner_text()
    store = JobStore(server.folder / ".zgp" / "zgp.sqlite3")
    path = server.folder / "day" / "fresh.png"
    meta = json.loads(values_of(MANY, path, {"model_type": MINI})[-1])
    fresh = store.add_image(1, index=MANY, path=str(path), seed=1, width=128, height=128, metadata=meta)
    page.tab.get_by_role("button", name="All pictures").click()
    page.count(f"{MANY + 1} pictures")  # coming back shows what was made meanwhile
    assert page.shots.first.get_attribute("data-id") == str(fresh)
    # once it is forgotten, the server refuses its file
    page.tab.wait_for_function("document.querySelector('.zgp-shot img').naturalWidth")
    with store.database.transaction() as cx:
        cx.execute("DELETE FROM images WHERE id = ?", [fresh])


@pytest.mark.browser
def test_compare_favour_delete_and_undo(visit, server):
    page = visit()
    page.count(f"{MANY} pictures")
    page.shots.nth(0).click(modifiers=["Control"])
    page.shots.nth(2).click(modifiers=["Control"])
    page.tab.locator("#gallery [data-act=compare]").click()
    table = page.tab.locator(".zgp-differences")
    table.wait_for()
    assert "Seed" in table.inner_text() and "Prompt" in table.inner_text()
    before = page.tab.locator(".zgp-left").evaluate("(one) => getComputedStyle(one).clipPath")
    for _ in range(8):
        page.tab.keyboard.press("ArrowRight")
    after = page.tab.locator(".zgp-left").evaluate("(one) => getComputedStyle(one).clipPath")
    assert before != after
    box = page.tab.locator(".zgp-compare").bounding_box()
    page.tab.mouse.click(box["x"] + box["width"] * 0.1, box["y"] + box["height"] / 2)
    cut = page.tab.locator(".zgp-compare").evaluate(
        "(one) => parseFloat(one.style.getPropertyValue('--zgp-cut'))"
    )
    assert 5 < cut < 15
    page.tab.keyboard.press("Escape")
    with page.tab.expect_download() as download:
        page.tab.locator("#gallery [data-act=download-all]").click()
    with zipfile.ZipFile(download.value.path()) as archive:
        assert len(archive.namelist()) == 2
    page.shots.nth(2).focus()
    page.tab.keyboard.press("Enter")
    page.tab.locator("dialog[open] .zgp-about").wait_for()
    page.tab.keyboard.press("Escape")
    page.tab.keyboard.press("f")  # at once: the keys are the list's again
    page.tab.wait_for_function("document.querySelectorAll('.zgp-shot[data-favourite]').length === 2")
    page.tab.keyboard.press("Delete")
    page.count(f"{MANY - 2} pictures")
    assert not (server.folder / "day" / f"{MANY - 1}.png").exists()
    page.tab.locator("#gallery [data-act=undo]").click()
    page.count(f"{MANY} pictures")
    assert (server.folder / "day" / f"{MANY - 1}.png").exists()
    collection = Collection(JobStore(server.folder / ".zgp" / "zgp.sqlite3"), server.folder)
    assert collection.count(Wanted(favourites=True)) == 2


A1111 = """a lighthouse, <lora:mini_outlines:0.8>
Negative prompt: fog
Steps: 7, Sampler: DPM++ 2M, CFG scale: 1, Seed: 4711, Size: 128x128, Model: dreams"""

_DROP = """([name, data]) => {
  const bytes = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0));
  const dragged = new DataTransfer();
  dragged.items.add(new File([bytes], name));
  const send = (kind) => document.querySelector('.zgp-shots').dispatchEvent(
    new DragEvent(kind, {bubbles: true, cancelable: true, dataTransfer: dragged}));
  send('dragover');
  const seen = !document.querySelector('.zgp-drop-target').hidden;
  send('drop');
  return seen;
}"""


@pytest.mark.browser
def test_a_picture_of_another_program_dropped_anywhere_fills_the_form(visit):
    chunks, file = PngInfo(), io.BytesIO()
    chunks.add_text("parameters", A1111)
    Image.new("RGB", (8, 8)).save(file, "PNG", pnginfo=chunks)
    page = visit()
    assert page.tab.evaluate(_DROP, ["theirs.png", base64.b64encode(file.getvalue()).decode()])
    page.tab.wait_for_function("document.querySelector('#seed input').value === '4711'")
    notice = page.tab.locator("#notice .zgp-notice")
    notice.wait_for()
    assert (page.value("prompt"), page.value("num_inference_steps")) == ("a lighthouse", "7")
    said = notice.inner_text()
    assert "theirs.png, made by A1111" in said and "'dreams' is not here" in said and "DPM++ 2M" in said
    page.tab.locator("#loras > button").click()
    page.tab.locator("#lora-rows li").filter(has_text="mini_outlines").wait_for()
    said = {
        "style.safetensors": "loras folder of its model",
        "notes.pdf": "Only pictures, workflows and settings as text",
        "notes.txt": "notes.txt holds no settings",
    }
    for name, words in said.items():
        page.tab.evaluate(_DROP, [name, base64.b64encode(b'[{"prompt": ""}]').decode()])
        page.tab.locator("#notice").get_by_text(words).wait_for()


@pytest.mark.browser
def test_the_gallery_fits_a_phone_and_goes_on_while_scrolling(visit):
    page = visit(viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True)
    page.count(f"{MANY} pictures")
    assert not page.scrolls_sideways()
    page.tab.wait_for_function(  # scrolling may answer with a promise, which is no "not yet"
        "(many) => { scrollTo(0, 1e7); return document.querySelectorAll('.zgp-shot').length === many; }",
        arg=MANY,
    )
    page.tab.evaluate("() => { scrollTo(0, 0); }")
    page.tab.wait_for_timeout(200)
    page.tab.evaluate("() => { scrollTo(0, document.documentElement.scrollHeight); }")
    page.tab.wait_for_timeout(300)
    assert page.shots.count() == MANY  # the end is the end
    page.shots.first.tap()
    page.tab.locator("dialog[open] .zgp-about").wait_for()
    fits = "(one) => one.scrollWidth <= innerWidth && one.getBoundingClientRect().right <= innerWidth + 1"
    assert page.tab.locator("dialog").evaluate(fits)
    page.tab.locator("dialog [data-act=shut]").tap()
    assert not page.scrolls_sideways()
