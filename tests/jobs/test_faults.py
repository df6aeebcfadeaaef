"""Kills, full disks and damage: nothing finished is lost, no job touches another, everything is said."""

import contextlib
import os
import signal
import sqlite3
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image

from shared.engine.configuration import EngineConfig
from shared.engine.engine import Engine
from shared.imaging import metadata
from shared.worker import failures
from tests.support.browser import ROOT, serve
from tests.support.fake_family import handler_for, make_root
from tests.support.waiting import until

REQUEST = {
    "model_type": "z_image_mini", "prompt": "a red circle", "seed": 3, "num_inference_steps": 4,
    "batch_size": 2,
}  # fmt: skip
posix_only = pytest.mark.skipif(os.name == "nt", reason="Windows has no kill -9")


def ended(engine, jobs):
    until(lambda: all(engine.store.job(job).finished for job in jobs))
    return [engine.store.job(job) for job in jobs]


def pixels(engine, job):
    return [Image.open(image.path).tobytes() for image in engine.store.images(job)]


@dataclass(frozen=True)
class Faulty:
    """An engine on the Mini models. Its worker has the fault that `wanted` names, once."""

    engine: Engine
    wanted: Path

    def arrange(self, fault):
        self.wanted.write_text(fault)

    def happened(self):
        return not self.wanted.exists()

    def files(self):
        return {str(path) for path in self.engine.config.output_dir.glob("*/*.png")}


@contextlib.contextmanager
def started(folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ZGP_FAULT", str(folder / "fault"))
        command = (sys.executable, "-m", "tests.support.fault_worker")
        places = {"output_dir": folder / "outputs", "database": folder / ".zgp" / "zgp.sqlite3"}
        engine = Engine(EngineConfig.at(ROOT, **places, worker_command=command, warm=False))
        engine.start()
        yield Faulty(engine, folder / "fault")
        engine.stop()


@pytest.fixture(scope="module")
def faulty(tmp_path_factory):
    """One for all tests: a worker takes seconds to start."""
    with started(tmp_path_factory.mktemp("faulty")) as one:
        yield one


def leaves_each_picture_once(faulty, fault):
    engine, before = faulty.engine, faulty.files()
    faulty.arrange(fault)
    jobs = [engine.submit(REQUEST)[0] for _ in range(3)]
    assert [(job.status, job.attempts) for job in ended(engine, jobs)] == [
        ("done", 2),
        ("done", 1),
        ("done", 1),
    ]
    assert faulty.happened()
    [note] = engine.store.job(jobs[0]).notes
    assert "SIGKILL" in note
    assert pixels(engine, jobs[0]) == pixels(engine, jobs[1]) == pixels(engine, jobs[2])
    assert {image.path for image in engine.store.images()} == faulty.files()
    new = faulty.files() - before
    assert len(new) == 6
    for path in new:  # whatever is called a picture is a whole one
        Image.open(path).load()
        assert metadata.read(path)["prompt"] == "a red circle"


@posix_only
@pytest.mark.slow
def test_a_worker_killed_while_it_loads_leaves_each_picture_once(tmp_path):
    with started(tmp_path) as fresh:
        leaves_each_picture_once(fresh, "killed_at_load")


@posix_only
@pytest.mark.slow
@pytest.mark.parametrize(
    "fault",
    [
        "killed_at_a_step",
        "killed_while_a_file_is_written",
        "killed_before_a_picture_is_recorded",
        "killed_before_a_file_is_named",
        "killed_before_a_picture_is_announced",
    ],
)
def test_a_killed_worker_leaves_each_picture_once(faulty, fault):
    leaves_each_picture_once(faulty, fault)


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["database_full", "disk_full"])
def test_a_full_disk_fails_one_job_and_says_so(faulty, fault):
    engine, before = faulty.engine, {job.id for job in faulty.engine.store.failures()}
    faulty.arrange(fault)
    first, second = (engine.submit(REQUEST)[0] for _ in range(2))
    failed, done = ended(engine, [first, second])
    assert (failed.status, done.status) == ("failed", "done") and faulty.happened()
    assert "full" in failed.error.lower()
    assert {job.id for job in engine.store.failures()} - before == {first}
    retried = engine.store.retry(first)
    assert ended(engine, [retried])[0].status == "done"
    assert pixels(engine, retried) == pixels(engine, second)


@pytest.mark.slow
def test_an_end_that_cannot_be_written_is_written_later(faulty):
    engine = faulty.engine
    faulty.arrange("end_not_written")
    jobs = [engine.submit(REQUEST)[0] for _ in range(2)]
    assert [(job.status, job.attempts) for job in ended(engine, jobs)] == [("done", 1)] * 2
    assert faulty.happened()


@posix_only
@pytest.mark.slow
def test_a_killed_server_finds_its_queue_and_pictures_again(tmp_path):
    folder = tmp_path / "outputs"
    client = Engine(EngineConfig.at(ROOT, output_dir=folder, database=folder / ".zgp" / "zgp.sqlite3"))
    long = {**REQUEST, "model_type": "z_image_mini_base", "num_inference_steps": 100, "batch_size": 8}
    with serve(folder) as server:
        done, running, waiting = (client.submit(values)[0] for values in (REQUEST, long, REQUEST))
        until(lambda: client.store.job(running).step > 1)
        before = pixels(client, done)
        os.kill(server.pid, signal.SIGKILL)
    assert client.store.job(waiting).status == "queued"
    with serve(folder):
        until(lambda: client.store.job(running).step > 1 and client.store.job(running).attempts == 2)
        client.cancel(running)
        last = ended(client, [running, waiting])[1]
    assert (last.status, last.attempts) == ("done", 1)
    assert pixels(client, waiting) == pixels(client, done) == before
    started = [event.job_id for event in client.store.events(0, kinds=["started"])]
    assert started == [done, running, running, waiting]


# -- with a family that needs no torch ----------------------------------------------------------------------


@pytest.fixture
def engine(tmp_path):
    root = make_root(tmp_path / "project")
    command = (sys.executable, "-m", "tests.support.fake_family")
    engine = Engine(
        EngineConfig.at(root, worker_command=command, restart_seconds=0.01, warm=False), handler_for
    )
    yield engine
    engine.stop()


def test_no_failing_job_touches_another(engine):
    prompts = ["one", "user_error", "two", "crash", "three", "surprise", "memory_error", "four"]
    jobs = [engine.submit({"model_type": "fake", "prompt": prompt, "seed": 5})[0] for prompt in prompts]
    engine.start()
    found = ended(engine, jobs)
    good = {"one", "two", "three", "four"}
    assert [job.status for job in found] == ["done" if prompt in good else "failed" for prompt in prompts]
    assert [len(engine.store.images(job)) for job in jobs] == [int(prompt in good) for prompt in prompts]
    errors = {prompt: job.error for prompt, job in zip(prompts, found, strict=True) if job.error}
    assert errors["memory_error"] == failures.OUT_OF_RAM and "SIGABRT" in errors["crash"]
    first_starts = dict.fromkeys(event.job_id for event in engine.store.events(0, kinds=["started"]))
    assert list(first_starts) == jobs


def test_cancelling_between_the_pictures_of_a_batch_keeps_those_that_are_done(engine, monkeypatch):
    from shared.weights.files import Folders
    from shared.worker.model_manager import ModelHost
    from shared.worker.worker import Worker

    root, store = engine.config.root, engine.store
    host = ModelHost(Folders(root, root / "ckpts"), handler_for=handler_for)
    mine = Worker(store, host, engine.config.output_dir, engine.config.log_file)
    job, _ = engine.submit({"model_type": "fake", "prompt": "x", "seed": 5, "batch_size": 4})
    real = store.announce_image

    def announce_and_cancel(image_id):
        if store.image(image_id).index == 1:
            store.request_cancel(job)
        real(image_id)

    monkeypatch.setattr(store, "announce_image", announce_and_cancel)
    monkeypatch.setattr("shared.worker.progress.CANCEL_SECONDS", 0)
    assert mine.run_one()
    assert store.job(job).status == "cancelled"
    assert [Path(image.path).is_file() for image in store.images(job)] == [True, True]


def test_stopping_on_a_full_disk_leaves_the_job_for_the_next_start(engine, monkeypatch, tmp_path):
    job, _ = engine.submit({"model_type": "fake", "prompt": f"hold {tmp_path / 'go'}"})
    engine.start()
    until(lambda: engine.store.job(job).step)

    def full(*arguments, **options):
        raise sqlite3.OperationalError("database or disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(engine.store, "recover_running", full)
        engine.stop()
    assert not engine.supervises and engine.store.job(job).status == "running"
    (tmp_path / "go").touch()
    again = Engine(engine.config, handler_for)
    again.start()
    try:
        assert [(one.status, one.attempts) for one in ended(again, [job])] == [("done", 2)]
    finally:
        again.stop()


@pytest.mark.slow
def test_a_held_job_and_a_pause_outlive_a_restart(engine):
    held, other = (engine.submit({"model_type": "fake", "prompt": "x"})[0] for _ in range(2))
    engine.store.hold(held)
    engine.start()
    assert ended(engine, [other])[0].status == "done"
    engine.store.pause()
    engine.stop()
    again = Engine(engine.config, handler_for)
    again.start()
    try:
        again.store.release(held)
        time.sleep(0.3)
        assert again.store.job(held).status == "queued"
        again.store.resume()
        assert ended(again, [held])[0].status == "done"
    finally:
        again.stop()


@pytest.mark.slow
def test_a_corrupt_database_costs_no_picture_and_is_said(engine):
    engine.start()
    job, _ = engine.submit({"model_type": "fake", "prompt": "x"})
    ended(engine, [job])
    picture = Path(engine.store.images(job)[0].path)
    engine.stop()
    for suffix in ("-wal", "-shm"):
        engine.config.database.with_name(engine.config.database.name + suffix).unlink(missing_ok=True)
    engine.config.database.write_bytes(b"\0garbage" * 4000)
    again = Engine(engine.config, handler_for)
    assert "is damaged: it was kept as" in again.store.notice
    again.start()
    try:
        assert ended(again, [again.submit({"model_type": "fake", "prompt": "y"})[0]])[0].status == "done"
        assert picture.is_file()
    finally:
        again.stop()
