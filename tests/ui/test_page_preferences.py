"""Saved defaults, presets, the tab "Settings" and the locks, on a real page with the Mini models."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest

from shared import config as config_file
from shared.imaging import metadata
from tests.support.browser import Visit, serve, visits

pytestmark = pytest.mark.browser

PROMPT = "a red circle above a blue square on a yellow background"
SERVE = """
import sys
from pathlib import Path
from shared.cli.main import main
folder = Path(sys.argv[1])
flags = ["--server-port", sys.argv[2], "--config", str(folder / "config")]
flags += ["--settings", str(folder / "settings"), "--lora-dir-z-image", str(folder / "loras"), *{flags}]
sys.exit(main(flags, output_dir=folder, database=folder / ".zgp" / "zgp.sqlite3"))
"""


def script(*flags: str) -> str:
    return SERVE.replace("{flags}", json.dumps(flags))


class Page(Visit):
    def open_settings(self):
        self.tab.get_by_role("tab", name="Settings").click()
        self.tab.wait_for_selector("#preferences form")

    def open_presets(self):
        self.tab.locator("#presets > button").click()
        self.tab.wait_for_selector("#preset-acts button")

    def act(self, name, area="#preferences"):
        self.tab.locator(f"{area} button[data-act={name}]").click()

    def act_twice(self, name, area="#preferences"):
        """Of the buttons that ask first, and take it back soon."""
        self.tab.locator(f"{area} button[data-act={name}]").dblclick()

    def told(self, words, area="#notice"):
        self.tab.locator(area).get_by_text(words).first.wait_for(state="visible")

    def wait_for_value(self, setting, value):
        box = f"document.querySelector('#{setting} input, #{setting} textarea')?.value"
        self.tab.wait_for_function(f"{box} === {json.dumps(value)}")


VISIT = Page


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with serve(tmp_path_factory.mktemp("page") / "outputs", script()) as running:
        yield running


def test_defaults_are_saved_shown_again_and_forgotten(visit, server):
    file = server.folder / "settings" / "z_image_mini_settings.json"
    page = visit()
    page.set_number("num_inference_steps", 5)
    page.open_presets()
    page.act("keep", "#preset-acts")
    page.told("Steps: 8 → 5")
    assert json.loads(file.read_text()) == {"num_inference_steps": 5}
    page.reload()
    page.wait_for_value("num_inference_steps", "5")
    page.open_presets()
    page.act_twice("factory", "#preset-acts")
    page.wait_for_value("num_inference_steps", "8")
    page.told("has its factory defaults")
    assert [path.name.startswith(f"{file.name}.before-") for path in file.parent.iterdir()] == [True]


def test_presets_are_replaced_renamed_and_deleted(visit, server):
    page, folder = visit(), server.folder / "loras"
    page.open_presets()

    def save():
        page.tab.locator("#preset-name input").fill("mine")
        page.tab.locator("#save-preset").click()

    page.tab.locator("#preset-whole input").set_checked(True)
    save()
    page.told("Saved as")
    page.set_number("num_inference_steps", 6)
    save()
    page.told("There is already a preset mine.json.", "#preset-about")
    assert json.loads((folder / "mine.json").read_text())["num_inference_steps"] == 8
    page.act("replace", "#preset-about")
    page.tab.wait_for_selector("#preset-about button", state="detached")
    assert json.loads((folder / "mine.json").read_text())["num_inference_steps"] == 6
    page.tab.locator("#preset-name input").fill("other name")
    page.act("rename", "#preset-acts")
    page.told("'mine' is now 'other name'.", "#preset-about")
    assert [path.name for path in folder.iterdir()] == ["other name.json"]
    page.act_twice("remove", "#preset-acts")
    page.told("Deleted 'other name'.", "#preset-about")
    assert list(folder.iterdir()) == []


def test_settings_are_saved_and_act_after_a_restart_of_the_worker(visit, server):
    page = visit()
    page.open_settings()
    page.tab.locator("#preferences input[name=output_filename]").fill("{sed}")
    page.act("save")
    page.tab.locator(".toast-body").get_by_text("there is no {sed}").wait_for()
    page.tab.locator("#preferences input[name=output_filename]").fill("{model}/{steps} {prompt(5)}")
    page.tab.locator("#preferences select[name=metadata_type]").select_option("none")
    page.tab.locator("#preferences select[name=zgp-done]").select_option("sound")
    page.act("save")
    page.told("Restart the worker", "#preferences")
    saved = json.loads((server.folder / "config" / config_file.FILE).read_text())
    assert (saved["output_filename"], saved["metadata_type"]) == ("{model}/{steps} {prompt(5)}", "none")
    page.act("restart")
    page.told("The worker starts again", "#preferences")
    page.tab.get_by_role("tab", name="Create").click()
    page.generate(PROMPT)
    page.tab.wait_for_selector("#viewer img")
    [picture] = server.pictures()
    assert picture == server.folder / "z_image_mini" / "8 a_red.png" and metadata.read(picture) is None
    page.tab.wait_for_function("document.body.dataset.zgpDone === 'sound'")
    page.open_settings()
    page.act_twice("everything")
    page.told("Everything is as at the first start.", "#preferences")
    assert not (server.folder / "config" / config_file.FILE).exists()
    assert page.tab.locator("#preferences select[name=metadata_type]").input_value() == "metadata"
    page.tab.locator("#preferences summary").last.click()
    assert "torch " in page.tab.locator("#preferences pre").last.inner_text()


def test_prompt_model_and_colours_survive_a_reload(visit):
    page = visit(viewport={"width": 390, "height": 844}, color_scheme="light")
    page.choose_model("Z-Image Mini Base")
    page.wait_for_value("num_inference_steps", "30")
    page.tab.locator("#prompt textarea").fill("<b>kept</b>")
    page.open_settings()
    assert not page.scrolls_sideways()
    page.tab.locator("#preferences select[name=zgp-theme]").select_option("dark")
    page.tab.wait_for_selector("body.dark")
    page.tab.wait_for_timeout(1000)  # a request that a reload cuts off would be a complaint of the browser
    page.reload()
    page.tab.wait_for_selector("body.dark")
    page.wait_for_value("prompt", "<b>kept</b>")
    page.wait_for_value("model_type", "Z-Image Mini Base")
    page.wait_for_value("num_inference_steps", "30")
    page.tab.wait_for_timeout(1000)


def test_a_locked_page_changes_nothing(browser, tmp_path: Path):
    flags = script("--lock-config", "--lock-model", "--advanced")
    with serve(tmp_path / "outputs", flags) as locked, visits(
        functools.partial(Page, browser, locked.url)
    ) as open_page:  # fmt: skip
        page = open_page()
        assert page.tab.locator("#guidance_scale, #image_format").first.is_visible()  # --advanced
        page.open_presets()
        assert page.tab.locator("#preset-acts button").count() == 2
        page.tab.locator("#model_type input").click()
        assert page.tab.get_by_role("option").count() == 1
        page.tab.keyboard.press("Escape")
        page.open_settings()
        page.told("These settings are locked", "#preferences")
        assert page.tab.locator("#preferences button[data-act=save]").is_disabled()
        page.tab.evaluate("document.querySelectorAll('fieldset').forEach((one) => { one.disabled = false; })")
        page.tab.locator("#preferences input[name=loras_root]").fill("elsewhere")
        page.act("save")
        page.tab.locator(".toast-body").get_by_text("are locked").wait_for()
        file = locked.folder / "config" / config_file.FILE
        assert json.loads(file.read_text())["loras_root"] == "loras"
