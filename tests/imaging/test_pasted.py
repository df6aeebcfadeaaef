"""Generation data as text: pasted into the page, dropped on it, and as a file of tasks."""

from __future__ import annotations

import base64
import json
import subprocess
import sys

import pytest

from shared.errors import UserError
from shared.imaging.foreign import pasted
from shared.jobs.task_file import read_tasks
from shared.library.translation import as_task
from shared.ui.create import import_settings
from tests.support.browser import ROOT
from tests.support.dropping import DROP
from tests.support.other_programs import SWARM, graph, subgraph, workflow

MINI = "z_image_mini"
A1111 = """a lamp, <lora:mini_outlines:0.8>
on a (blue:1.2) table
Negative prompt: fog
Steps: 9, Sampler: DPM++ 2M, CFG scale: 1, Seed: 4711, Size: 128x192, Model: dreams, Version: v1.10"""
CIVITAI = """a lamp
Negative prompt: fog
Steps: 9, CFG scale: 1, Sampler: Euler, Seed: 4711, Size: 128x192, Clip skip: 2, \
Created Date: 2026-01-02T03:04:05.6Z, Civitai resources: [{"type":"checkpoint","modelVersionId":1,\
"modelName":"Z Image Turbo","modelVersionName":"Turbo"}], Civitai metadata: {}"""
INVOKE = {
    "app_version": "6.10", "generation_mode": "z_image_txt2img", "positive_prompt": "a lamp", "steps": 9,
    "seed": 4711, "width": 128, "height": 192, "cfg_scale": 1.0,
}  # fmt: skip
OURS = {"prompt": "a lamp", "num_inference_steps": 9, "seed": 4711, "resolution": "128x192"}
MFLUX = {
    "mflux_version": "0.12", "model": "z-image-turbo", "prompt": "a lamp", "steps": 9, "seed": 4711,
    "width": 128, "height": 192, "guidance": 0.0,
}  # fmt: skip
TEXTS = {
    "A1111": (A1111, "A1111 or Forge"),
    "Windows' line ends": (A1111.replace("\n", "\r\n"), "A1111 or Forge"),
    "Civitai's copy": (CIVITAI, "Civitai"),
    "InvokeAI": (json.dumps(INVOKE, indent=2), "InvokeAI"),
    "mflux": (json.dumps(MFLUX), "mflux"),
    "ours": (json.dumps(OURS), None),
    "Wan2GP's": (json.dumps(OURS | {"type": "WanGP v12 by DeepBeepMeep - Z-Image", "image_mode": 1}), None),
}
#: whose own values differ from the usual ones
GRAPHS = {
    "ComfyUI's API": graph(),
    "ComfyUI's editor": workflow(),
    "with subgraphs": subgraph([["-1", "text"]], ["a lamp"]),
    "a request to it": {"client_id": "x", "prompt": graph()},
    "SwarmUI": SWARM,
}
PLAIN = [
    "a lamp", "", "{red|blue} lamp", '{"subject": "a lamp | table", "colors": ["red"]}', "{", "[1, 2]",
    "Steps: a staircase, going up", '{"prompt": "a lamp"}', "[" * 50_000, '{"a":' * 50_000,
    "x" * 2_000_000,
]  # fmt: skip


def settings_of(text, models):
    return import_settings.from_text(text, "the pasted text", models, MINI)


@pytest.mark.parametrize("name", TEXTS)
def test_every_program_s_text_fills_the_form_and_is_a_task(name, models, tmp_path):
    text, program = TEXTS[name]
    found = settings_of(text, models)
    wanted = {"num_inference_steps": 9, "seed": 4711, "resolution": "128x192"}
    assert {key: found.settings[key] for key in wanted} == wanted
    assert found.settings["prompt"].startswith("a lamp") and "<lora" not in found.settings["prompt"]
    said = f", made by {program}." if program else "."
    assert found.report[0] == f"The form now has the settings of the pasted text{said}"
    for suffix in (".txt", ".json") if text.startswith("{") else (".txt",):
        path = tmp_path / f"data{suffix}"
        path.write_bytes(text.encode())
        [task] = read_tasks(path, tmp_path)
        values, lines = as_task(task.values, models, MINI)
        assert {key: values[key] for key in wanted} == wanted
        assert [line for line in lines if line not in found.report] == []
        assert import_settings.from_file(path, "data", models, MINI).settings == found.settings


@pytest.mark.parametrize("name", GRAPHS)
def test_graphs_and_objects_are_read_as_from_a_picture(name, models):
    found = settings_of(json.dumps(GRAPHS[name]), models)
    assert found.settings["prompt"] == "a lamp"


def test_the_notes_are_those_of_a_picture(models):
    report = " ".join(settings_of(A1111, models).report)
    for word in ("'dreams' is not here", "DPM++ 2M", "(word:1.2)"):
        assert word in report


def test_loras_of_the_text_act_where_they_are(models):
    assert settings_of(A1111, models).settings["activated_loras"] == ["mini/mini_outlines.safetensors"]


@pytest.mark.parametrize("text", PLAIN, ids=range(len(PLAIN)))
def test_a_prompt_is_a_prompt(text, models):
    assert pasted.read(text) == []
    with pytest.raises(UserError, match="^the pasted text holds no settings: expected"):
        settings_of(text, models)


def test_lines_of_prompts_stay_prompts(tmp_path):
    (tmp_path / "a.txt").write_text("a lamp\na table, Steps: 3\n")
    found = [task.values for task in read_tasks(tmp_path / "a.txt", tmp_path)]
    assert found == [{"prompt": "a lamp"}, {"prompt": "a table, Steps: 3"}]


def test_the_data_of_several_pictures_are_several_tasks(tmp_path, models):
    (tmp_path / "a.txt").write_text(f"{A1111}\n\n{CIVITAI}\n")
    tasks = read_tasks(tmp_path / "a.txt", tmp_path)
    prompts = [as_task(task.values, models, MINI)[0]["prompt"] for task in tasks]
    assert [prompt.splitlines()[0].rstrip(", ") for prompt in prompts] == ["a lamp", "a lamp"]
    assert "Steps" not in prompts[1] and "blue" not in prompts[1]
    with pytest.raises(UserError, match="holds the data of 2 pictures"):
        settings_of(f"{A1111}\n\n{CIVITAI}", models)


def test_a_text_file_runs_without_a_page(tmp_path):
    (tmp_path / "data.txt").write_text(A1111)
    done = subprocess.run(
        [sys.executable, "wgp.py", "--process", str(tmp_path / "data.txt"), "--dry-run", "--json",
         "--output-dir", str(tmp_path / "out")],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0 and json.loads(done.stdout)["settings"]["seed"] == 4711
    assert "'dreams' is not here" in done.stderr


# ---------------------------------------------------------------- in the page


@pytest.fixture(scope="module")
def server(shared_server):
    return shared_server


def dropped(page, name, text):
    page.tab.wait_for_selector("#drop input[type=file]", state="attached")  # the last file is taken
    page.tab.evaluate(DROP, [base64.b64encode(text.encode()).decode(), name])


def seed_is(page, seed):
    page.tab.wait_for_function(f"document.querySelector('#seed input').value === '{seed}'")


@pytest.mark.browser
def test_a_text_pasted_into_the_prompt_offers_its_settings(visit):
    page = visit()
    page.tab.locator("#prompt textarea").fill(A1111)
    line = page.tab.locator("#prompt-count")
    line.get_by_text("These are settings of A1111 or Forge").wait_for()
    line.get_by_role("button", name="Use them").click()
    seed_is(page, 4711)
    assert page.value("num_inference_steps") == "9"
    page.tab.wait_for_function("document.querySelector('#prompt textarea').value.startsWith('a lamp')")
    assert "Steps:" not in page.tab.locator("#prompt textarea").input_value()
    page.tab.locator("#notice").get_by_text("'dreams' is not here").wait_for()
    line.get_by_text("of 512 tokens").wait_for()


@pytest.mark.browser
def test_texts_dropped_anywhere_are_read(visit):
    page = visit()
    page.tab.wait_for_selector("#stage .zgp-followed", state="attached")  # the page is ready
    dropped(page, "data.txt", A1111)
    seed_is(page, 4711)
    dropped(page, "ours.json", json.dumps(OURS | {"seed": 12}))
    seed_is(page, 12)
    dropped(page, "flow.json", json.dumps(graph()))
    page.tab.locator("#notice").get_by_text("flow.json, made by ComfyUI").wait_for()
    dropped(page, "package.json", '{"name": "x"}')
    page.tab.locator("#notice").get_by_text("package.json holds no settings").wait_for()
