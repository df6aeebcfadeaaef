"""The page's LoRA group: its parts without a browser, and in a real one with files for the Mini's shapes."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from models.z_image.checkpoints.lora_names import model_names, module_shapes
from shared.gallery.thumbnails import PREVIEW_EDGE, preview_copy
from shared.imaging import metadata
from shared.library.catalog import catalog
from shared.loras.inspection import Verdict
from shared.loras.library import Entry, Library
from shared.loras.presets import Preset
from shared.ui.create import import_settings
from shared.ui.create.lora_list import ROWS, Chosen, chosen_html, list_html, look_up, matches
from shared.ui.create.loras import problem_html
from shared.ui.create.presets import preset_of, with_preset
from tests.support import lora_writers as writers
from tests.support.browser import ROOT, Visit, serve
from tests.support.lora_writers import Style, factors, save, underscored

MINI = "z_image_mini"
EVIL = "<img src=x onerror=alert(1)>"
CONFIG = json.loads((ROOT / "models/z_image/mini/transformer.json").read_text("utf-8"))
SHAPES = {
    name: shape
    for name, shape in module_shapes(CONFIG).items()
    if name.startswith("layers.") and len(shape) == 2
}
TRAINED = factors(SHAPES, rank=4, alpha=8.0)
MODULES = f"{len(SHAPES)} of {len(SHAPES)} modules"

# The page as in tests/support/browser.py, with a LoRA folder of the test: OUTPUTS/../loras/z_image.
_SERVE = """
import sys
from pathlib import Path
from shared.library.catalog import LoraFolders
from shared.engine.configuration import EngineConfig
from shared.engine.engine import Engine
from shared.server.launch import launch
folder = Path(sys.argv[1])
engine = Engine(EngineConfig.at(
    Path.cwd(), output_dir=folder, database=folder / ".zgp" / "zgp.sqlite3",
    lora_folders=LoraFolders(folder.parent / "loras"),
))
engine.start()
try:
    launch(engine, port=int(sys.argv[2]))
except KeyboardInterrupt:
    engine.stop()
"""


def kohya(**metadata: str):
    return Style("lora_unet_", spell=underscored, metadata=metadata, **writers.KOHYA)(TRAINED)


def no_picture(path):
    return ""


@pytest.fixture
def library(tmp_path):
    return Library(tmp_path, model_names(CONFIG))


# ---------------------------------------------------------------- without a browser


def test_every_word_of_a_search_must_be_in_the_name():
    assert matches("Styles/Ink Wash.safetensors", "wash INK") and matches("a", "")
    assert not matches("Styles/Ink Wash.safetensors", "ink oil")


def test_a_badge_says_how_much_of_a_file_is_used(library, tmp_path):
    more = {**TRAINED, "layers.0.attention.to_z": TRAINED["layers.0.attention.to_q"]}
    save(tmp_path / "all.safetensors", kohya())
    save(tmp_path / "some.safetensors", Style("diffusion_model.")(more))
    (tmp_path / "none.safetensors").write_bytes(b"nonsense" * 10)
    rows = list_html(library, library.entries(), ["all.safetensors"], "", no_picture).split("<li>")[1:]
    good, bad, partly = rows
    assert f'zgp-good">{MODULES}</b> <span>kohya, rank 4, alpha 8' in good and 'aria-pressed="true"' in good
    assert f'zgp-partly">{len(SHAPES)} of {len(SHAPES) + 1} modules' in partly
    assert 'aria-pressed="false"' in partly
    assert "zgp-bad" in bad and "none.safetensors" in bad and "<button" not in bad


def test_a_long_list_draws_some_rows_and_says_so(tmp_path):
    files = [Entry(f"cat {i}.safetensors", tmp_path, 1, None) for i in range(500)]
    library = SimpleNamespace(folder=tmp_path, verdict=lambda path: Verdict(matched=1, total=1))
    html = list_html(library, files, [], "", no_picture)
    assert html.count("<li>") == ROWS and f"500 files; the first {ROWS} are shown" in html
    html = list_html(library, files, [], "cat 49", no_picture)
    assert html.count("<li>") == 15 and "15 of 500 files<" in html
    assert str(tmp_path) in list_html(library, [], [], "", no_picture)


def test_nothing_from_a_file_becomes_html():
    verdict = Verdict(
        matched=1, total=1, flavour=EVIL, base_model=EVIL, trigger_words=(EVIL, '" onclick="alert(1)')
    )
    chosen = Chosen(f"{EVIL}.safetensors", f'{EVIL}/"{EVIL}.safetensors', verdict)
    html = chosen_html([chosen, Chosen(EVIL, EVIL, None, problem=EVIL)], f"1 {EVIL.split()[0]}", no_picture)
    assert "<img" not in html and 'onclick="' not in html


def test_a_chosen_file_that_is_gone_says_where_it_was_sought(library, tmp_path):
    gone, coming, outside = look_up(
        library, ["gone.safetensors", "https://h.example/a.safetensors|styles", "../x.safetensors"], []
    )
    assert str(tmp_path) in gone.problem and outside.problem
    assert (coming.name, coming.verdict, coming.problem) == ("styles/a.safetensors", None, "")


def test_a_schedule_takes_the_place_of_the_slider():
    names = [Chosen(name, name, None) for name in "abcd"]
    first, second, third, fourth = chosen_html(names, "0.50 1,0 x # 3", no_picture).split("<li")[1:]
    assert 'type="range"' in first and 'value="0.5"' in first
    assert "Schedule <code>1,0</code>" in second and "range" not in second
    assert "Cannot be read: <code>x</code>" in third and 'value="1"' in fourth


def test_strengths_are_judged_where_they_are_written():
    assert "column 3" in problem_html("1 x", 2) and "^" in problem_html("1 x", 2)
    assert "2 numbers more" in problem_html("1 1 1", 1)
    assert problem_html("1 0.5,1", 2) == "" and problem_html("x", 0) == ""


def test_a_preset_leaves_a_profiles_loras_in_front():
    form = {"activated_loras": ["fast", "old"], "loras_multipliers": "0.8|1", "num_inference_steps": 4}
    found = with_preset(Preset(("ink",), "0.5", {"prompt": "# note"}, full_prompt=False), form)
    assert found == {"activated_loras": ["fast", "ink"], "loras_multipliers": "0.8|0.5"}
    kept = preset_of({**form, "seed": 5, "prompt": "a"}, whole=True)
    assert (kept.loras, kept.multipliers) == (("old",), "1")
    assert kept.settings == {"num_inference_steps": 4, "prompt": "a"}


def test_a_preview_is_served_as_a_small_copy_that_follows_its_file(tmp_path):
    preview = tmp_path / "a.png"
    Image.new("RGB", (900, 300), "red").save(preview)
    copy = preview_copy(preview, tmp_path / "copies")
    assert copy and copy.parent == tmp_path / "copies"
    with Image.open(copy) as image:
        assert max(image.size) == PREVIEW_EDGE
    Image.new("RGB", (600, 300), "blue").save(preview)
    assert preview_copy(preview, tmp_path / "copies") != copy
    preview.write_bytes(b"no picture")
    assert preview_copy(preview, tmp_path / "copies") is None


def test_a_picture_whose_lora_is_gone_still_fills_the_form():
    made = {
        "model_type": MINI,
        "prompt": "a",
        "resolution": "128x128",
        "activated_loras": ["gone.safetensors"],
    }
    found = import_settings.from_metadata(made, "a.png", catalog(ROOT, ROOT / "ckpts"), MINI)
    assert found.settings["activated_loras"] == ["gone.safetensors"]
    assert found.settings["loras_optional"] is False
    assert any("gone.safetensors" in line for line in found.report)


# ---------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The LoRA folder: a file that fits, with a preview, one for another model and a hostile one."""
    found = tmp_path_factory.mktemp("page") / "loras" / "z_image"
    (found / "styles").mkdir(parents=True)
    save(found / "styles" / "ink.safetensors", kohya(**{"modelspec.trigger_phrase": "inkwash, thin lines"}))
    Image.new("RGB", (300, 300), "teal").save(found / "styles" / "ink.png")
    big = torch.zeros(4, 3840), torch.zeros(3840, 4), 4.0
    save(found / "big.safetensors", Style("diffusion_model.")({"layers.0.attention.to_q": big}))
    hostile = {"modelspec.trigger_phrase": EVIL, "ss_base_model_version": EVIL}
    save(found / f"{EVIL}.safetensors", kohya(**hostile))
    return found


@pytest.fixture(scope="module")
def server(folder):
    if not catalog(ROOT, ROOT / "ckpts").models[MINI].available:
        pytest.skip("the Mini models' weights are not here")
    with serve(folder.parents[1] / "outputs", _SERVE) as running:
        yield running


class LoraVisit(Visit):
    """A tab with the LoRA group open."""

    def __init__(self, browser, url, **options):
        super().__init__(browser, url, **options)
        self.tab.on("dialog", self._refuse)
        self.tab.locator("#loras > button").click()
        self.tab.wait_for_selector(".zgp-file")

    def _refuse(self, dialog):
        self.complaints.append(dialog.message)
        dialog.dismiss()

    def file(self, name):
        return self.tab.locator("#lora-files .zgp-file").filter(has_text=name)

    def rows(self, count):
        self.tab.wait_for_function(
            "(count) => document.querySelectorAll('#lora-rows li').length === count", arg=count
        )
        return self.tab.locator("#lora-rows li")

    def choose(self, name):
        before = self.tab.locator("#lora-rows li").count()
        self.file(name).click()
        return self.rows(before + 1).last

    def set_strength(self, row, value):
        self.rows(row + 1).nth(row).locator("input[type=number]").fill(str(value))

    def choose_preset(self, name):
        """Choose and apply it."""
        if not self.tab.locator("#preset input").is_visible():
            self.tab.locator("#presets > button").click()
        self.tab.locator("#preset input").click()
        self.tab.get_by_role("option", name=name, exact=True).click()
        self.tab.locator("#apply-preset").click()

    def wait_for_text(self, selector, text):
        self.tab.locator(selector).get_by_text(text).first.wait_for()

    def wait_for_value(self, setting, value):
        self.tab.wait_for_function(
            f"(value) => document.querySelector('#{setting} :is(input, textarea)').value === value", arg=value
        )

    def picture(self, server):
        """Make one with seed 5: (its pixels, its settings)."""
        before = len(server.pictures())
        self.set_number("seed", 5)
        self.set_number("num_inference_steps", 2)
        self.generate()
        self.until(lambda: len(server.pictures()) > before)
        self.wait_until_idle()
        newest = max(server.pictures(), key=lambda path: path.stat().st_mtime_ns)
        with Image.open(newest) as image:
            return image.tobytes(), metadata.settings_from(metadata.read(newest))


VISIT = LoraVisit


@pytest.mark.browser
def test_files_are_found_judged_and_chosen(visit):
    page = visit()
    assert page.file("ink").locator(".zgp-good").inner_text() == MODULES
    page.tab.wait_for_function("document.querySelector('#lora-files img').naturalWidth > 0")
    refused = page.file("big")
    assert "3840" in refused.inner_text() and "zgp-refused" in refused.get_attribute("class")
    refused.click()
    page.tab.locator("#lora-search input").fill("INK styles")
    page.tab.wait_for_function("document.querySelectorAll('#lora-files li').length === 1")
    row = page.choose("ink")
    assert "styles/ink" in row.inner_text()
    page.tab.wait_for_selector("#lora-files [aria-pressed=true]")
    assert page.tab.locator("#loras > button").inner_text().startswith("LoRAs (1 chosen)")
    row.get_by_label("Remove").click()
    page.rows(0)
    page.tab.wait_for_selector("#lora-files [aria-pressed=false]")


@pytest.mark.browser
def test_a_hostile_name_is_only_text(visit):
    page = visit()
    row = page.choose("onerror")
    assert row.inner_text().count(EVIL) == 3  # name, base model, trigger word
    row.locator(".zgp-word").click()
    page.wait_for_value("prompt", EVIL)
    assert page.tab.locator("#loras img[src=x]").count() == 0


@pytest.mark.browser
def test_a_strength_changes_the_picture_and_comes_back_with_it(visit, server):
    page = visit()
    plain, _ = page.picture(server)
    page.choose("ink")
    page.set_strength(0, 0)
    assert page.picture(server)[0] == plain
    page.tab.locator("#lora-rows input[type=range]").fill("0.8")
    assert page.tab.locator("#lora-rows input[type=number]").input_value() == "0.8"
    changed, settings = page.picture(server)
    assert changed != plain
    assert (
        settings["activated_loras"] == ["styles/ink.safetensors"] and settings["loras_multipliers"] == "0.8"
    )
    page.tab.locator("#lora-rows").get_by_label("Remove").click()
    page.rows(0)
    page.tab.get_by_role("button", name="Use these settings").click()
    row = page.rows(1).first
    assert row.locator("input[type=number]").input_value() == "0.8"
    assert page.picture(server)[0] == changed


@pytest.mark.browser
def test_a_trigger_word_goes_into_the_prompt_once(visit):
    page = visit()
    page.tab.locator("#prompt textarea").fill("a red circle")
    row = page.choose("ink")
    for word in ("thin lines", "thin lines", "inkwash"):
        row.locator(".zgp-word").filter(has_text=word).click()
    page.wait_for_value("prompt", "a red circle, thin lines, inkwash")


@pytest.mark.browser
def test_text_and_sliders_agree_and_a_mistake_is_shown_at_the_spot(visit):
    page = visit()
    page.choose("ink")
    page.choose("onerror")
    page.set_strength(1, 0.25)
    page.tab.locator("#lora-as-text input").check()
    page.wait_for_value("loras_multipliers", "1 0.25")
    page.tab.locator("#loras_multipliers").locator("input, textarea").fill("1,0.5 0.3 # slower")
    page.wait_for_text("#lora-rows", "Schedule")
    page.tab.wait_for_function("document.querySelector('#lora-rows input[type=number]').value === '0.3'")
    page.tab.locator("#lora-rows").get_by_label("Remove").last.click()
    page.wait_for_value("loras_multipliers", "1,0.5 # slower")
    page.tab.get_by_role("button", name="Use one strength").click()
    page.wait_for_value("loras_multipliers", "1 # slower")
    page.choose("onerror")
    page.set_strength(1, -0.5)
    page.wait_for_value("loras_multipliers", "1 # slower\n-0.5")
    page.tab.locator("#loras_multipliers").locator("input, textarea").fill("1 x")
    page.wait_for_text("#lora-problem", "is not a number")
    page.generate()
    assert "is not a number" in page.tab.locator(".toast-body").inner_text()
    page.complaints.clear()  # Gradio also writes the sentence to the console


@pytest.mark.browser
def test_refresh_finds_new_files_and_an_address_waits_for_its_job(visit, folder):
    page = visit()
    new = save(folder / "fresh.safetensors", kohya())
    assert page.file("fresh").count() == 0
    page.tab.locator("#lora-refresh").click()
    row_of_new = page.file("fresh")
    row_of_new.wait_for()
    page.choose("fresh")
    new.unlink()
    page.tab.locator("#lora-refresh").click()
    page.wait_for_text("#lora-rows", "put it there or remove it here")
    page.tab.locator("#lora-address input").fill("https://h.example/files/far.safetensors|styles")
    page.tab.locator("#lora-add").click()
    assert "fetched with the next picture" in page.rows(2).last.inner_text()
    page.generate()
    assert "fresh.safetensors" in page.tab.locator(".toast-body").inner_text()
    page.complaints.clear()


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_group_fits_a_phone(visit, scheme):
    page = visit(viewport={"width": 390, "height": 844}, color_scheme=scheme)
    page.choose("ink")
    page.choose("onerror")
    page.tab.locator("#lora-as-text input").check()
    assert not page.scrolls_sideways()
    cut = """[...document.querySelectorAll('#loras :is(p, button, b, input)')]
        .filter((e) => e.offsetWidth && e.scrollWidth > e.clientWidth + 2).map((e) => e.outerHTML)"""
    assert page.tab.evaluate(cut) == []


@pytest.mark.browser
def test_a_preset_is_saved_and_applied(visit, folder):
    page = visit()
    page.choose("ink")
    page.set_strength(0, 0.4)
    page.set_number("num_inference_steps", 3)
    page.tab.locator("#presets > button").click()
    for name, whole in (("../mine", False), ("mine", False), ("all of it", True)):
        page.tab.locator("#preset-name input").fill(name)
        page.tab.locator("#preset-whole input").set_checked(whole)
        page.tab.locator("#save-preset").click()
        if name == "mine":
            page.wait_for_text("#notice", "mine.lset")
    page.wait_for_text("#notice", "all of it.json")
    assert "is no name for a preset" in page.tab.locator(".toast-body").inner_text()
    page.complaints.clear()
    assert not list(folder.parent.glob("*.lset"))
    assert json.loads((folder / "mine.lset").read_text("utf-8")) == {
        "loras": ["styles/ink.safetensors"], "loras_mult": "0.4", "prompt": "", "full_prompt": False,
    }  # fmt: skip
    page = visit()
    page.tab.locator("#prompt textarea").fill("my own words")
    page.choose_preset("mine (yours)")
    page.wait_for_text("#preset-about", "LoRAs: none → styles/ink.safetensors")
    assert page.rows(1).first.locator("input[type=number]").input_value() == "0.4"
    assert (page.value("prompt"), page.value("num_inference_steps")) == ("my own words", "8")
    page.choose_preset("all of it (yours)")
    page.wait_for_text("#preset-about", "Steps: 8 → 3")
    page.choose_preset("Turbo draft")
    page.wait_for_text("#preset-about", "Steps: 3 → 4")
    page.tab.locator("#apply-preset").click()
    page.wait_for_text("#preset-about", "It changes nothing")
