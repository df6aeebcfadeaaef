"""Large downloads begin after a yes, which is asked for once and outlives jobs and restarts; what waits for
it blocks nothing and is not lost.
"""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys

import pytest

from shared.engine.engine import Engine, EngineConfig
from shared.errors import UserError
from shared.gpu.planner import GIB, Machine
from shared.jobs.agreements import Agreed, agreed_in
from shared.jobs.records import CANCELLED, DONE, FAILED, QUEUED
from shared.jobs.store import JobStore
from shared.library import consent
from shared.library.consent import NotAgreed
from shared.weights.files import Folders
from shared.worker import worker
from shared.worker.model_manager import ModelHost
from tests.support import fake_family
from tests.support.browser import ROOT
from tests.support.large_family import URL, handler_for
from tests.support.waiting import LIMIT

CARD = Machine("Card", 64 * GIB, 60 * GIB, 24 * GIB, 23 * GIB, (8, 6))
LARGE = {"model_type": "large", "prompt": "x"}
HERE = {"model_type": "fake", "prompt": "x"}


@pytest.fixture
def root(tmp_path):
    root = fake_family.make_root(tmp_path / "root")
    card = {"model": {"name": "Large", "architecture": "fake", "URLs": [URL]}, "resolution": "64x64"}
    (root / "defaults" / "large.json").write_text(json.dumps(card))
    return root


@pytest.fixture
def engine(root):
    return Engine(EngineConfig.at(root, warm=False), handler_for)


@pytest.fixture
def work(engine, root, monkeypatch):
    """Runs one job in this process; downloads only write the file."""
    fetched: list[str] = []

    def ensure(required, folders, progress=None, cancelled=None):
        paths = {}
        for one in required:
            place = folders.ckpts / "large.safetensors"
            if one.alternatives == [URL] and not place.exists():
                fetched.append(URL)
                place.parent.mkdir(exist_ok=True)
                place.write_bytes(b"weights")
            paths[one.role] = place if one.alternatives == [URL] else root / one.alternatives[0]
        return paths

    monkeypatch.setattr("shared.worker.model_manager.ensure", ensure)
    folders = Folders(root, root / "ckpts")
    agreed = Agreed(engine.store.database)
    host = ModelHost(folders, handler_for=handler_for, machine=lambda: CARD, agreed=agreed.given)
    run = worker.Worker(engine.store, host, root / "outputs", root / "zgp.log").run_one
    run.__self__.fetched = fetched
    return run


def status(engine, job_id):
    job = engine.store.job(job_id)
    return job.status, job.asks


def mark(engine) -> str:
    return engine.questions.open().ask.mark


# ---------------------------------------------------------------- jobs of the page


def test_a_job_of_the_page_waits_and_others_pass_it(engine, work):
    waits, other = engine.submit(LARGE)[0], engine.submit(HERE)[0]
    assert status(engine, waits) == (QUEUED, True)
    assert work() and status(engine, other) == (DONE, False)
    assert not work() and status(engine, waits) == (QUEUED, True)
    question = engine.questions.open()
    assert (question.ask.amount, question.ask.models) == ("8.0 GB (bf16)", ("Large",))
    assert [job.id for job in question.jobs] == [waits]


def test_a_yes_is_given_once(engine, work):
    first, second = engine.submit(LARGE)[0], engine.submit({**LARGE, "prompt": "y"})[0]
    engine.questions.answer(mark(engine), yes=True)
    assert engine.questions.open() is None
    third = engine.submit({**LARGE, "prompt": "z"})[0]
    assert status(engine, third) == (QUEUED, False)  # another tab, another Generate: not asked again
    assert work() and work() and work()
    assert [status(engine, one)[0] for one in (first, second, third)] == [DONE] * 3
    assert work.__self__.fetched == [URL]


def test_a_no_cancels_what_waits_for_it_alone(engine, work):
    waits, other = engine.submit(LARGE)[0], engine.submit(HERE)[0]
    engine.questions.answer(mark(engine), yes=False)
    assert status(engine, waits)[0] == CANCELLED and status(engine, other)[0] == QUEUED
    assert engine.agreed.given() == frozenset()


def test_a_yes_is_for_what_was_shown(engine):
    job = engine.submit(LARGE)[0]
    with pytest.raises(UserError, match="has changed meanwhile"):
        engine.questions.answer("another", yes=True)
    assert status(engine, job) == (QUEUED, True) and not engine.agreed.given()


def test_grids_and_forever_wait_too(engine, work):
    values = {**LARGE, "grid": {"x": ["model_type", "large, fake"]}}
    cells = [job_id for job_id, _ in engine.submit_all(values)]
    assert sorted(status(engine, one)[1] for one in cells) == [False, True]
    rounds = engine.forever.start(LARGE)
    assert status(engine, rounds[0][0]) == (QUEUED, True)
    engine.questions.answer(mark(engine), yes=True)
    assert not engine.store.asking()
    engine.forever.stop()


def test_a_waiting_job_and_its_yes_outlive_a_restart(engine, root, work):
    job = engine.submit(LARGE)[0]
    again = Engine(EngineConfig.at(root, warm=False), handler_for)
    assert again.questions.open().jobs[0].id == job
    again.questions.answer(mark(again), yes=True)
    assert URL in agreed_in(engine.store.path)
    assert work() and status(engine, job) == (DONE, False)


def test_files_that_came_meanwhile_are_not_asked_for(engine, root, work):
    job = engine.submit(LARGE)[0]
    (root / "ckpts").mkdir()
    (root / "ckpts" / "large.safetensors").write_bytes(b"weights")
    assert engine.questions.open() is None and status(engine, job) == (QUEUED, False)


def test_the_button_of_the_tab_models_is_a_yes_and_removing_takes_it_back(engine, monkeypatch):
    job = engine.submit(LARGE)[0]
    monkeypatch.setattr(engine.downloads, "_work", lambda: None)
    engine.downloads.start("large")
    assert engine.questions.open() is None and status(engine, job) == (QUEUED, False)
    engine.downloads.cancel("large")
    assert engine.agreed.given() == frozenset()


def test_edited_and_retried_jobs_are_asked_about(engine, work):
    job = engine.submit(HERE)[0]
    engine.edit(job, LARGE)
    assert status(engine, job) == (QUEUED, True)
    engine.cancel(job)
    again = engine.store.retry(job)  # nothing was asked: the worker finds it out
    assert work() and status(engine, again) == (QUEUED, True)
    assert engine.store.job(again).attempts == 0 and not engine.store.job(again).notes


def test_what_follows_typing_asks_nothing_and_is_not_queued(engine):
    with pytest.raises(NotAgreed):
        engine.submit(LARGE, source="live", newest_wins=True)
    assert not engine.store.queue()


def test_small_downloads_are_not_asked_for(engine, monkeypatch):
    monkeypatch.setattr(consent, "LARGE", 8 * 10**9)
    assert status(engine, engine.submit(LARGE)[0]) == (QUEUED, False)


def test_cancelling_wins_over_asking(tmp_path):
    store = JobStore(tmp_path / "q.sqlite3")
    job = store.submit({"prompt": "x"})
    store.claim_next()
    store.request_cancel(job)
    store.ask([job])
    assert store.job(job).status == CANCELLED


# ---------------------------------------------------------------- programs


def test_programs_are_refused_or_say_yes_beforehand(engine):
    with pytest.raises(NotAgreed, match=r"Large is not on this computer: 8.0 GB \(bf16\) .*--download"):
        engine.submit_all(LARGE, source="api")
    assert not engine.store.queue()
    job = engine.submit_all(LARGE, source="api", download=True)[0][0]
    assert status(engine, job) == (QUEUED, False)
    assert engine.submit_all(LARGE, source="api")  # the yes stays


def test_a_job_without_a_page_fails_with_the_sentence(engine, work):
    job = engine.store.submit(engine.catalog.validate(LARGE).settings | {"seed": 1}, source="api")
    assert work() and status(engine, job)[0] == FAILED
    assert "8.0 GB (bf16) would have to be downloaded" in engine.store.job(job).error


_CLI = """
import sys
from pathlib import Path
from shared.cli import main as cli
from tests.support.large_family import handler_for
root = Path(sys.argv[1])
command = (sys.executable, "-m", "tests.support.large_family")
sys.exit(cli.main(sys.argv[2:], root=root, handler_for=handler_for, worker_command=command, warm=False))
"""


def command_line(root, *arguments, **options):
    task = root / "task.json"
    task.write_text(json.dumps(LARGE))
    command = [sys.executable, "-c", _CLI, str(root), "--process", str(task), *arguments]
    return subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, **options)


def test_the_command_line_refuses_without_a_terminal(root):
    process = command_line(root, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE)
    _, said = process.communicate(timeout=LIMIT)
    assert process.returncode == 2 and "8.0 GB (bf16)" in said and "--download" in said
    assert not agreed_in(root / "outputs" / ".zgp" / "zgp.sqlite3")


@pytest.mark.skipif(os.name == "nt", reason="a terminal of Unix")
@pytest.mark.parametrize(("answer", "agreed"), [("n\n", set()), ("y\n", {URL})])
def test_the_command_line_asks_on_a_terminal(root, answer, agreed):
    ours, theirs = pty.openpty()
    process = command_line(root, stdin=theirs, stderr=theirs, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    os.close(theirs)
    os.write(ours, answer.encode())
    database = root / "outputs" / ".zgp" / "zgp.sqlite3"
    process.communicate(timeout=LIMIT)  # after a yes it fails, as it is offline
    os.close(ours)
    assert process.returncode == (1 if agreed else 2) and agreed_in(database) == agreed
