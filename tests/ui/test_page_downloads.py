"""The tab Create and large downloads: what it says of them, and in a browser the question, both answers to
it, and the picture that follows a yes. The hub is on this computer; what is large is set for its size.
"""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import pytest

from shared.engine.questions import Question
from shared.jobs.records import Job
from shared.library.consent import Ask
from shared.library.outlook import Missing, Outlook
from shared.ui.components.downloads import about_html, first_picture, question_html
from tests.support.browser import ROOT, Visit, serve
from tests.support.hub_stand_in import Fault, HubStandIn, Stored

EVIL = "<img src=x onerror=alert(1)>\"'"
MINI = ROOT / "models" / "z_image" / "mini"


# ---------------------------------------------------------------- without a browser


def missing(name="a_int8.safetensors", size=8_000_000_000, arrived=0) -> Missing:
    return Missing("transformer", f"https://h.example/{name}", size, arrived)


def a_question(jobs=1, **changes) -> Question:
    fields = {"models": ("Large",), "files": (missing(),), "kind": "int8", **changes}
    made = [Job(n, "queued", {}, "ui", None, 0, "", 0, 0, None, None, asks=True) for n in range(jobs)]
    return Question(Ask(**fields), tuple(made))


def test_the_question_says_what_comes_and_for_whom():
    html = question_html(a_question(2), True, 50_000_000_000, "/ckpts")
    assert "Download Large?" in html and "About 8.0 GB (int8)" in html and "50.0 GB are free" in html
    assert "2 jobs wait for it" in html and ">Cancel the 2 jobs<" in html and ">Download 8.0 GB<" in html
    assert 'role="alertdialog"' in html and "a_int8.safetensors <span>8.0 GB" in html
    assert f'data-mark="{a_question().ask.mark}"' in html


def test_in_another_tab_it_stands_in_its_place():
    html = question_html(a_question(), False, 1, "/ckpts")
    assert 'class="zgp-asks"' in html and "aria-modal" not in html and "1 job waits" in html


def test_nothing_of_a_question_becomes_html():
    files = (missing("a&amp.safetensors"),)
    html = question_html(a_question(models=(EVIL,), files=files, kind=EVIL), True, 1, EVIL)
    assert "<img" not in html and EVIL not in html and "a&amp;amp.safetensors" in html


def test_the_line_below_the_model_names_size_and_precision_or_else_the_files():
    plan = SimpleNamespace(transformer=SimpleNamespace(kind="int8"))
    assert first_picture(Outlook(plan, (), (missing(arrived=10**9),))) == (
        "The first picture downloads 7.0 GB (int8)."
    )
    unknown = (missing("a.safetensors", 0), missing("b.json", 0))
    assert first_picture(Outlook(None, (), unknown)) == (
        "The first picture downloads a.safetensors, 1 small file."
    )
    model = SimpleNamespace(description="<b>")
    assert about_html(model, found=Outlook(plan, (), ())) == about_html(model) == "&lt;b&gt;"


# ---------------------------------------------------------------- in a browser

# What is larger than 100 kB is large; in the page's process and in the worker's.
_SERVE = """
import sys
from pathlib import Path
from shared.cli.main import main
from shared.library import consent
consent.LARGE = 100_000
folder = Path(sys.argv[1])
worker = "from shared.library import consent; from shared.worker import worker; "
worker += "consent.LARGE = 100_000; worker.main()"
command = (sys.executable, "-c", worker)
sys.exit(main(["--server-port", sys.argv[2]], root=folder.parent, worker_command=command))
"""


@pytest.fixture(scope="module")
def hub():
    from safetensors.torch import load_file, save

    with HubStandIn() as running:
        weights = load_file(MINI / "transformer.safetensors")
        running.files["mini_bf16.safetensors"] = Stored(save({n: t.bfloat16() for n, t in weights.items()}))
        running.files["encoder.safetensors"] = Stored((MINI / "text_encoder/model.safetensors").read_bytes())
        yield running


@pytest.fixture(scope="module")
def project(tmp_path_factory, hub):
    root = tmp_path_factory.mktemp("downloads_page")
    for name in ("defaults", "finetunes", "ckpts"):
        (root / name).mkdir()
    (root / "models").symlink_to(ROOT / "models")
    shutil.copy(ROOT / "defaults" / "z_image_mini.json", root / "defaults")
    card = json.loads((ROOT / "defaults" / "z_image_mini.json").read_text("utf-8"))
    urls = [hub.url(f"mini_{kind}.safetensors") for kind in ("bf16", "int8")]
    card["model"] |= {
        "name": "Remote", "URLs": urls, "text_encoder_URLs": [hub.url("encoder.safetensors")],
    }  # fmt: skip
    (root / "defaults" / "remote.json").write_text(json.dumps(card))
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


class DownloadVisit(Visit):
    def about(self, words):
        self.tab.locator("#about", has_text=words).wait_for()

    def precision(self, words):
        self.tab.locator("#precision input").click()
        self.tab.get_by_role("option").filter(has_text=f"{words} ·").click()

    @property
    def question(self):
        return self.tab.locator("#download-question")

    def press(self, act):
        self.question.locator(f'[data-act="{act}"]').click()


VISIT = DownloadVisit


@pytest.mark.browser
def test_a_large_download_begins_after_a_yes(visit, hub, project, server):
    page, other = visit(), visit()
    page.tab.wait_for_selector("#precision", state="hidden")  # the Mini has one file
    page.choose_model("Remote (to download)")
    page.about("(bf16).")
    page.precision("int8")
    page.about("(int8).")
    page.generate()
    page.question.locator("li", has_text="mini_int8.safetensors").wait_for()
    other.question.locator(".zgp-asks").wait_for()  # it can be answered there, but blocks nothing
    other.choose_model("Z-Image Mini")
    other.generate("a blue star on a white background")
    other.tab.locator("#viewer .zgp-line", has_text="Z-Image Mini").wait_for()
    page.tab.keyboard.press("Escape")
    page.question.locator(".zgp-asks").wait_for()
    page.tab.locator("#queue .zgp-job", has_text="waits for a yes to its download").wait_for()
    page.press("no")
    page.question.locator("h3").wait_for(state="detached")
    other.question.locator("h3").wait_for(state="detached")
    assert not hub.asked and not list((project / "ckpts").iterdir())

    page.precision("bf16")
    page.about("(bf16).")
    page.generate()
    page.question.locator(".zgp-question li", has_text="mini_bf16.safetensors").wait_for()
    page.reload()  # the job and its question stay
    page.question.locator(".zgp-question").wait_for()
    page.press("yes")
    page.tab.locator("#viewer .zgp-line", has_text="Remote").wait_for()
    assert (project / "ckpts" / "mini_bf16.safetensors").exists()
    assert not list((project / "ckpts").glob("*int8*"))
    page.choose_model("Remote")  # no longer "to download"
    page.tab.wait_for_function("!document.querySelector('#about').innerText.includes('downloads')")


@pytest.mark.browser
def test_what_is_downloaded_in_the_tab_models_is_not_asked_for(visit, hub, project, server):
    for name in ("mini_bf16.safetensors", "encoder.safetensors"):
        next((project / "ckpts").rglob(name)).unlink()
    page = visit()
    page.tab.get_by_role("tab", name="Models").click()
    row = page.tab.locator('.zgp-model[data-model="remote"]')
    row.locator("select").select_option("bf16")
    page.tab.wait_for_function(
        "document.querySelector('[data-model=remote] select')?.value === 'bf16'"
        " && document.querySelector('[data-model=remote]').innerText.includes('bf16 file')"
    )
    page.tab.locator("#models-card input").click()
    page.tab.get_by_role("option", name="a card of 8 GB, too").click()
    row.locator("p", has_text="On a card of 8 GB (planned, not measured): bf16 file").wait_for()
    hub.get_faults = [Fault(pause=0.004)]
    row.locator("button", has_text="Download").click()
    row.locator(".zgp-badge", has_text="downloading").wait_for()
    page.tab.get_by_role("tab", name="Create").click()
    page.choose_model("Remote (to download)")
    page.generate()
    page.tab.locator("#viewer .zgp-line", has_text="Remote").wait_for()
    assert not page.question.locator("h3").count()
    assert json.loads((project / "settings/remote_settings.json").read_text()) == {"precision": "bf16"}
