"""The queue on the page, as its user sees it: in a real browser, on a real server with the Mini models."""

from __future__ import annotations

import asyncio
import base64
import functools
import io
import json
import os
import signal
import sqlite3
import zipfile

import pytest

from shared.engine.configuration import EngineConfig
from shared.engine.engine import Engine
from shared.jobs.records import FAILED, QUEUED, Job
from shared.ui.components.queue_state import SHOWN, Sight, look, watch
from shared.ui.create.queue.panel import Queue, shortened
from tests.support.browser import ROOT, Visit, serve, visits
from tests.support.dropping import DROP

MINI, BASE = "z_image_mini", "z_image_mini_base"
LONG = {"model_type": BASE, "num_inference_steps": 100, "batch_size": 16, "seed": 1}


def a_job(number=1, status=QUEUED, **changes) -> Job:
    settings = {"prompt": "a circle", "model_type": MINI, "resolution": "128x128", "batch_size": 1}
    settings |= changes.pop("settings", {})
    values = dict(
        source="ui", output_dir=None, attempts=0, phase="", step=0, steps=0, seconds_left=None, error=None
    )
    return Job(**{**values, "id": number, "status": status, "settings": settings, **changes})


@pytest.fixture(scope="module")
def client_of():
    """An engine without a worker on a server's folder: another program that uses the same queue."""

    def open_client(folder):
        return Engine(EngineConfig.at(ROOT, output_dir=folder, database=folder / ".zgp" / "zgp.sqlite3"))

    return open_client


# ---------------------------------------------------------------- without a browser


@pytest.fixture
def queue(tmp_path, client_of):
    return Queue(client_of(tmp_path))


def test_the_list_is_hidden_while_there_is_nothing_to_do_about_the_queue(queue):
    assert queue.html(Sight(1, [], None, [])) == ""
    assert queue.html(Sight(1, [a_job(status="running")], None, [])) == ""
    assert queue.html(Sight(1, [a_job(source="live")], None, [])) == ""
    assert "paused" in queue.html(Sight(1, [], None, [], paused=True))


def test_the_list_names_what_waits_and_what_failed(queue):
    failed = a_job(3, FAILED, error="Not enough <memory>.")
    html = queue.html(
        Sight(1, [a_job(1, "running"), a_job(2, held=True, settings={"prompt": "<i>", "batch_size": 4})],
              None, [], more=150, failures=[failed])
    )  # fmt: skip
    assert ">&lt;i&gt;<" in html and "<i>" not in html
    assert "Z-Image Mini" in html and "128 × 128" in html and "4 images" in html
    assert "and 150 more" in html and "151 waiting" in html
    assert "being edited" in html and "Not enough &lt;memory&gt;." in html
    assert html.count('data-waits="1"') == 1 and 'data-act="retry" data-job="3"' in html


def test_a_long_queue_is_read_and_shown_in_part(queue):
    store = queue._engine.store
    for number in range(200):
        store.submit({"prompt": str(number), "resolution": "128x128"})
    store.claim_next()
    sight = look(store, 0)
    assert len(sight.queue) == SHOWN and sight.more == 200 - SHOWN and sight.total == 200
    html = queue.html(sight)
    assert html.count("<li") == SHOWN and "and 150 more" in html
    store.progress(1, "Denoising", 3, 8)
    step = look(store, sight.seq, sight)
    assert step.current.step == 3 and step.queue[1:] == sight.queue[1:]
    assert queue.html(step) == html  # a step draws nothing anew


def test_a_sight_follows_every_change_of_the_queue(queue):
    store = queue._engine.store
    first, second, third = (store.submit({"prompt": "x"}) for _ in range(3))
    sight = look(store, 0)
    for change, expected in (
        (lambda: store.move(third, place=0), [third, first, second]),
        (lambda: store.request_cancel(first), [third, second]),
        (lambda: store.hold(third), [third, second]),
        (lambda: store.claim_next(), [second, third]),
        (lambda: store.finish(second, "failed", "It broke."), [third]),
    ):
        change()
        sight = look(store, sight.seq, sight)
        assert [job.id for job in sight.queue] == expected
    assert [event.job_id for event in sight.ended] == [second]
    assert [job.id for job in sight.failures] == [second]
    assert sight.current is None and sight.queue[0].held
    store.release(third)
    store.pause()
    sight = look(store, sight.seq, sight)
    assert sight.paused and sight.current is None
    store.resume()
    assert look(store, sight.seq, sight).current.id == third


def test_a_tab_outlives_a_database_that_cannot_be_read_for_a_moment(queue, monkeypatch):
    store = queue._engine.store
    answers = [sqlite3.OperationalError("database or disk is full"), 1, 1]

    def last_seq():
        answer = answers.pop(0) if answers else 1
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def two_sights():
        sights = watch(store, 0)
        first = await anext(sights)
        monkeypatch.setattr(store, "last_seq", last_seq)
        job = store.submit({"prompt": "x"})
        return first, await anext(sights), job

    first, second, job = asyncio.run(two_sights())
    assert first.queue == [] and [one.id for one in second.queue] == [job]


def test_a_report_stays_readable():
    lines = shortened([f"line {number}" for number in range(40)], {"b": "", "a": ""})
    assert len(lines) == 14 and lines[-2] == "And 28 more." and lines[-1].endswith("a, b.")


# ---------------------------------------------------------------- in a browser


@pytest.fixture
def engine(server, client_of):
    """The same queue as another program sees it; paused, and empty again at the end."""
    engine = client_of(server.folder)
    engine.store.pause()
    yield engine
    engine.store.cancel_all()
    for job in engine.store.failures():
        engine.store.dismiss(job.id)
    engine.store.resume()


class QueueVisit(Visit):
    def rows(self):
        return self.tab.eval_on_selector_all(
            '#queue li[data-waits="1"]', "(rows) => rows.map((row) => Number(row.dataset.id))"
        )

    def wait_for_rows(self, *expected):
        self.tab.wait_for_function(
            """(wanted) => {
                const rows = [...document.querySelectorAll('#queue li[data-waits="1"]')];
                return JSON.stringify(rows.map((row) => Number(row.dataset.id))) === JSON.stringify(wanted);
            }""",
            arg=list(expected),
        )

    def press(self, act, job=0):
        self.tab.locator(f'#queue [data-act="{act}"][data-job="{job}"]').click()

    def drag(self, job, onto):
        grip = self.tab.locator(f'#queue li[data-id="{job}"] .zgp-grip').bounding_box()
        row = self.tab.locator(f'#queue li[data-id="{onto}"]').bounding_box()
        self.tab.mouse.move(grip["x"] + 4, grip["y"] + 4)
        self.tab.mouse.down()
        self.tab.mouse.move(row["x"] + 20, row["y"] + 3, steps=5)
        self.tab.mouse.up()


VISIT = QueueVisit


def submit(engine, prompt="a red circle", **others):
    return engine.submit({"model_type": MINI, "prompt": prompt, "seed": 1, **others}, "cli")[0]


@pytest.mark.browser
def test_the_order_is_changed_by_buttons_keys_and_dragging(visit, engine):
    page = visit()
    a, b, c, d = (submit(engine, f"circle {name}") for name in "abcd")
    page.wait_for_rows(a, b, c, d)
    page.press("up", c)
    page.wait_for_rows(a, c, b, d)
    page.drag(d, onto=a)
    page.wait_for_rows(d, a, c, b)
    page.tab.locator(f'#queue [data-act="down"][data-job="{d}"]').focus()
    for expected in ([a, d, c, b], [a, c, d, b]):
        page.tab.keyboard.press("Enter")
        page.wait_for_rows(*expected)
        page.tab.wait_for_function(
            "(job) => document.activeElement.matches(`[data-act=down][data-job='${job}']`)", arg=d
        )
    page.press("remove", a)
    page.press("more", c)
    page.wait_for_rows(c, d, b, d + 1)
    assert [job.id for job in engine.store.queue()] == [c, d, b, d + 1]
    assert engine.store.job(d + 1).settings["seed"] != 1
    page.tab.set_viewport_size({"width": 390, "height": 844})
    assert not page.scrolls_sideways()
    page.press("resume")
    page.wait_until_idle()
    done = engine.store.events(0, kinds=["done"])
    assert [event.job_id for event in done][-4:] == [c, d, b, d + 1]


@pytest.mark.browser
def test_a_waiting_job_is_edited_and_the_form_gets_back_what_it_had(visit, engine):
    page = visit()
    first, second = submit(engine, "a circle"), submit(engine, "a square", num_inference_steps=3)
    page.wait_for_rows(first, second)
    page.tab.locator("#prompt textarea").fill("half a thought")
    page.press("edit", second)
    page.tab.wait_for_selector("#edit-bar")
    page.tab.wait_for_function("document.querySelector('#prompt textarea').value === 'a square'")
    assert page.value("num_inference_steps") == "3" and not page.tab.locator("#generate").is_visible()
    engine.store.resume()
    page.wait_for_rows(second)  # the held one stays while the other runs
    other = visit()
    other.wait_for_rows(second)
    assert "being edited" in other.tab.locator("#queue").inner_text()
    page.tab.locator("#prompt textarea").fill("a blue star on a white background")
    page.tab.locator("#edit-save").click()
    page.tab.wait_for_selector("#edit-bar", state="hidden")
    page.tab.wait_for_function("document.querySelector('#prompt textarea').value === 'half a thought'")
    page.wait_until_idle()
    assert engine.store.job(second).status == "done"
    assert engine.store.images(second)[0].metadata["prompt"] == "a blue star on a white background"


@pytest.mark.browser
def test_a_job_that_began_while_it_was_edited_says_so(visit, engine):
    page = visit()
    job = submit(engine)
    page.wait_for_rows(job)
    page.press("edit", job)
    page.tab.wait_for_selector("#edit-bar")
    engine.store.release(job)
    engine.store.resume()
    page.wait_for_rows()
    page.tab.locator("#edit-save").click()
    assert f"Job {job}" in page.tab.locator(".toast-body").inner_text()
    page.tab.locator("#edit-leave").click()
    page.tab.wait_for_selector("#edit-bar", state="hidden")
    page.complaints.clear()  # Gradio also writes the sentence to the console


@pytest.mark.browser
def test_a_tab_shows_its_own_jobs_and_takes_over_no_other(visit, engine, server):
    mine, yours = visit(), visit()
    engine.store.resume()
    mine.generate("a large green star on a white background")
    mine.tab.locator("#viewer").get_by_text("a large green star on a white background", exact=True).wait_for()
    tiles = yours.tab.locator("#recent .zgp-tile[title*='large green star']")
    tiles.first.wait_for()
    assert yours.tab.locator("#viewer").get_by_text("a large green star").count() == 0
    mine.set_number("batch_size", 2)
    mine.generate("a small purple heart on a white background")
    mine.tab.wait_for_selector("#stage [role=progressbar]", state="attached")
    mine.tab.reload()  # the same tab: its job is still its own
    mine.complaints.clear()
    mine.tab.locator("#viewer").get_by_text(
        "a small purple heart on a white background", exact=True
    ).wait_for()
    before = len(server.pictures())
    leaving = visit()
    leaving.generate("a yellow star on a blue background")
    leaving.tab.wait_for_function("document.querySelector('#generate').innerText.trim() === 'Add to queue'")
    leaving.tab.close()
    yours.tab.locator("#recent .zgp-tile[title*='a yellow star on a blue']").first.wait_for()
    assert len(server.pictures()) == before + 1


@pytest.mark.browser
def test_a_queue_is_saved_cancelled_and_loaded_again(visit, engine, tmp_path):
    page = visit()
    jobs = [submit(engine, f"circle {name}", seed=seed) for seed, name in enumerate("abc")]
    page.wait_for_rows(*jobs)
    with page.tab.expect_download() as download:
        page.press("save")
    download.value.save_as(tmp_path / "saved.zip")
    assert zipfile.ZipFile(tmp_path / "saved.zip").namelist() == ["queue.json"]
    page.tab.once("dialog", lambda dialog: dialog.accept())
    page.press("cancel_all")
    page.wait_for_rows()
    with page.tab.expect_file_chooser() as chooser:
        page.press("load")
    chooser.value.set_files(tmp_path / "saved.zip")
    new = [jobs[-1] + number for number in (1, 2, 3)]
    page.wait_for_rows(*new)
    assert [engine.store.job(job).settings for job in new] == [engine.store.job(job).settings for job in jobs]
    assert "3 of 3 jobs loaded from saved.zip." in page.tab.locator("#notice").inner_text()


@pytest.mark.browser
def test_a_failed_job_says_why_and_is_retried(visit, engine):
    page = visit()
    job = submit(engine)
    with engine.store._db.transaction() as cx:
        cx.execute("UPDATE jobs SET status = 'running' WHERE id = ?", (job,))
    engine.store.finish(job, FAILED, "There was not enough memory: choose a smaller size.")
    page.tab.locator("#queue").get_by_text("There was not enough memory: choose a smaller size.").wait_for()
    page.press("retry", job)
    page.wait_for_rows(job + 1)
    page.tab.wait_for_selector("text=There was not enough memory", state="detached")
    assert engine.store.job(job).status == FAILED


@pytest.mark.browser
def test_a_saved_queue_that_is_dropped_on_the_page_is_loaded(visit, engine):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:  # as Wan2GP writes it
        task = {"id": 1, "params": {"prompt": "a green star", "model_type": "z_image_mini", "seed": 5}}
        archive.writestr("queue.json", json.dumps([task]))
    page = visit()
    page.tab.wait_for_selector("#stage .zgp-followed", state="attached")  # the page is ready
    page.tab.evaluate(DROP, [base64.b64encode(file.getvalue()).decode(), "mine.zip"])
    page.tab.locator("#notice").get_by_text("1 of 1 job loaded from mine.zip.").wait_for()
    assert engine.store.jobs(limit=1)[0].settings["prompt"] == "a green star"
    engine.store.resume()
    page.wait_until_idle()


@pytest.mark.browser
@pytest.mark.slow
def test_an_open_tab_outlives_its_server(browser, tmp_path, client_of):
    folder = tmp_path / "outputs"
    with serve(folder) as first, visits(functools.partial(QueueVisit, browser, first.url)) as visit:
        page = visit()
        page.tab.locator("#prompt textarea").fill("half a thought")
        engine = client_of(folder)
        jobs = [submit(engine, "a circle", **LONG), submit(engine, "a red circle above a blue square")]
        page.wait_for_rows(jobs[1])
        page.tab.evaluate("window.zgpOld = true")
        os.kill(first.pid, signal.SIGKILL)
        port = int(first.url.rsplit(":", 1)[1].strip("/"))
        with serve(folder, port=port):
            page.tab.wait_for_selector("#stage [role=progressbar]", state="attached")
            page.tab.wait_for_function(
                "document.querySelector('#prompt textarea').value === 'half a thought'"
            )
            page.wait_for_rows(jobs[1])
            page.until(lambda: engine.store.job(jobs[0]).attempts == 2)  # the worker may be on its way
            # Gradio may load the page a second time, and a click get lost with the first.
            def cancel():
                if engine.store.job(jobs[0]).status == "running" and page.tab.locator("#cancel").is_visible():
                    page.tab.locator("#cancel").click()
                page.tab.wait_for_timeout(100)

            page.until(lambda: engine.store.job(jobs[1]).status == "done", cancel)
            page.wait_until_idle()
            page.tab.close()
        page.complaints.clear()  # of the time without a server
