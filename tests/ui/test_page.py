"""The page in a real browser, on a real server with the Mini models; and its parts that need neither."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import pytest

from shared.errors import UserError
from shared.imaging import metadata
from shared.jobs.records import Job
from shared.settings.table import SETTINGS
from shared.ui.components.notice import notice_html
from shared.ui.components.queue_state import Sight
from shared.ui.components.text import duration_text, settings_line, size_text
from shared.ui.create import import_settings
from shared.ui.create.form import label
from shared.ui.create.queue.preview import queue_text, stage_html, status_text
from shared.ui.create.schedule_plot import problem_html, time_grid_html
from tests.support.browser import ROOT, free_port

MINI, BASE, TWIN = "z_image_mini", "z_image_mini_base", "z_image_mini_twinflow"
PROMPT = "a red circle above a blue square on a yellow background"
HEAVY = ("torch", "transformers", "diffusers", "mmgp")


# ---------------------------------------------------------------- without a browser


def a_job(**changes) -> Job:
    values = dict(
        id=1, status="running", settings={"resolution": "1024x512"}, source="ui", output_dir=None, attempts=1,
        phase="Denoising", step=3, steps=8, seconds_left=2.4, error=None,
    )  # fmt: skip
    return Job(**{**values, **changes})


def test_numbers_are_written_for_people():
    assert (size_text(20.5e9), size_text(1500), size_text(3)) == ("20.5 GB", "1.5 kB", "3 bytes")
    assert [duration_text(s) for s in (2.4, 61, 7500)] == ["2 s", "1 min 1 s", "2 h 5 min"]
    made = {"num_inference_steps": 1, "guidance_scale": 4.0}
    assert settings_line(made, "Mini", 7, 128, 64) == "Mini · 128 × 64 · 1 step · seed 7 · guidance 4"


@pytest.mark.parametrize(
    "changes, said",
    [
        ({}, "Denoising · step 3 of 8"),
        ({"status": "queued"}, "Waiting for its turn"),
        ({"phase": "", "steps": 0}, "Starting"),
        ({"phase": "Decoding", "steps": 0}, "Decoding"),
        ({"phase": "Downloading a.safetensors", "step": 10**9, "steps": 2 * 10**9},
         "Downloading a.safetensors · 1.0 GB of 2.0 GB"),
    ],
)  # fmt: skip
def test_status_names_phase_and_step(changes, said):
    assert status_text(a_job(**changes)) == said


def test_stage_shows_preview_progress_and_queue():
    html = stage_html(Sight(9, [a_job(), a_job(id=2, status="queued")], b"jpeg", []))
    assert 'src="data:image/jpeg;base64,anBlZw=="' in html
    assert 'aria-valuenow="38"' in html and "about 2 s left" in html and "1 more job in the queue" in html
    assert queue_text(Sight(9, [a_job()], None, [])) == ""


def test_a_model_to_download_says_so():
    model = SimpleNamespace(name="Big", available=False)
    assert label(model) == "Big (to download)"


def test_stage_keeps_the_shape_of_the_picture_before_the_first_preview():
    assert "aspect-ratio: 1024 / 512" in stage_html(Sight(9, [a_job()], None, []))


def test_the_time_grid_has_a_point_for_each_level_and_is_named_for_those_who_do_not_see_it():
    html = time_grid_html([0.999, 0.6, 0.0])
    assert html.count("<circle") == 3 and 'aria-label="Noise level at each step: 0.999, 0.6, 0"' in html
    assert "<text" in html and time_grid_html([1 - i / 50 for i in range(51)]).count("<circle") == 51
    assert "<b>" not in problem_html("<b>")


def test_texts_from_files_are_never_html():
    assert "<img" not in notice_html(["<img src=x onerror=alert(1)>"])
    assert "<b>" not in stage_html(Sight(1, [a_job(phase="<b>")], None, []))


def test_the_page_process_imports_no_torch(tmp_path):
    code = f"""
import sys
from pathlib import Path
from shared.engine.configuration import EngineConfig
from shared.engine.engine import Engine
from shared.ui.app import build
import shared.server.launch
folder = Path({str(tmp_path)!r})
build(Engine(EngineConfig.at(Path.cwd(), output_dir=folder, database=folder / ".zgp" / "zgp.sqlite3")))
print([name for name in {HEAVY!r} if name in sys.modules])
"""
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip().splitlines()[-1] == "[]"


# ---------------------------------------------------------------- settings out of a picture


def made_with(**settings) -> dict:
    complete = {"model_type": MINI, "prompt": PROMPT, "resolution": "128x128", **settings}
    return metadata.build(
        complete, seed=5, index=0, model_name="Mini", model_files={}, notes=[], extra={}
    )  # fmt: skip


def test_recall_gives_the_settings_back(models):
    found = import_settings.from_metadata(made_with(num_inference_steps=5), "a.png", models, MINI)
    assert found.settings["num_inference_steps"] == 5 and found.settings["seed"] == 5
    assert found.report == ["The form now has the settings of a.png."]


def test_recall_says_what_it_left_out(models):
    metadata = made_with(model_type="gone", video_length=81)
    found = import_settings.from_metadata(metadata, "a.png", models, MINI)
    assert found.settings["model_type"] == MINI
    assert any("'gone'" in line for line in found.report)
    assert any("video_length" in line for line in found.report)


def test_recall_names_a_picture_without_settings(models, tmp_path):
    from PIL import Image

    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    with pytest.raises(UserError, match="plain.png holds no settings"):
        import_settings.from_file(tmp_path / "plain.png", "plain.png", models, MINI)


# ---------------------------------------------------------------- in a browser


@pytest.mark.browser
def test_first_visit_makes_a_picture(visit, server, models):
    page = visit()
    assert page.tab.locator("#welcome").is_visible()
    assert page.value("model_type") == models.models[MINI].name
    page.tab.get_by_role("button", name=PROMPT).click()
    page.tab.wait_for_function(f"document.querySelector('#prompt textarea').value === {json.dumps(PROMPT)}")
    page.tab.locator("#prompt textarea").press("Control+Enter")
    page.tab.wait_for_selector("#viewer img")
    page.tab.wait_for_function("document.querySelector('#viewer .zgp-canvas img').naturalWidth === 128")
    [picture] = server.pictures()
    assert metadata.read(picture)["prompt"] == PROMPT
    assert "seed" in page.tab.locator("#viewer .zgp-line").inner_text()
    assert not page.tab.locator("#welcome").is_visible()
    assert page.tab.locator("#recent .zgp-tile").count() == 1


@pytest.mark.browser
def test_wrong_size_is_one_sentence(visit, server):
    page, before = visit(), len(server.pictures())
    box = page.tab.locator("#resolution input")
    box.fill("100x100")
    box.press("Enter")
    page.generate()
    said = page.tab.locator(".toast-body").inner_text()
    assert "100x100" in said and "96x96" in said and "Traceback" not in said
    page.tab.locator(".toast-close").first.click()
    page.tab.wait_for_selector(".toast-body", state="detached")
    assert len(server.pictures()) == before
    page.complaints.clear()  # Gradio also writes the sentence to the console


@pytest.mark.browser
@pytest.mark.parametrize("model_id", [BASE, MINI, TWIN])
def test_controls_are_visible_where_they_act(visit, models, model_id):
    model, page = models.models[model_id], visit()
    page.choose_model(label(models.models[BASE if model_id == MINI else MINI]))
    page.choose_model(label(model))
    page.tab.wait_for_function(
        "(text) => document.querySelector('#about').innerText.includes(text)", arg=model.description
    )
    page.tab.locator("#advanced button").first.click()
    page.tab.wait_for_selector("#image_format", state="visible")
    shown = [name for name in SETTINGS if page.tab.locator(f"#{name}").is_visible()]
    acting = [name for name in SETTINGS if name in model.settings]
    folded = ("loras", "pictures", "prompt", "hires")
    assert shown == [name for name in acting if SETTINGS[name].group not in folded]
    assert page.tab.locator("#enlarge-group").is_visible() == ("hires_scale" in model.settings)
    assert page.tab.locator("#image-group").is_visible() == ("image_start" in model.settings)
    assert page.tab.locator("#control-group").is_visible() == ("image_guide" in model.settings)
    assert page.tab.locator("#loras").is_visible() == ("activated_loras" in model.settings)
    assert page.tab.locator("#enlarge-group").is_visible() == ("hires_scale" in model.settings)
    assert page.value("num_inference_steps") == str(model.defaults["num_inference_steps"])
    assert page.tab.locator("#live").is_visible() == (model_id == TWIN)
    assert page.tab.locator("#time-grid svg").is_visible() == (model_id == TWIN)


@pytest.mark.browser
def test_the_time_grid_follows_its_controls_and_says_what_is_out_of_range(visit, models):
    page = visit()
    page.choose_model(label(models.models[TWIN]))
    page.tab.wait_for_selector("#live", state="visible")
    page.tab.locator("#advanced button").first.click()
    shown = "(levels) => document.querySelector('#time-grid svg')?.ariaLabel.endsWith(levels)"
    page.tab.wait_for_function(shown, arg=": 0.999, 0.6, 0")
    page.set_number("num_inference_steps", 4)
    page.tab.wait_for_function(shown, arg=": 0.999, 0.833, 0.666, 0.5, 0")
    page.tab.locator("#rfba_gap_steps input, #rfba_gap_steps textarea").fill("0.2,0.2")
    page.tab.wait_for_function(shown, arg=": 0.8, 0.6, 0.4, 0.2, 0")
    page.tab.locator("#time_dist_ctrl input, #time_dist_ctrl textarea").fill("2,1,1")
    page.tab.wait_for_function(shown, arg=": 0.96, 0.84, 0.64, 0.36, 0")
    page.tab.locator("#stochast_ratio input, #stochast_ratio textarea").fill("abc")
    page.tab.wait_for_selector("#time-grid .zgp-grid-problem")
    assert "from 0 to 2, or SDE" in page.tab.locator("#time-grid").inner_text()
    page.generate()
    assert "from 0 to 2, or SDE" in page.tab.locator(".toast-body").inner_text()
    page.complaints.clear()


@pytest.mark.browser
def test_redrawing_while_typing_draws_the_newest_prompt(visit, models, server):
    if not models.models[TWIN].available:
        pytest.skip("the Mini TwinFlow's weights are not here")
    page, before = visit(), len(server.pictures())
    page.choose_model(label(models.models[TWIN]))
    page.tab.locator("#live input").check()
    text = "a red circle on a white background"
    page.tab.locator("#prompt textarea").press_sequentially(text, delay=20)
    page.tab.locator("#viewer").get_by_text(text, exact=True).wait_for()
    page.wait_until_idle()
    made = [metadata.read(path)["prompt"] for path in server.pictures()[before:]]
    assert text in made and len(made) < 10
    assert page.tab.locator("#notice .zgp-notice").count() == 0
    pasted = "a blue star on a yellow background"
    page.tab.locator("#prompt textarea").fill(pasted)
    page.tab.locator("#viewer").get_by_text(pasted, exact=True).wait_for()


@pytest.mark.browser
def test_dropped_picture_fills_the_form(visit, models, tmp_path):
    from PIL import Image

    meta = made_with(model_type=BASE, num_inference_steps=7, guidance_scale=3.5, video_length=81)
    Image.new("RGB", (8, 8)).save(tmp_path / "made.png", pnginfo=metadata.png_chunks(meta))
    page = visit()
    page.tab.locator("#drop input[type=file]").set_input_files(tmp_path / "made.png")
    notice = page.tab.locator("#notice .zgp-notice")
    notice.wait_for()
    assert "made.png" in notice.inner_text() and "video_length" in notice.inner_text()
    page.tab.wait_for_function(f"document.querySelector('#prompt textarea').value === {json.dumps(PROMPT)}")
    assert page.value("model_type") == models.models[BASE].name
    assert (page.value("num_inference_steps"), page.value("seed")) == ("7", "5")
    assert page.tab.locator("#negative_prompt").is_visible()
    page.tab.locator(".zgp-close").click()
    notice.wait_for(state="detached")


@pytest.mark.browser
def test_a_picture_without_settings_is_refused(visit, tmp_path):
    from PIL import Image

    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    page = visit()
    page.tab.locator("#drop input[type=file]").set_input_files(tmp_path / "plain.png")
    page.tab.locator("#notice").get_by_text("plain.png holds no settings").wait_for()


@pytest.mark.browser
def test_batch_is_shown_and_its_settings_come_back(visit):
    page = visit()
    page.set_number("batch_size", 3)
    page.set_number("seed", 41)
    page.generate("a large green star on a white background")
    page.tab.wait_for_selector("#viewer .zgp-strip")
    page.wait_until_idle()
    tiles = page.tab.locator("#viewer .zgp-strip .zgp-tile")
    assert tiles.count() == 3
    tiles.nth(2).click()
    page.tab.wait_for_function("document.querySelector('#viewer .zgp-line').innerText.includes('seed 43')")
    page.tab.locator("#prompt textarea").fill("something else")
    page.tab.get_by_role("button", name="Use these settings").click()
    page.tab.wait_for_function("document.querySelector('#seed input').value === '43'")
    assert page.value("prompt") == "a large green star on a white background"
    assert page.value("batch_size") == "1"
    page.tab.locator("#random-seed").click()
    page.tab.wait_for_function("document.querySelector('#seed input').value === '-1'")
    page.tab.locator("#last-seed").click()
    page.tab.wait_for_function("document.querySelector('#seed input').value === '41'")


@pytest.mark.browser
def test_running_job_survives_a_reload_and_is_cancelled(visit, models):
    page = visit()
    page.choose_model(models.models[BASE].name)
    page.tab.locator("#about").get_by_text(models.models[BASE].description).wait_for()  # the form is filled
    page.set_number("num_inference_steps", 100)
    page.set_number("batch_size", 16)
    page.generate()
    page.tab.wait_for_function("document.querySelector('#generate').innerText.trim() === 'Add to queue'")
    page.tab.locator("#generate").click()
    page.tab.wait_for_selector("text=1 more job in the queue")
    page.tab.reload()
    page.complaints.clear()  # Gradio writes that the stream it was reading has ended
    page.tab.wait_for_selector("#stage [role=progressbar]")
    page.tab.wait_for_selector("#stage img")
    second = visit()
    second.tab.wait_for_selector("#stage [role=progressbar]")
    for _ in range(2):
        waiting = page.tab.locator("#stage .zgp-queue").inner_text()
        page.tab.locator("#cancel").click()
        page.tab.wait_for_function(
            "(before) => document.querySelector('#stage .zgp-queue')?.innerText !== before", arg=waiting
        )
    page.wait_until_idle()
    second.wait_until_idle()
    assert "Cancelled" in page.tab.locator("#notice").inner_text()


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_fits_a_phone(visit, scheme):
    page = visit(viewport={"width": 390, "height": 844}, color_scheme=scheme)
    assert not page.scrolls_sideways()
    page.generate()
    page.tab.wait_for_selector("#viewer img")
    page.wait_until_idle()
    assert not page.scrolls_sideways()
    assert page.tab.evaluate("document.body.classList.contains('dark')") == (scheme == "dark")
    assert page.tab.locator("#generate").is_visible()


@pytest.mark.browser
def test_says_its_name_and_nothing_of_gradio(visit):
    page = visit()
    text = page.tab.locator("body").inner_text()
    assert page.tab.title() == "ZGP"
    assert "Z-Image for the GPU poor" in text
    assert "gradio" not in text.lower() and "video" not in text.lower()


# ---------------------------------------------------------------- for programs


@pytest.mark.browser
def test_generate_endpoint_returns_pictures(server):
    from gradio_client import Client

    client = Client(server.url, verbose=False)
    assert list(client.view_api(return_format="dict")["named_endpoints"]) == ["/generate"]
    made = client.predict({"prompt": PROMPT, "seed": 11, "batch_size": 2}, api_name="/generate")
    assert [Path(path).is_file() for path in made["images"]] == [True, True]
    assert [meta["seed"] for meta in made["metadata"]] == [11, 12]


@pytest.mark.browser
def test_generate_endpoint_says_what_is_wrong(server):
    from gradio_client import Client

    client = Client(server.url, verbose=False)
    with pytest.raises(Exception, match="num_inference_steps came as 0"):
        client.predict({"prompt": PROMPT, "num_inference_steps": 0}, api_name="/generate")


@pytest.mark.browser
def test_only_pictures_are_served(server):
    for private in (server.folder / ".zgp" / "zgp.sqlite3", ROOT / "wgp.py"):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(f"{server.url}gradio_api/file={private.as_posix()}")
        assert refused.value.code in (403, 404)


def test_a_taken_port_is_one_sentence(tmp_path, models):
    import socket

    from shared.engine.configuration import EngineConfig
    from shared.engine.engine import Engine
    from shared.server.launch import launch

    engine = Engine(EngineConfig.at(ROOT, output_dir=tmp_path, database=tmp_path / ".zgp" / "zgp.sqlite3"))
    port = free_port()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        taken.listen()
        with pytest.raises(UserError, match=f"Port {port}.*--server-port"):
            launch(engine, port=port)
