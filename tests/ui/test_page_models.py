"""The tab "Models": its rows without a browser; and in a real one a download from a hub on this computer, a
removal, and a model of the user's own that makes a picture.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from shared.engine.inventory import Forecast, Item, Removal, Stock
from shared.jobs.records import Job
from shared.library.cards import Card
from shared.library.download_queue import FAILED, PAUSED, RUNNING, Download
from shared.ui.models.html import Shelf, forecast_text, forget_html, removal_html, shelf_html, to_come
from shared.weights.files import Required
from tests.support.browser import ROOT, Visit, serve
from tests.support.hub_stand_in import Fault, HubStandIn, Stored

EVIL = "<img src=x onerror=alert(1)>\"'"
URL = "https://huggingface.co/a/b/resolve/main"
MINI = ROOT / "models" / "z_image" / "mini"


# ---------------------------------------------------------------- without a browser


def a_stock(model_id="m", *, here=(), missing=("big",), size=8e9, own=False, forecast=None, **model) -> Stock:
    names = {"name": model_id.title(), "description": "About it.", **model}
    card = Card(model_id, names["name"], "a", names["description"], model, {}, Path("defaults/m.json"))
    items = [Item("transformer", name, Path("/ckpts") / name, 10**9, "bf16") for name in here]
    items += [Item("text_encoder", name, None, int(size)) for name in missing]
    info = SimpleNamespace(
        id=model_id, name=names["name"], description=names["description"], available=not missing, card=card,
        capabilities={}, defaults={},
        required=[Required(item.role, [f"{URL}/{item.name}"]) for item in items],
    )  # fmt: skip
    return Stock(info, tuple(items), forecast or Forecast(), built_in=False, own=own, arrived=0)


def shown(*stocks, running=None, **downloads) -> str:
    found = {name: Download(name, **fields) for name, fields in downloads.items()}
    return shelf_html(Shelf(stocks, found, 5 * 10**9, "/ckpts", running))


def test_a_row_says_what_is_here_and_what_is_to_come():
    html = shown(a_stock(here=("a.safetensors",), missing=("te.safetensors",)))
    assert "On disk: bf16 · 1.0 GB" in html and "about 8.0 GB (text encoder)" in html
    assert 'data-act="start"' in html and "Not here yet <span>1 model</span>" in html
    html = shown(a_stock(here=("a.safetensors",), missing=()))
    assert 'data-act="use"' in html and 'data-act="remove"' in html and 'data-act="start"' not in html


def test_a_download_is_shown_with_its_speed_and_its_end():
    fields = dict(status=RUNNING, file="te.safetensors", done=2 * 10**9, total=8 * 10**9, speed=2e7)
    html = shown(a_stock(), m=fields)
    assert "te.safetensors · 2.0 GB of 8.0 GB · 20.0 MB/s" in html and "about 5 min 0 s left" in html
    assert 'aria-valuenow="25"' in html and 'data-act="pause"' in html
    assert "waits &lt;" in shown(a_stock(), m={**fields, "note": "waits <"})
    assert 'data-act="start"' in shown(a_stock(), m={**fields, "status": PAUSED})
    assert "the reason" in shown(a_stock(), m={"status": FAILED, "note": "the reason"})


def test_a_job_that_fetches_a_file_is_shown():
    job = Job(7, "running", {}, "ui", None, 1, "Downloading te.safetensors", 50, 200, None, None)
    html = shown(a_stock(missing=("te.safetensors",)), running=job)
    assert "Job 7 is downloading te.safetensors" in html and 'aria-valuenow="25"' in html


def test_cards_that_cannot_be_used_are_named():
    html = shelf_html(Shelf([a_stock()], {}, 0, "/ckpts", broken=["finetunes/a.json: <b> is unknown"]))
    assert "finetunes/a.json: &lt;b&gt; is unknown" in html


def test_what_models_share_is_counted_once():
    stocks = [a_stock("a", missing=("te", "one")), a_stock("b", missing=("te", "two"))]
    downloads = {"a": Download("a", RUNNING, done=10**9), "b": Download("b", PAUSED)}
    assert to_come(Shelf(stocks, downloads, 0, "")) == 3 * 8 * 10**9 - 10**9


def test_what_a_picture_takes_is_measured_estimated_or_unknown():
    assert forecast_text(Forecast("int8", "", 6.24, 5)).endswith(
        "6.2 s per picture, the median of 5 made here"
    )
    assert (
        forecast_text(Forecast("int8", "", 75.0)) == "Here: int8 · about 1 min 15 s per picture, an estimate"
    )
    assert forecast_text(Forecast()) == "Here: no picture was timed here yet"
    assert "needs 9 GB" in shown(a_stock(forecast=Forecast(problem="This needs 9 GB")))


def test_a_licence_is_a_link_to_its_page():
    html = shown(a_stock(license="Apache-2.0", license_page="https://h.example/m"))
    assert '<a href="https://h.example/m" target="_blank" rel="noopener noreferrer">Apache-2.0</a>' in html
    assert "see its page" in shown(a_stock(license_page="https://h.example/m"))
    assert "Licence" not in shown(a_stock()) and "href" not in shown(a_stock(license_page="javascript:x"))


def test_nothing_from_a_card_or_a_path_becomes_html():
    stock = a_stock(EVIL, here=(EVIL,), missing=(EVIL,), name=EVIL, description=EVIL, license=EVIL, own=True)
    planned = Removal(stock.info, ((Path(EVIL), 1),), ((Path(EVIL), EVIL),))
    html = shown(stock) + removal_html(planned) + forget_html(EVIL, EVIL)
    assert "<img" not in html and 'data-id="<' not in html and EVIL not in html


def test_a_removal_lists_what_goes_and_what_stays():
    planned = Removal(a_stock().info, ((Path("/c/a"), 10**9),), ((Path("/c/te"), "needed by B"),))
    html = removal_html(planned)
    assert "/c/a <span>1.0 GB" in html and "/c/te <span>needed by B" in html and "Delete 1.0 GB" in html
    assert f'data-mark="{planned.mark}"' in html
    assert "Delete" not in removal_html(Removal(a_stock().info, (), ())).replace("can be deleted", "")


# ---------------------------------------------------------------- in a browser

# The page on a project of the test, which has the cards of the Minis and one whose files the hub has.
_SERVE = """
import sys
from pathlib import Path
from shared.cli.main import main
folder = Path(sys.argv[1])
sys.exit(main(["--server-port", sys.argv[2]], root=folder.parent))
"""


@pytest.fixture(scope="module")
def hub():
    with HubStandIn() as running:
        parts = {"transformer": "transformer", "encoder": "text_encoder/model", "vae": "vae/model"}
        for name, file in parts.items():
            running.files[f"{name}.safetensors"] = Stored((MINI / f"{file}.safetensors").read_bytes())
        yield running


@pytest.fixture(scope="module")
def project(tmp_path_factory, hub):
    root = tmp_path_factory.mktemp("models_page")
    for name in ("defaults", "finetunes", "ckpts"):
        (root / name).mkdir()
    (root / "models").symlink_to(ROOT / "models")
    for name in ("z_image_mini", "z_image_mini_base", "z_image"):
        shutil.copy(ROOT / "defaults" / f"{name}.json", root / "defaults")
    card = json.loads((ROOT / "defaults" / "z_image_mini.json").read_text("utf-8"))
    card["model"] |= {
        "name": "Remote Mini",
        "URLs": [hub.url("transformer.safetensors")],
        "text_encoder_URLs": [hub.url("encoder.safetensors")],
        "VAE_URLs": [hub.url("vae.safetensors")],
    }
    (root / "defaults" / "remote.json").write_text(json.dumps(card))
    shutil.copy(MINI / "transformer_base.safetensors", root / "ckpts" / "painted.safetensors")
    return root


@pytest.fixture(scope="module")
def server(project, hub):
    patched = pytest.MonkeyPatch()
    patched.setenv("HF_ENDPOINT", hub.endpoint)
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HTTP_PROXY", "http_proxy"):
        patched.delenv(name, raising=False)
    with serve(project / "outputs", _SERVE) as running:
        yield running
    patched.undo()


class ModelsVisit(Visit):
    def show_models(self):
        self.tab.get_by_role("tab", name="Models").click()
        self.tab.wait_for_selector(".zgp-model")

    def row(self, name):
        return self.tab.locator(".zgp-model", has=self.tab.get_by_role("heading", name=name, exact=True))

    def press(self, name, words):
        self.row(name).locator("button", has_text=words).click()

    def says(self, name, badge):
        self.row(name).locator(".zgp-badge", has_text=badge).first.wait_for()


VISIT = ModelsVisit


@pytest.mark.browser
def test_a_model_is_downloaded_used_and_removed(visit, hub, project, server):
    page, other = visit(), visit()
    page.show_models()
    headings = page.tab.locator("#models-list .zgp-heading").all_inner_texts()
    assert [text.split()[0] for text in headings] == ["Built", "Not"]
    page.says("Z-Image Turbo", "to download")
    hub.get_faults = [Fault(pause=0.004)]
    page.press("Remote Mini", "Download")
    bar = page.row("Remote Mini").locator(".zgp-bar span")
    page.tab.wait_for_function("(bar) => parseInt(bar.style.width) > 1", arg=bar.element_handle())
    page.row("Remote Mini").locator("summary").click()
    other.show_models()  # every tab sees it
    other.says("Remote Mini", "downloading")
    page.press("Remote Mini", "Pause")
    page.says("Remote Mini", "paused")
    assert page.row("Remote Mini").locator("table").is_visible()  # while the list was drawn anew
    part = project / "ckpts" / "transformer.safetensors.part"
    assert 0 < part.stat().st_size < len(hub.files["transformer.safetensors"].data)
    page.press("Remote Mini", "Resume")
    page.says("Remote Mini", "ready")
    assert hub.bytes_asked()[1].startswith("bytes=")
    page.press("Remote Mini", "Use")
    page.tab.wait_for_selector("#prompt", state="visible")
    page.tab.wait_for_function("document.querySelector('#model_type input').value === 'Remote Mini'")
    page.generate()
    page.tab.locator("#viewer .zgp-line", has_text="Remote Mini").wait_for()

    page.show_models()
    page.press("Remote Mini", "Remove files")
    question = page.tab.locator("#models-question .zgp-question")
    assert str(project / "ckpts" / "vae.safetensors") in question.inner_text()
    page.tab.keyboard.press("Escape")
    question.wait_for(state="detached")
    page.press("Remote Mini", "Remove files")
    question.locator("button", has_text="Delete").click()
    page.says("Remote Mini", "to download")
    assert not list((project / "ckpts").glob("vae*")) and (MINI / "vae" / "model.safetensors").exists()


@pytest.mark.browser
def test_a_file_becomes_a_model_that_makes_a_picture(visit, project):
    page = visit()
    page.show_models()
    page.tab.locator("#own-model > button").click()
    page.tab.locator("#own-file input").click()
    page.tab.get_by_role("option", name="ckpts/painted.safetensors").click()
    page.tab.locator("#own-verdict", has_text="This is a transformer in fp16").wait_for()
    page.tab.locator("#own-like input").click()
    page.tab.get_by_role("option", name="Z-Image Mini Base", exact=True).click()
    page.tab.wait_for_function("document.querySelector('#own-steps input').value === '30'")
    page.tab.locator("#own-name input, #own-name textarea").fill("Painted")
    page.set_number("own-steps", 6)
    page.tab.locator("#own-save").click()
    page.says("Painted", "yours")
    page.press("Painted", "Use")
    page.tab.wait_for_function("document.querySelector('#model_type input').value === 'Painted'")
    assert page.value("num_inference_steps") == "6"
    page.generate()
    page.tab.locator("#viewer .zgp-line", has_text="Painted").wait_for()

    page.show_models()
    page.press("Painted", "Edit")
    page.tab.wait_for_selector("#own-name", state="visible")
    page.tab.locator("#own-name input, #own-name textarea").fill("Repainted")
    page.tab.locator("#own-save").click()
    page.says("Repainted", "yours")
    page.press("Repainted", "Remove from the list")
    page.tab.locator("#models-question button", has_text="Remove").click()
    page.row("Repainted").wait_for(state="detached")
    assert (project / "ckpts" / "painted.safetensors").exists()
    assert not list((project / "finetunes").glob("*.json"))
