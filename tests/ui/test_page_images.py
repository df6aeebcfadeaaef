"""The page's groups Image and Control: what is painted becomes files, and the pictures made with them."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from types import SimpleNamespace

import cv2
import gradio as gr
import numpy as np
import pytest
from PIL import Image, ImageDraw

from shared.engine.configuration import EngineConfig
from shared.engine.engine import Engine
from shared.errors import UserError
from shared.imaging import metadata
from shared.jobs.inputs import keep_picture
from shared.ui.create.form import Form, label
from shared.ui.create.images import suited_size
from shared.ui.create.painter import EMPTY, mask_of, painted_over, painter_html
from tests.support import mini
from tests.support.bad_pictures import bad_pictures
from tests.support.browser import ROOT
from training.control_score import cases, judge

MINI, CONTROL, MINI_CONTROL = "z_image_mini", "z_image_control2_1", "z_image_mini_control2_1"
RED = (225, 29, 72, 255)


def drawn(size, box, colour=RED) -> str:
    """What the page sends when a rectangle is painted."""
    layer = Image.new("RGBA", size)
    ImageDraw.Draw(layer).rectangle(box, fill=colour)
    file = io.BytesIO()
    layer.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def pixels(path_or_image) -> np.ndarray:
    image = path_or_image if isinstance(path_or_image, Image.Image) else Image.open(path_or_image)
    return np.asarray(image.convert("RGB")).astype(int)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A circle above a square, 128 x 128."""
    image = Image.new("RGB", (128, 128), "white")
    draw = ImageDraw.Draw(image)
    draw.ellipse((34, 8, 94, 60), fill=(230, 30, 30))
    draw.rectangle((40, 70, 88, 118), fill=(30, 60, 220))
    path = tmp_path_factory.mktemp("source") / "shapes.png"
    image.save(path)
    return path


# ---------------------------------------------------------------- without a browser


def test_whatever_is_painted_is_white_in_the_mask():
    mask = np.asarray(mask_of(drawn((64, 32), (10, 5, 19, 14))))
    expected = np.zeros((32, 64), np.uint8)
    expected[5:15, 10:20] = 255
    assert np.array_equal(mask, expected)
    assert np.asarray(mask_of(drawn((8, 8), (0, 0, 8, 8)))).min() == 255
    assert mask_of(EMPTY) is None
    with pytest.raises(UserError, match="did not arrive whole"):
        mask_of("data:image/png;base64,abc!")


def test_strokes_lie_on_the_map_and_leave_the_rest():
    picture = Image.new("RGB", (64, 32), (9, 9, 9))
    painted = pixels(painted_over(picture, drawn((64, 32), (10, 5, 19, 14), (255, 255, 255, 255))))
    assert (painted[5:15, 10:20] == 255).all() and (painted == 9).sum() == 3 * (64 * 32 - 100)
    assert painted_over(picture, EMPTY) is picture
    black = Image.new("RGB", (64, 32))
    assert not pixels(painted_over(black, drawn((130, 66), (10, 5, 41, 22), (0, 0, 0, 255)))).any()


def test_the_canvas_is_fine_enough_for_small_pictures_and_small_enough_for_large_ones():
    for size, canvas in (((128, 64), (512, 256)), ((4000, 3000), (1024, 768)), ((800, 600), (800, 600))):
        html = painter_html("mask", Image.new("RGB", size), None, ["<b>"])
        assert f'<canvas width="{canvas[0]}" height="{canvas[1]}"' in html and "<b>" not in html


@pytest.mark.parametrize(
    "size, suited",
    [
        ((1024, 1024), (1024, 1024)),
        ((768, 512), (768, 512)),  # fewer pixels than usual, and still many
        ((4000, 3000), (1184, 880)),
        ((100, 100), (1024, 1024)),
        ((1000, 1000), (1024, 1024)),
        ((9000, 10), (8192, 64)),
    ],
)
def test_a_picture_is_painted_in_its_shape_with_about_the_usual_pixels(size, suited):
    model = SimpleNamespace(
        defaults={"resolution": "1024x1024"}, capabilities={"resolutions": ["1280x720"], "size_multiple": 16}
    )
    assert suited_size(size, model) == suited


@pytest.fixture(scope="module")
def form(tmp_path_factory):
    outputs = tmp_path_factory.mktemp("form")
    engine = Engine(EngineConfig.at(ROOT, output_dir=outputs, database=outputs / ".zgp" / "zgp.sqlite3"))
    if not {MINI, CONTROL} <= set(engine.catalog.models):
        pytest.skip("the cards are not here")
    with gr.Blocks():
        return Form(engine)


def copy_of(picture, form):
    """Where the form has a picture: as of everything that is dropped, a copy."""
    return keep_picture(picture, form.images._engine.config.inputs)[0]


@pytest.fixture
def kept(form, source):
    return copy_of(source, form)


def test_a_painted_mask_becomes_a_file_as_large_as_its_picture(form, kept):
    read = form.images.read
    start = {"image_start": str(kept)}
    mask = Image.open(read({**start, "image_mask": drawn((512, 512), (0, 0, 255, 511))})["image_mask"])
    expected = np.zeros((128, 128), np.uint8)
    expected[:, :64] = 255
    assert mask.mode == "RGB" and np.array_equal(np.asarray(mask)[..., 0], expected)
    assert read({**start, "image_mask": EMPTY})["image_mask"] == ""
    assert "image_mask" not in read({"image_start": "", "image_mask": drawn((512, 512), (0, 0, 9, 9))})


def test_a_map_that_was_painted_on_is_used_as_it_is(form, kept):
    given = {
        "image_guide": f"{kept}|{drawn((512, 512), (0, 0, 63, 511), (255, 255, 255, 255))}",
        "control_preprocessor": "canny", "control_parameters": "low=50, high=150", "resolution": "128x128",
    }  # fmt: skip
    read = form.images.read(given)
    assert (read["control_preprocessor"], read["control_parameters"]) == ("as_it_is", "")
    edges = cv2.Canny(pixels(kept).astype(np.uint8), 50, 150)
    painted = pixels(read["image_guide"])
    assert (painted[:, :15] == 255).all() and np.array_equal(painted[:, 18:, 0], edges[:, 18:])
    unpainted = form.images.read({**given, "image_guide": f"{kept}|{EMPTY}"})
    assert unpainted == {**given, "image_guide": str(kept)}


def test_strokes_lie_on_the_map_again():
    strokes = drawn((512, 512), (0, 0, 63, 511), (255, 255, 255, 255))
    html = painter_html("map", Image.new("RGB", (128, 128)), None, [], strokes)
    layer = html.split('data-layer="')[1].split('"')[0]
    again = Image.open(io.BytesIO(base64.b64decode(layer.removeprefix("data:image/png;base64,"))))
    assert (np.asarray(again)[:, :64] == 255).all() and not np.asarray(again)[:, 64:].any()
    assert 'data-painted="1"' in html
    for none in ("", EMPTY):
        assert 'data-layer=""' in painter_html("map", Image.new("RGB", (8, 8)), None, [], none)


def test_extending_is_a_setting_of_the_page(form, source):
    model = form.images._engine.catalog.model(MINI)
    shown = form.images.suit(model, {**model.defaults, "outpaint": "25%, 0,64,0"})
    assert [shown[side] for side in form.images.sides] == ["25%", "", "64", ""]
    assert [form.images.suit(model, model.defaults)[side] for side in form.images.sides] == [""] * 4
    given = {"image_start": "", "outpaint": "0,0,64,0"}
    assert "outpaint" not in form.images.read(given)  # left over from a picture that is gone
    assert form.images.read({**given, "image_start": str(source)})["outpaint"] == "0,0,64,0"


def test_an_upscaler_of_another_computer_is_replaced_and_said(form):
    model = form.images._engine.catalog.model(MINI)
    theirs = {"hires_scale": 2.0, "hires_upscaler": "4x-theirs.safetensors"}
    settings, lines = form.enlarging.present(model, theirs)
    assert settings["hires_upscaler"] == "lanczos" and "4x-theirs.safetensors is not here" in lines[0]
    assert form.enlarging.present(model, {**theirs, "hires_scale": 1.0})[1] == []
    assert form.enlarging.present(model, settings) == (settings, [])


def test_an_empty_map_is_said(form, tmp_path):
    Image.new("RGB", (64, 64), "white").save(tmp_path / "white.png")
    shown = form.images.draw_map(str(copy_of(tmp_path / "white.png", form)), "canny", "", "128x128")
    assert "The control map is empty: no edge" in shown[form.images.map]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("alpha", "transparent parts were laid on white"), ("deep", "16-bit values were scaled"),
        ("cmyk", "CMYK without a colour profile"), ("turned", "turned upright"),
        ("moving", "holds 3 frames; the first one is used"),
    ],
)  # fmt: skip
def test_every_correction_of_a_picture_is_said(form, tmp_path, monkeypatch, name, said):
    notes = []
    monkeypatch.setattr(gr, "Info", notes.append)
    path = str(bad_pictures(tmp_path)[name])
    form.images.take_image(path, MINI)
    assert any(said in note for note in notes)
    notes.clear()
    form.images.take_guide(path, CONTROL, "")
    assert any(said in note for note in notes)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("black", "The mask is all black"), ("other", "The mask is 30x60, its picture 60x40"),
        ("broken", "broken.png cannot be read"),
    ],
)  # fmt: skip
def test_a_mask_that_cannot_be_used_is_one_sentence(form, tmp_path, monkeypatch, name, sentence):
    paths, notes = bad_pictures(tmp_path), []
    start = str(copy_of(paths["alpha"], form))
    monkeypatch.setattr(gr, "Info", notes.append)
    with pytest.raises(gr.Error, match=sentence):
        form.images.take_mask(str(paths[name]), start)
    form.images.take_mask(str(paths["white"]), start)
    assert notes == ["The mask is all white: the whole picture is repainted"]


def test_only_kept_pictures_come_back(form, source):
    start = str(copy_of(source, form))
    kept = form.images.read({"image_start": start, "image_mask": drawn((64, 64), (0, 0, 9, 9))})
    settings, lost = form.images.present({**kept, "image_start": str(source), "seed": 1})
    assert (settings["image_start"], settings["image_mask"]) == ("", "") and settings["seed"] == 1
    assert lost == ["Its picture to start from is not here: choose it again."]
    name = Path(kept["image_mask"]).name  # what the metadata of a picture has
    settings, lost = form.images.present({"image_start": name, "image_guide": "/etc/passwd"})
    assert settings == {"image_start": kept["image_mask"], "image_guide": ""}
    assert lost == ["Its control picture is not here: choose it again."]


def test_the_part_around_the_mask_is_painted_alone(source, tmp_path):
    whole = Image.fromarray(np.random.default_rng(0).integers(0, 255, (300, 420, 3)).astype(np.uint8))
    whole.save(tmp_path / "whole.png")
    mask = Image.new("L", whole.size)
    ImageDraw.Draw(mask).rectangle((300, 200, 339, 239), fill=255)
    mask.save(tmp_path / "mask.png")
    processor, _ = mini.load()
    settings = {
        "prompt": "a red circle", "resolution": "128x128", "num_inference_steps": 1, "guidance_scale": 0,
        "image_start": str(tmp_path / "whole.png"), "image_mask": str(tmp_path / "mask.png"),
        "denoising_strength": 1.0, "mask_expand": 0, "mask_feather": 0, "mask_only": True, "mask_margin": 16,
    }  # fmt: skip
    sizes = []

    def step(number, total, previews):
        sizes.append(previews()[0].size)

    made = processor.generate(
        settings, seeds=[3], on_phase=lambda phase: None, on_step=step, interrupt=lambda: False
    )
    before, after = pixels(whole), pixels(made.images[0])
    changed = (before != after).any(axis=2)
    painted = np.asarray(mask) > 0
    assert not changed[~painted].any() and changed[painted].mean() > 0.9
    assert len(set(sizes)) == 1 and after.shape == (300, 420, 3)


# ---------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def server(shared_server):
    return shared_server


def drop(page, group, path):
    if not page.tab.locator(f"#{group}-drop").is_visible():
        page.tab.locator(f"#{group}-group > button").click()
    page.tab.locator(f"#{group}-drop input[type=file]").set_input_files(path)
    page.tab.wait_for_selector(f"#{'easel' if group == 'image' else 'map'} canvas")


def stroke(page, area, start, end):
    """Paint a line on a canvas; both ends in parts of its size."""
    canvas = page.tab.locator(f"#{area} canvas")
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    (x, y), (to_x, to_y) = (
        (box["x"] + box["width"] * a, box["y"] + box["height"] * b) for a, b in (start, end)
    )
    page.tab.mouse.move(x, y)
    page.tab.mouse.down()
    page.tab.mouse.move(to_x, to_y, steps=4)
    page.tab.mouse.up()


def acted(page, condition, act):
    """Repeat `act`: a control that is just being shown may take its first value back."""
    act()
    page.tab.wait_for_timeout(400)
    page.until(condition, lambda: (act(), page.tab.wait_for_timeout(400)))


def made(page, server, seed=7):
    """The picture that Generate makes now."""
    before = set(server.pictures())
    page.set_number("seed", seed)
    page.set_number("num_inference_steps", 4)
    page.generate()
    new = page.until(lambda: set(server.pictures()) - before)
    page.wait_until_idle()
    [picture] = new
    page.tab.wait_for_selector(f'#viewer img[src$="{picture.name}"]')
    return picture


@pytest.mark.browser
def test_the_strength_says_how_far_a_picture_is_changed(visit, server, source):
    page = visit()
    assert not page.tab.locator("#denoising_strength").is_visible()
    drop(page, "image", source)
    changes = []
    for strength in (0.3, 0.9):
        page.set_number("denoising_strength", strength)
        changes.append(np.abs(pixels(made(page, server)) - pixels(source)).mean())
    assert 0 < changes[0] < changes[1]


@pytest.mark.browser
def test_what_is_not_painted_stays_exactly_as_it_is(visit, server, source):
    page = visit(viewport={"width": 1400, "height": 1000})
    drop(page, "image", source)
    assert not page.tab.locator("#mask_feather").is_visible()
    page.set_number("seed", 7)
    stroke(page, "easel", (0.35, 0.6), (0.65, 0.9))
    assert page.tab.locator("#mask_feather").is_visible()
    assert not page.tab.locator("#mask_margin").is_visible()
    page.tab.get_by_role("button", name="Invert").click()
    page.tab.get_by_role("button", name="Undo").click()
    picture = made(page, server)
    settings = metadata.settings_from(metadata.read(picture))
    painted = pixels(server.folder / ".zgp" / "inputs" / settings["image_mask"])[..., 0] > 0
    assert 0.02 < painted.mean() < 0.2 and painted[96, 64] and not painted[30, 64]
    changed = (pixels(picture) != pixels(source)).any(axis=2)
    assert not changed[~painted].any() and changed[painted].any()
    page.tab.locator("#easel [data-deed=remove]").click()
    page.tab.wait_for_selector("#easel canvas", state="detached")
    page.tab.get_by_role("button", name="Use these settings").click()
    page.tab.wait_for_selector('#easel [data-painted="1"]')
    again = made(page, server)
    assert np.array_equal(pixels(again), pixels(picture))


@pytest.mark.browser
def test_a_picture_is_extended(visit, server, source):
    page = visit()
    drop(page, "image", source)
    page.tab.locator("#extend-group > button").click()
    right = page.tab.locator("#extend-right textarea")
    acted(page, lambda: page.value("outpaint") == "0,0,50%,0", lambda: right.fill("50%"))
    assert page.value("denoising_strength") == "1"
    result = pixels(made(page, server))
    assert result.shape == (128, 192, 3) and np.array_equal(result[:, :128], pixels(source))


@pytest.mark.browser
def test_a_picture_is_enlarged_while_it_is_made_and_afterwards(visit, server):
    page = visit()
    page.tab.locator("#enlarge-group > button").click()
    assert not page.tab.locator("#hires_tile").is_visible()
    shown = page.tab.locator("#hires_tile").is_visible
    acted(page, shown, lambda: page.set_number("hires_scale", 2))
    assert pixels(larger := made(page, server)).shape == (256, 256, 3)
    page.tab.locator("#viewer").get_by_role("button", name="Upscale").click()
    page.tab.wait_for_selector("#upscale-go")
    assert page.value("upscale-prompt").startswith("a red circle")
    before = set(server.pictures())
    page.tab.locator("#upscale-hires_scale input[type=number]").fill("1.5")
    page.tab.locator("#upscale-go").click()
    page.tab.wait_for_selector("#upscale", state="hidden")
    page.tab.wait_for_selector('#viewer img[width="384"]')
    [picture] = set(server.pictures()) - before
    expected = Image.open(larger).resize((384, 384), Image.Resampling.LANCZOS)
    assert np.array_equal(pixels(picture), pixels(expected))


@pytest.mark.browser
def test_control_is_shown_where_it_acts_and_its_map_before_running(visit, models, source):
    if CONTROL not in models.models:
        pytest.skip("the card is not here")
    page = visit(viewport={"width": 1400, "height": 1000})
    assert not page.tab.locator("#control-group").is_visible()
    page.choose_model(label(models.models[CONTROL]))
    page.tab.wait_for_selector("#control-group")
    drop(page, "control", source)
    number = "document.querySelector('#map .zgp-painter')?.dataset.number"  # of each new drawing
    for setting, value in (("canny-high", 900), ("canny-low", 800)):
        shown = page.tab.evaluate(number)
        page.set_number(setting, value)
        page.tab.wait_for_function(f"(shown) => {number} !== shown", arg=shown)
    assert page.value("control_parameters") == "low=800, high=900"
    stroke(page, "map", (0.1, 0.1), (0.9, 0.9))
    assert "|data:image/png;base64," in page.value("image_guide")
    page.tab.locator("#control_preprocessor input").click()
    page.tab.get_by_role("option", name="Depth").click()
    button = page.tab.locator("#preprocessor-fetch")
    button.wait_for()
    assert "MB (Apache-2.0)" in button.inner_text()
    assert "licence" in page.tab.locator("#preprocessor-about").inner_text()
    assert page.value("control_parameters") == "" and page.tab.locator("#depth-detail").is_visible()
    page.choose_model(models.models[MINI].name)
    page.tab.wait_for_selector("#control-group", state="hidden")


@pytest.mark.browser
def test_a_picture_follows_a_drawing_against_its_words(visit, models, server, tmp_path):
    """A black outline on white, uploaded: the edges' shape comes out, filled with the prompt's colour."""
    if MINI_CONTROL not in models.models:
        pytest.skip("the card is not here")
    case = next(one for one in cases(8) if one.shape == "square")
    Image.fromarray(case.picture).save(tmp_path / "drawing.png")
    page = visit()
    page.choose_model(models.models[MINI_CONTROL].name)
    page.tab.wait_for_selector("#control-group")
    drop(page, "control", tmp_path / "drawing.png")
    before = set(server.pictures())
    page.set_number("seed", 3)
    page.generate(case.asked.caption)
    page.tab.wait_for_selector("#cancel")
    page.wait_until_idle()
    [picture] = set(server.pictures()) - before
    verdict = judge(pixels(picture).astype(np.uint8), case)
    assert verdict.overlap > 0.7 and verdict.looks_like == case.shape
    stroke(page, "map", (0.1, 0.1), (0.2, 0.2))
    number = page.tab.evaluate("document.querySelector('#map .zgp-painter').dataset.number")
    page.set_number("canny-high", 300)
    page.tab.wait_for_function(
        "(old) => document.querySelector('#map .zgp-painter')?.dataset.number !== old", arg=number
    )
    assert page.tab.locator("#map .zgp-painter").get_attribute("data-painted") == "1"
    assert "|data:image/png;base64," in page.value("image_guide")


@pytest.mark.browser
def test_a_finished_picture_is_sent_to_the_groups(visit, server):
    page = visit()
    picture = made(page, server)
    page.tab.get_by_role("button", name="Change this picture").click()
    page.tab.wait_for_selector("#easel canvas")
    assert not page.tab.get_by_role("button", name="Use as control").is_visible()
    page.set_number("denoising_strength", 0)
    assert np.array_equal(pixels(made(page, server)), pixels(picture))


@pytest.mark.browser
def test_a_bad_picture_is_one_sentence(visit, tmp_path):
    (tmp_path / "letter.png").write_text("Dear all")
    page = visit()
    page.tab.locator("#image-group > button").click()
    page.tab.locator("#image-drop input[type=file]").set_input_files(tmp_path / "letter.png")
    said = page.tab.locator(".toast-body").inner_text()
    assert "letter.png cannot be read" in said and "Traceback" not in said
    assert page.tab.locator("#easel canvas").count() == 0
    page.complaints.clear()  # Gradio also writes the sentence to the console


@pytest.mark.browser
def test_the_groups_fit_a_phone(visit, models, source):
    page = visit(viewport={"width": 390, "height": 844}, has_touch=True)
    page.choose_model(label(models.models[CONTROL]))
    page.tab.wait_for_selector("#control-group")
    drop(page, "image", source)
    drop(page, "control", source)
    stroke(page, "easel", (0.3, 0.3), (0.6, 0.6))
    page.tab.wait_for_selector("#mask_feather")
    assert not page.scrolls_sideways()
