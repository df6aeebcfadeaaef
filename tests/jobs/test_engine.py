"""The engine end to end with a family that needs no torch: submit, follow, cancel, and survive crashes."""

import dataclasses
import hashlib
import itertools
import logging
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import types
from pathlib import Path

import pytest
import torch
from PIL import Image

from models.z_image import loading
from shared.engine.configuration import EngineConfig, worker_environment
from shared.engine.engine import Engine
from shared.errors import UserError
from shared.gpu import planner
from shared.gpu.planner import Machine, Overrides
from shared.imaging import metadata
from shared.jobs import supervisor
from shared.jobs.store import JobStore
from shared.jobs.supervisor import Supervisor, describe_exit
from shared.library.catalog import catalog
from shared.settings.table import SettingsError
from shared.weights.downloads import DownloadProgress
from shared.weights.files import Folders
from shared.worker import failures, file_hashes, worker
from shared.worker.component_cache import PartStore
from shared.worker.model_manager import ModelHost, Silent, check_device, download_report
from shared.worker.progress import Progress, contact_sheet
from tests.support import fake_family
from tests.support.fake_family import Handler, handler_for, make_root
from tests.support.fake_worker import FAKE_WORKER, posix_only
from tests.support.waiting import LIMIT, until

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def root(tmp_path):
    return make_root(tmp_path / "project")


@pytest.fixture
def config(root):
    return EngineConfig.at(root, worker_command=FAKE_WORKER, restart_seconds=0.01, warm=False)


@pytest.fixture
def engine(config):
    engine = Engine(config, handler_for)
    engine.start()
    yield engine
    engine.stop()


def values(prompt="a circle", **others):
    return {"model_type": "fake", "prompt": prompt, "seed": 5, **others}


def run(engine, prompt="a circle", **others):
    job_id, _ = engine.submit(values(prompt, **others))
    return finished(engine, job_id)


def finished(engine, job_id):
    until(lambda: engine.store.job(job_id).finished)
    return engine.store.job(job_id)


def is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/stat")
    return not status.exists() or status.read_text().rpartition(")")[2].split()[0] != "Z"


# -- a job that goes well -----------------------------------------------------------------------------------


def test_a_job_becomes_files_with_metadata(engine, root):
    job = run(engine, "a green circle", batch_size=3)
    assert (job.status, job.error, job.notes) == ("done", None, ["a note"])
    images = engine.store.images(job.id)
    assert [(image.index, image.seed) for image in images] == [(0, 5), (1, 6), (2, 7)]
    for image in images:
        path = Path(image.path)
        assert path.parent.parent == root / "outputs" and "seed" in path.name
        with Image.open(path) as picture:
            assert picture.getpixel((0, 0)) == (image.seed, 0, 0)
        written = metadata.read(path)
        assert written["prompt"] == "a green circle"
        assert metadata.settings_from(written)["seed"] == image.seed
        assert written == image.metadata
    assert set(Path(images[0].path).parent.iterdir()) == {Path(image.path) for image in images}


def test_the_files_hashes_are_in_the_metadata(engine):
    expected = hashlib.sha256(b"weights of fake.bin").hexdigest()
    job = run(engine)
    assert expected in repr(engine.store.images(job.id)[0].metadata)


def test_follow_replays_a_job_from_its_first_event_to_its_last(engine):
    job_id, validated = engine.submit(values(num_inference_steps=4))
    assert validated.settings["num_inference_steps"] == 4
    kinds = [event.kind for event in engine.follow(job_id)]
    assert kinds[:2] == ["queued", "started"] and kinds[-1] == "done"
    assert "phase" in kinds and kinds.count("image") == 1
    again = [event.kind for event in engine.follow(job_id)]
    assert again[0] == "queued" and again[-1] == "done"


def test_follow_of_an_unknown_job_is_a_sentence(engine):
    with pytest.raises(UserError, match="no job 99"):
        next(engine.follow(99))


def test_a_random_seed_is_fixed_when_the_job_is_submitted(engine):
    job_id, validated = engine.submit(values(seed=-1))
    assert validated.settings["seed"] >= 0
    assert engine.store.job(job_id).settings == validated.settings
    assert finished(engine, job_id).status == "done"
    assert engine.store.images(job_id)[0].seed == validated.settings["seed"]


def test_a_job_may_have_its_own_folder(engine, tmp_path):
    job_id, _ = engine.submit(values(), output_dir=tmp_path / "mine")
    finished(engine, job_id)
    assert Path(engine.store.images(job_id)[0].path).parent == tmp_path / "mine"


def test_a_worker_keeps_its_model_until_another_is_wanted(engine, root):
    for model in ("fake", "fake", "other"):
        assert run(engine, model_type=model).status == "done"
    phases = [event.data["phase"] for event in engine.store.events(0) if event.kind == "phase"]
    assert phases.count("Loading model") == 2


def test_previews_come_while_a_job_runs(engine, tmp_path):
    job_id, _ = engine.submit(values(f"hold {tmp_path / 'go'}", batch_size=2))
    _, jpeg = until(lambda: engine.store.preview(job_id))
    assert jpeg.startswith(b"\xff\xd8")
    (tmp_path / "go").touch()
    assert finished(engine, job_id).status == "done"


# -- a job that does not ------------------------------------------------------------------------------------


def test_a_running_job_is_cancelled_and_the_next_one_runs(engine, tmp_path):
    job_id, _ = engine.submit(values(f"hold {tmp_path / 'never'}"))
    next_id, _ = engine.submit(values())
    until(lambda: engine.store.job(job_id).step)
    engine.cancel(job_id)
    assert finished(engine, job_id).status == "cancelled"
    assert finished(engine, next_id).status == "done"


@pytest.mark.parametrize(
    ("prompt", "sentence", "logged"),
    [
        ("user_error", "The fake model cannot do that: ask for something else.", False),
        ("memory_error", failures.OUT_OF_RAM, False),
        ("surprise", "LookupError: nobody expected this; the log", True),
    ],
)
def test_a_failure_is_its_jobs_own(engine, prompt, sentence, logged):
    failed = run(engine, prompt)
    assert failed.status == "failed" and failed.error.startswith(sentence)
    assert run(engine).status == "done"
    assert ("Traceback" in engine.config.log_file.read_text()) == logged
    assert not logged or str(engine.config.log_file) in failed.error


def test_a_picture_that_cannot_be_saved_fails_its_job_only(engine, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    job_id, _ = engine.submit(values(), output_dir=tmp_path / "file")
    assert finished(engine, job_id).status == "failed"
    assert run(engine).status == "done"


def test_a_full_disk_is_said_in_words(root, config, monkeypatch):
    store = JobStore(config.database)
    host = ModelHost(Folders(root, root / "ckpts"), handler_for=handler_for)
    mine = worker.Worker(store, host, config.output_dir, config.log_file)

    def full(*arguments):
        raise OSError(28, "No space left on device")

    engine = Engine(config, handler_for)
    job_id, _ = engine.submit(values())
    monkeypatch.setattr(worker.saving, "save_image", full)
    assert mine.run_one()
    assert store.job(job_id).error == failures.DISK_FULL
    monkeypatch.undo()
    next_id, _ = engine.submit(values())
    assert mine.run_one() and store.job(next_id).status == "done"


def test_a_missing_file_without_an_address_is_said(engine):
    job = run(engine, model_type="absent", resolution="64x64")
    assert job.status == "failed" and "absent.bin" in job.error


def test_a_card_that_went_away_fails_its_jobs(engine, root, tmp_path):
    blocker, _ = engine.submit(values(f"hold {tmp_path / 'go'}"))
    job_id, _ = engine.submit(values(model_type="other"))
    (root / "defaults" / "other.json").unlink()
    (tmp_path / "go").touch()
    assert finished(engine, blocker).status == "done"
    assert "no model 'other'" in finished(engine, job_id).error


@pytest.mark.parametrize(
    ("wrong", "problem"),
    [
        ({"model_type": "fakk"}, "fake"),
        ({"model_type": ["fake"]}, "no model"),
        ({"prompt": ""}, "prompt"),
        ({"resolution": "65x64"}, "64x64"),
        ({"prompt": "a dragon"}, "draws no dragons"),
    ],
)
def test_wrong_settings_never_reach_the_queue(engine, wrong, problem):
    with pytest.raises(SettingsError, match=problem):
        engine.submit(values() | wrong)
    assert engine.store.jobs() == []


# -- the ladder ---------------------------------------------------------------------------------------------

CARD = Machine("Card", 64 << 30, 60 << 30, 8 << 30, 8 << 30, (8, 6))


class OutOfMemoryError(RuntimeError):
    """Named like torch's."""


class Failing:
    """Raises for the first `times` calls."""

    def __init__(self, times, error=None):
        self.left, self.error = times, error or OutOfMemoryError("no memory")

    def __call__(self, *arguments):
        if self.left:
            self.left -= 1
            raise self.error


@pytest.fixture
def ladder(root, config):
    """Runs jobs of a family with a ladder through the real worker, in this process: (job, worker)."""
    store = JobStore(config.database)
    host = ModelHost(
        Folders(root, root / "ckpts"), handler_for=lambda name: fake_family.Planned, machine=lambda: CARD
    )
    mine = worker.Worker(store, host, config.output_dir, config.log_file)
    engine = Engine(config, lambda name: fake_family.Planned)

    def run(**others):
        job_id, _ = engine.submit(values(**others))
        assert mine.run_one()
        return store.job(job_id)

    run.store, run.host, run.submit, run.run_one = store, host, engine.submit, mine.run_one
    return run


def inject(monkeypatch, place, fail):
    """Make the fake family call `fail` at load, encode, a step or decode."""
    load, generate = Handler.load_model, fake_family.Processor.generate
    decoded = fake_family.decoded

    def failing_load(*arguments, **options):
        fail()
        return load(*arguments, **options)

    def failing_generate(self, settings, *, on_phase, on_step, **others):
        def phase(name):
            on_phase(name)
            if place == "encode":
                fail()

        def step(number, *arguments):
            on_step(number, *arguments)
            if place == "step" and number == 2:
                fail()

        return generate(self, settings, on_phase=phase, on_step=step, **others)

    def failing_decoded(command, argument, seeds):
        for number, seed in enumerate(seeds):
            if place == "decode" and number == 1:
                fail()
            yield from decoded(command, argument, [seed])

    if place == "load":
        monkeypatch.setattr(fake_family.Planned, "load_model", staticmethod(failing_load))
    monkeypatch.setattr(fake_family.Processor, "generate", failing_generate)
    monkeypatch.setattr(fake_family, "decoded", failing_decoded)


@pytest.mark.parametrize("place", ["load", "encode", "step", "decode"])
@pytest.mark.parametrize(
    "error", [OutOfMemoryError("no memory"), RuntimeError("CUDA out of memory. Tried"), MemoryError()]
)
def test_a_job_that_does_not_fit_is_made_one_rung_lower(ladder, monkeypatch, place, error):
    inject(monkeypatch, place, Failing(1, error))
    job = ladder(batch_size=3)
    assert (job.status, job.error) == ("done", None)
    images = ladder.store.images(job.id)
    assert [image.seed for image in images] == [5, 6, 7]
    [note] = [note for note in job.notes if "did not fit" in note]
    assert note == (
        "It did not fit at 'mmgp, bf16, 8 of 20 layers resident, VAE tiled: about 6.4 of 8 GB': "
        "made with 'mmgp, bf16, 6 of 20 layers resident, VAE tiled: about 5.4 of 8 GB'."
    )
    assert note in repr(images[-1].metadata)
    following = ladder(batch_size=3)
    assert following.status == "done" and "did not fit" not in repr(following.notes)


def test_images_saved_before_the_memory_ran_out_are_not_made_again(ladder, monkeypatch):
    inject(monkeypatch, "decode", Failing(1))
    job = ladder(batch_size=3)
    kinds = [event.kind for event in ladder.store.events(0, job.id)]
    assert kinds.count("image") == 3


def test_what_was_learned_stays_for_jobs_of_the_same_kind_only(ladder, monkeypatch):
    inject(monkeypatch, "step", Failing(1))
    ladder()
    ladder()
    assert ladder.host.planned.rung == 1
    ladder(resolution="128x128")
    assert ladder.host.planned.rung == 0


def test_below_the_lowest_rung_a_job_fails_and_the_next_one_runs(ladder, monkeypatch):
    inject(monkeypatch, "step", Failing(4))
    job = ladder()
    assert (job.status, job.error) == ("failed", failures.OUT_OF_MEMORY)
    assert ladder.host.planned.last and ladder.host.planned.resident_layers == 0
    assert ladder().status == "done"


def test_a_plan_is_an_event_before_the_model_is_loaded(ladder, monkeypatch):
    job = ladder()
    phases = [e.data["phase"] for e in ladder.store.events(0, job.id) if e.kind == "phase"]
    plan = phases.index("Plan: mmgp, bf16, 8 of 20 layers resident, VAE tiled: about 6.4 of 8 GB")
    assert plan < phases.index("Loading model")
    other = dataclasses.replace(CARD, vram_free=7 << 30, ram_free=50 << 30)  # but still as much as is used
    monkeypatch.setattr(ladder.host, "_machine", lambda: other)
    again = ladder()
    phases = [e.data["phase"] for e in ladder.store.events(0, again.id) if e.kind == "phase"]
    assert not [phase for phase in phases if phase.startswith(("Plan", "Loading"))]


def test_a_card_that_is_too_small_is_said(ladder, monkeypatch):
    monkeypatch.setattr(ladder.host, "_machine", lambda: dataclasses.replace(CARD, vram_total=1 << 30))
    job = ladder()
    assert job.status == "failed" and "This job needs about" in job.error


# -- crashes ------------------------------------------------------------------------------------------------


def test_a_job_that_kills_the_worker_is_tried_once_more(engine, tmp_path):
    job = run(engine, f"crash_once {tmp_path / 'marker'}")
    assert (job.status, job.attempts) == ("done", 2)
    assert "worker process stopped" in job.notes[0]


def test_a_job_that_always_kills_the_worker_fails_and_the_others_go_on(engine):
    first, _ = engine.submit(values("crash"))
    second, _ = engine.submit(values())
    job = finished(engine, first)
    assert (job.status, job.attempts) == ("failed", 2)
    assert "worker process stopped" in job.error
    assert finished(engine, second).status == "done"


def test_images_saved_before_a_crash_are_not_made_again(engine, tmp_path):
    job = run(engine, f"crash_after_first {tmp_path / 'marker'}", batch_size=3)
    assert (job.status, job.attempts) == ("done", 2)
    assert [image.seed for image in engine.store.images(job.id)] == [5, 6, 7]
    assert len(list(Path(engine.store.images(job.id)[0].path).parent.iterdir())) == 3


@posix_only
def test_kill_9_in_the_middle_of_a_job(engine, tmp_path):
    job_id, _ = engine.submit(values(f"hold {tmp_path / 'go'}"))
    until(lambda: engine.store.job(job_id).step)
    pid = engine.worker_pid
    os.kill(pid, signal.SIGKILL)
    until(lambda: engine.store.job(job_id).attempts == 2)
    (tmp_path / "go").touch()
    job = finished(engine, job_id)
    assert job.status == "done" and engine.worker_pid != pid
    assert "SIGKILL" in job.notes[0]


@posix_only
def test_a_job_killed_twice_is_told_what_to_do(engine, tmp_path):
    job_id, _ = engine.submit(values(f"hold {tmp_path / 'never'}"))
    for attempt in (1, 2):
        until(lambda n=attempt: engine.store.job(job_id).attempts == n and engine.store.job(job_id).step)
        os.kill(engine.worker_pid, signal.SIGKILL)
    job = finished(engine, job_id)
    assert job.status == "failed" and job.error.endswith(f"the memory ran out). {supervisor.AFTER_A_KILL}")


@posix_only
def test_kill_9_of_an_idle_worker_costs_nothing(engine):
    assert run(engine).status == "done"
    os.kill(engine.worker_pid, signal.SIGKILL)
    job = run(engine)
    assert (job.status, job.attempts) == ("done", 1)


def test_an_error_that_ruins_the_device_gets_a_fresh_worker(engine, tmp_path):
    pid = until(lambda: engine.worker_pid)
    assert "CUDA error" in run(engine, f"cuda_error {tmp_path / 'marker'}").error
    assert run(engine, f"cuda_error {tmp_path / 'marker'}").status == "done"
    assert engine.worker_pid != pid


def supervisor_of(tmp_path, code):
    """A supervisor of workers that run `code`, which appends a line to the file "lives"."""
    store = JobStore(tmp_path / "zgp.sqlite3")
    command = [sys.executable, "-c", f"open({str(tmp_path / 'lives')!r}, 'a').write('.');{code}"]
    return store, Supervisor(store, command, log_file=tmp_path / "zgp.log", restart_seconds=0.001)


def test_a_worker_that_cannot_start_fails_what_waits_and_is_not_started_for_nothing(tmp_path):
    store, supervisor = supervisor_of(tmp_path, "raise SystemExit(3)")
    job_id = store.submit({"prompt": "a circle"})
    supervisor.start()
    until(lambda: store.job(job_id).finished)
    assert "3 times right after its start (exit code 3)" in store.job(job_id).error
    assert (tmp_path / "lives").read_text() == "..."
    again = store.submit({"prompt": "a circle"})  # somebody tries again, perhaps after mending it
    until(lambda: store.job(again).finished)
    supervisor.stop()
    assert (tmp_path / "lives").read_text() == "...."


def test_stop_while_the_worker_keeps_dying_does_not_hang(tmp_path):
    _, supervisor = supervisor_of(tmp_path, "raise SystemExit(3)")
    supervisor.start()
    until(lambda: (tmp_path / "lives").exists())
    supervisor.stop()
    assert supervisor.worker_pid is None and not supervisor.supervises


def test_a_worker_that_does_not_hear_the_end_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr("shared.jobs.supervisor.STOP_SECONDS", 0.05)
    _, supervisor = supervisor_of(tmp_path, "import time;time.sleep(1000)")
    supervisor.start()
    until(lambda: (tmp_path / "lives").exists())
    supervisor.stop()
    assert supervisor.worker_pid is None


# -- starting, stopping, several processes ------------------------------------------------------------------


def test_stop_puts_the_running_job_back_and_the_next_start_finishes_it(config, tmp_path):
    engine = Engine(config, handler_for)
    engine.start()
    job_id, _ = engine.submit(values(f"hold {tmp_path / 'go'}"))
    until(lambda: engine.store.job(job_id).step)
    engine.stop()
    assert engine.store.job(job_id).status == "queued"
    (tmp_path / "go").touch()
    engine = Engine(config, handler_for)
    engine.start()
    job = finished(engine, job_id)
    engine.stop()
    assert (job.status, job.attempts) == ("done", 1)


def test_a_second_engine_is_a_client_and_takes_over(config):
    first, second = Engine(config, handler_for), Engine(config, handler_for)
    first.start()
    second.start()
    assert (first.supervises, second.supervises) == (True, False)
    assert run(second).status == "done" and second.worker_pid is None
    first.stop()
    assert run(second).status == "done" and second.supervises
    second.stop()


START_AND_DIE = """
import sys, time; from pathlib import Path
from shared.engine.configuration import EngineConfig
from shared.engine.engine import Engine
from tests.support.fake_family import handler_for
command = (sys.executable, "-m", "tests.support.fake_family")
engine = Engine(EngineConfig.at(Path(sys.argv[1]), worker_command=command, warm=False), handler_for)
engine.start()
job_id, _ = engine.submit({"model_type": "fake", "prompt": "hold " + sys.argv[2], "seed": 5})
while not engine.store.job(job_id).step: time.sleep(0.01)
print(engine.worker_pid, flush=True)
sys.stdin.read()
"""


@posix_only
def test_kill_9_of_the_supervisor_leaves_no_orphan_and_its_job_is_recovered(root, config, tmp_path):
    parent = subprocess.Popen(
        [sys.executable, "-c", START_AND_DIE, root, tmp_path / "go"],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    pid = int(parent.stdout.readline())
    parent.kill()
    parent.communicate()
    until(lambda: not is_alive(pid))
    (tmp_path / "go").touch()
    engine = Engine(config, handler_for)
    engine.start()
    job = finished(engine, 1)
    engine.stop()
    assert (job.status, job.attempts) == ("done", 2)


def test_the_first_worker_warms_the_default_model_up(root, config):
    engine = Engine(EngineConfig.at(root, worker_command=FAKE_WORKER, verbose=1), handler_for)
    engine.start()
    until(lambda: "is loaded" in engine.config.log_file.read_text())
    engine.stop()
    assert "fake is loaded" in engine.config.log_file.read_text()


def test_a_model_that_cannot_be_warmed_up_only_makes_a_line_in_the_log(root, config, caplog, monkeypatch):
    def broken(*arguments, **options):
        raise UserError("The file is damaged.")

    monkeypatch.setattr(Handler, "load_model", broken)
    host = ModelHost(Folders(root, root / "ckpts"), handler_for=handler_for)
    with caplog.at_level(logging.WARNING):
        worker.Worker(JobStore(config.database), host, root, config.log_file).warm_up("fake")
    assert "could not be loaded in advance" in caplog.text


def test_what_imports_nothing_heavy_stays_light(root):
    code = (
        "import sys; from pathlib import Path\n"
        "from shared.engine.configuration import EngineConfig; from shared.engine.engine import Engine\n"
        "engine = Engine(EngineConfig.at(Path(sys.argv[1]), worker_command=(sys.executable, '-c', '')))\n"
        "engine.start(); engine.stop()\n"
        "heavy = {'torch', 'transformers', 'diffusers', 'mmgp', 'gradio', 'accelerate'} & set(sys.modules)\n"
        "sys.exit(', '.join(heavy) or 0)"
    )
    subprocess.run([sys.executable, "-c", code, root], cwd=ROOT, check=True, timeout=LIMIT)


@pytest.mark.parametrize(
    ("gpu", "inherited", "visible"),
    [
        ("", None, None),
        ("", "2,3", "2,3"),
        ("cpu", "2,3", ""),
        ("cuda:1", None, "1"),
        ("cuda:1", "2,GPU-7", "GPU-7"),
    ],
)
def test_the_worker_sees_only_the_chosen_device(gpu, inherited, visible):
    variables = {} if inherited is None else {"CUDA_VISIBLE_DEVICES": inherited}
    assert worker_environment(gpu, variables).get("CUDA_VISIBLE_DEVICES") == visible


def test_a_device_that_is_not_visible_is_a_sentence():
    with pytest.raises(UserError, match="shows 1 devices"):
        worker_environment("cuda:1", {"CUDA_VISIBLE_DEVICES": "0"})


def test_threads_that_wait_leave_the_processor_to_others_unless_the_user_says_otherwise():
    assert worker_environment("", {})["OMP_WAIT_POLICY"] == "PASSIVE"
    assert worker_environment("", {"OMP_WAIT_POLICY": "ACTIVE"})["OMP_WAIT_POLICY"] == "ACTIVE"


def test_a_card_that_is_not_there_is_never_replaced_by_the_cpu(monkeypatch):
    absent = types.SimpleNamespace(cuda=types.SimpleNamespace(is_available=lambda: False))
    monkeypatch.setitem(sys.modules, "torch", absent)
    with pytest.raises(UserError, match="--gpu came as cuda:7"):
        check_device("cuda:7")
    check_device("cpu")


def test_a_model_that_goes_gives_its_memory_back(root, monkeypatch):
    released = []
    residency = types.SimpleNamespace(forget=lambda: released.append(True))
    pipe = types.SimpleNamespace(residency=residency)
    monkeypatch.setattr(Handler, "load_model", lambda *arguments, **options: (None, pipe))
    host = ModelHost(Folders(root, root / "ckpts"), handler_for=handler_for)
    host.get("fake", Silent())
    assert not released
    host.get("other", Silent())
    assert released == [True]


# -- the parts ----------------------------------------------------------------------------------------------


def test_the_catalog_describes_models_and_names_broken_cards(root):
    (root / "finetunes" / "odd.json").write_text('{"model": {"name": "Odd", "architecture": "wan"}}')
    (root / "finetunes" / "torn.json").write_text("{")
    found = catalog(root, root / "ckpts", handler_for, {"num_inference_steps": 7})
    assert set(found.models) == {"fake", "other", "absent"} and found.default_model == "fake"
    fake, absent = found.models["fake"], found.models["absent"]
    assert fake.available and fake.size_bytes == len("weights of fake.bin") and fake.missing == []
    assert not absent.available and absent.missing == ["absent.bin"]
    assert "guidance_scale" not in fake.settings and "prompt" in fake.settings
    assert set(fake.defaults) == set(fake.settings)
    assert (fake.defaults["resolution"], fake.defaults["num_inference_steps"]) == ("64x64", 7)
    assert (
        len(found.errors) == 2
        and "odd.json" in " ".join(found.errors)
        and "torn.json" in " ".join(found.errors)
    )


def test_the_handlers_defaults_come_before_the_cards(root):
    (root / "defaults" / "fake.json").write_text(
        '{"model": {"name": "Fake", "architecture": "fake", "URLs": ["fake.bin"]}, "num_inference_steps": 9}'
    )
    models = catalog(root, root / "ckpts", handler_for).models
    assert [models[name].defaults["num_inference_steps"] for name in ("fake", "other")] == [9, 3]


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


class Written:
    """A store that only remembers what was written."""

    def __init__(self):
        self.progressed, self.previews, self.looks = [], [], 0

    def progress(self, job_id, phase, step, steps, seconds_left):
        self.progressed.append((phase, step, steps, seconds_left))

    def set_preview(self, job_id, jpeg):
        self.previews.append(jpeg)

    def cancel_requested(self, job_id):
        self.looks += 1
        return self.looks > 1


def test_progress_writes_first_last_and_twenty_per_second():
    written, clock = Written(), Clock()
    progress = Progress(written, 1, clock)
    progress.phase("Denoising")
    for step in range(1, 101):
        clock.now += 0.01
        progress.step(step, 100)
    progress.phase("Decoding")
    steps = [step for phase, step, *_ in written.progressed if phase == "Denoising"]
    assert steps[:2] == [0, 1] and steps[-1] == 100
    assert 18 <= len(steps) <= 23
    assert written.progressed[-1][:2] == ("Decoding", 0)


def test_seconds_left_come_from_measured_steps_without_the_first():
    written, clock = Written(), Clock()
    progress = Progress(written, 1, clock)
    progress.phase("Denoising")
    for step, seconds in enumerate([30, 2, 4], start=1):
        clock.now += seconds
        progress.step(step, 10)
    assert [left for *_, left in written.progressed] == [None, None, 16, 21]


def test_previews_are_rendered_only_four_times_per_second():
    written, clock = Written(), Clock()
    progress = Progress(written, 1, clock)
    rendered = []

    def previews():
        rendered.append(clock.now)
        return [Image.new("RGB", (8, 8))]

    for step in range(1, 201):
        clock.now += 0.01
        progress.step(step, 200, previews)
    assert 7 <= len(rendered) <= 9 and len(written.previews) == len(rendered)
    assert rendered[0] == 100.01


def test_the_wish_to_cancel_is_looked_up_twenty_times_per_second_and_remembered():
    written, clock = Written(), Clock()
    progress = Progress(written, 1, clock)
    assert [progress.cancelled() for _ in range(5)] == [False] * 5 and written.looks == 1
    clock.now += 0.06
    assert progress.cancelled() and written.looks == 2
    clock.now += 1
    assert progress.cancelled() and written.looks == 2


def test_a_batchs_previews_are_one_sheet():
    tiles = [Image.new("RGB", (4, 2), (number, 0, 0)) for number in range(5)]
    sheet = contact_sheet(tiles)
    assert sheet.size == (12, 4)
    assert [sheet.getpixel((number % 3 * 4, number // 3 * 2))[0] for number in range(5)] == [0, 1, 2, 3, 4]
    assert contact_sheet(tiles[:1]) is tiles[0]


def test_downloads_are_phases_counted_in_mebibytes():
    calls = []

    class Report(Silent):
        def phase(self, name):
            calls.append(name)

        def amount(self, done, total, seconds_left):
            calls.append((done, total, seconds_left))

    report = download_report(Report())
    report(DownloadProgress("a.safetensors", 0, 8 << 20, 0))
    report(DownloadProgress("a.safetensors", 4 << 20, 8 << 20, 1 << 20))
    report(DownloadProgress("b.safetensors", 0, 0, 0))
    assert calls == [
        "Downloading a.safetensors", (0, 8, None), (4, 8, 4.0), "Downloading b.safetensors", (0, 0, None)
    ]  # fmt: skip


def test_small_files_are_waited_for_and_large_ones_are_null_until_known(tmp_path, monkeypatch):
    monkeypatch.setattr(file_hashes, "WAIT_FOR_BYTES", 10)
    for name, size in {"small": 5, "large": 50}.items():
        (tmp_path / name).write_bytes(b"x" * size)
    go, asked = threading.Event(), []

    def hash_of(path):
        asked.append(path.name)
        if path.name == "large":
            go.wait(LIMIT)
        return f"hash of {path.name}"

    files = {"vae": tmp_path / "large", "transformer": tmp_path / "small", "folder": tmp_path}
    known = file_hashes.FileHashes(files, hash_of)
    assert list(known.known().items()) == [("large", None), ("small", "hash of small")]
    go.set()
    until(lambda: known.known()["large"])
    assert known.known() == {"small": "hash of small", "large": "hash of large"}
    assert asked == ["small", "large"]


def test_files_of_the_same_name_keep_their_own_hashes(tmp_path):
    files = {}
    for name in ("vae", "text_encoder", "transformer"):
        (tmp_path / name).mkdir()
        files[name] = tmp_path / name / ("model.bin" if name != "transformer" else "transformer.bin")
        files[name].write_bytes(name.encode())
    known = file_hashes.FileHashes(files, lambda path: path.read_text()).known()
    assert known == {
        "vae/model.bin": "vae", "text_encoder/model.bin": "text_encoder", "transformer.bin": "transformer"
    }  # fmt: skip


def test_a_file_that_cannot_be_hashed_holds_nothing_up(tmp_path):
    (tmp_path / "file").write_bytes(b"x")

    def hash_of(path):
        raise OSError("cannot read")

    assert file_hashes.FileHashes({"vae": tmp_path / "file"}, hash_of).known() == {"file": None}


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (UserError("Do this."), "Do this."),
        (type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory."), failures.OUT_OF_MEMORY),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), failures.OUT_OF_RAM),
        (sqlite3.OperationalError("database or disk is full"), failures.DISK_FULL),
        (ValueError("two\nlines"), "ValueError: two lines; the log zgp.log has the details."),
        (ValueError(), "ValueError: no message; the log zgp.log has the details."),
    ],
)
def test_every_failure_is_one_sentence(error, expected):
    assert failures.sentence(error, "zgp.log") == expected


def test_the_database_is_tried_again_until_it_works(monkeypatch):
    monkeypatch.setattr(worker, "RETRY_SECONDS", 0)
    answers = [
        sqlite3.OperationalError("database or disk is full"),
        sqlite3.OperationalError("locked"),
        "done",
    ]

    def action():
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert worker.persist(action) == "done"


@pytest.mark.parametrize(("code", "words"), [(3, "exit code 3"), (-250, "killed by signal 250")])
def test_an_exit_is_described(code, words):
    assert describe_exit(code) == words


def test_parts_are_shared_by_file_and_configuration(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).write_text(name)
    gone, made = [], itertools.count()
    store = PartStore(gone.append)

    def share(role, name, config=""):
        return store.share(role, [tmp_path / name], config, lambda: f"{role} {next(made)}")

    assert share("vae", "a") == "vae 0" == share("vae", "a")
    assert share("vae", "a", "fp16") == "vae 1" and gone == ["vae 0"]
    assert share("text_encoder", "b") == "text_encoder 2"
    store.retain([tmp_path / "b"])
    assert gone[1:] == ["vae 1"] and share("text_encoder", "b") == "text_encoder 2"
    (tmp_path / "b").write_text("changed")
    assert share("text_encoder", "b") == "text_encoder 3"
    store.retain([])
    assert gone[2:] == ["text_encoder 2", "text_encoder 3"]


def test_a_folder_of_links_keeps_its_part(tmp_path):
    """As in the hub's cache, where a snapshot links to blobs elsewhere."""
    (tmp_path / "blob").write_text("weights")
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "shard").symlink_to(tmp_path / "blob")
    store = PartStore()
    part = store.share("transformer", [tmp_path / "snapshot" / "shard"], "", object)
    store.retain([tmp_path / "snapshot"])
    assert store.share("transformer", [tmp_path / "snapshot" / "shard"], "", object) is part


# -- the built-in model -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_built_in_models_make_the_same_picture_again(tmp_path):
    config = EngineConfig.at(ROOT, output_dir=tmp_path, database=tmp_path / "zgp.sqlite3")
    engine = Engine(config)
    engine.start()
    try:
        for model in ("z_image_mini", "z_image_mini_base"):
            request = {"model_type": model, "prompt": "a red circle", "seed": 3, "num_inference_steps": 2}
            job = finished(engine, engine.submit({**request, "batch_size": 2})[0])
            assert (job.status, job.error) == ("done", None)
            first, second = engine.store.images(job.id)
            again = metadata.settings_from(metadata.read(second.path))
            job = finished(engine, engine.submit(again)[0])
            [repeated] = engine.store.images(job.id)
            assert Image.open(repeated.path).tobytes() == Image.open(second.path).tobytes()
            assert Image.open(first.path).tobytes() != Image.open(second.path).tobytes()
            files = repeated.metadata["zgp"]["model_files"]
            assert len(files) >= 3 and all(files.values())
    finally:
        engine.stop()


@pytest.fixture
def mini_host(monkeypatch):
    """A host that takes this computer's CPU for a card of 8 GiB."""
    monkeypatch.setattr(loading, "default_device", lambda: torch.device("cpu"))
    return ModelHost(Folders(ROOT, ROOT / "ckpts"), machine=lambda: CARD)


def mini_settings(model, **others):
    info = catalog(ROOT, ROOT / "ckpts").model(model)
    return info.defaults | {"prompt": "a red circle", "seed": 3, "num_inference_steps": 2} | others


def test_models_share_their_text_encoder_and_vae(mini_host):
    first = mini_host.get("z_image_mini", Silent())
    encoder, vae, transformer, residency = (
        getattr(first.pipe, name) for name in ("text_encoder", "vae", "transformer", "residency")
    )
    second = mini_host.get("z_image_mini_twinflow", Silent())
    assert second.pipe is not first.pipe and second.pipe.transformer is not transformer
    assert second.pipe.text_encoder is encoder and second.pipe.vae is vae
    assert second.pipe.residency is residency
    mini_host.release()
    assert mini_host.get("z_image_mini", Silent()).pipe.vae is not vae


def test_a_plan_may_ask_for_compiled_layers(monkeypatch):
    host = ModelHost(Folders(ROOT, ROOT / "ckpts"), overrides=Overrides(compile=True), machine=lambda: CARD)
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: compiled.append(function) or function)
    transformer = host.get("z_image_mini", Silent()).pipe.transformer
    layers = len(transformer.layers) + len(transformer.noise_refiner) + len(transformer.context_refiner)
    assert len(compiled) == layers


def test_a_change_of_plan_places_only_what_changed(mini_host, monkeypatch):
    model = mini_host.get("z_image_mini", Silent(), mini_settings("z_image_mini"))
    encoder, evicted = model.pipe.text_encoder, []
    monkeypatch.setattr(model.pipe.residency, "evict", evicted.append)
    mini_host.get("z_image_mini", Silent(), mini_settings("z_image_mini", num_inference_steps=3))
    assert evicted == []
    tight = dataclasses.replace(CARD, vram_free=model.plan.peak - 1)
    monkeypatch.setattr(mini_host, "_machine", lambda: tight)
    loaded = mini_host.get("z_image_mini", Silent(), mini_settings("z_image_mini"))
    assert loaded.pipe is model.pipe
    assert set(model.plan.keep) - set(loaded.plan.keep) == {"text_encoder"} and evicted == [encoder]


def test_the_real_mini_goes_down_the_ladder_at_every_place(tmp_path, mini_host, monkeypatch):
    store = JobStore(tmp_path / "zgp.sqlite3")
    mine = worker.Worker(store, mini_host, tmp_path, tmp_path / "zgp.log")
    engine = Engine(EngineConfig.at(ROOT, database=tmp_path / "zgp.sqlite3"))
    request = {"model_type": "z_image_mini", "prompt": "a red circle", "seed": 3, "num_inference_steps": 2}
    pictures = []

    def run():
        mine._rungs.clear()
        job_id, _ = engine.submit(request)
        assert mine.run_one()
        job = store.job(job_id)
        assert (job.status, job.error) == ("done", None)
        pictures.append(Image.open(store.images(job_id)[0].path).tobytes())
        return job

    assert not run().notes
    pipe = mini_host.get("z_image_mini", Silent()).pipe
    for name, part in {"forward": pipe.transformer, "decode": pipe.vae}.items():
        method, fail = getattr(part, name), Failing(1, torch.OutOfMemoryError("CUDA out of memory."))
        monkeypatch.setattr(part, name, lambda *a, f=fail, m=method, **k: (f(), m(*a, **k))[1])
        [note] = run().notes
        assert note.startswith("It did not fit at 'mmgp, fp16, all on the card")
    assert len(set(pictures)) == 1


# -- a second try --------------------------------------------------------------------------------------------


def test_a_job_whose_worker_was_killed_is_tried_with_less(ladder, monkeypatch):
    """Its files the smallest on disk, nothing page-locked, one rung lower; the plan is told."""
    seen = []
    monkeypatch.setattr(
        planner, "careful", lambda *given, real=planner.careful: seen.append(real(*given)) or seen[-1]
    )
    first = ladder()
    assert ladder.host.planned.rung == 0 and "transformer" in ladder.host.planned.pinned and not seen
    job_id, _ = ladder.submit(values())
    ladder.store.claim_next()
    ladder.store.recover_running()  # as its supervisor does
    assert ladder.run_one() and ladder.store.job(job_id).status == "done"
    assert ladder.host.planned.rung == 1 and "transformer" not in ladder.host.planned.pinned
    assert len(seen) == 1
    sentence = ladder.host.planned.sentence()
    assert f"Tried again with less: made with '{sentence}'." in ladder.store.job(job_id).notes
    assert not any("Tried again" in note for note in first.notes)


@pytest.mark.parametrize(("dtype", "counted"), [("", 4), ("bf16", 2), ("fp16", 2)])
def test_the_dtype_that_the_user_asks_for_is_what_the_weights_are_counted_in(
    root, monkeypatch, dtype, counted
):
    seen, offers = [], fake_family.Planned.query_offers

    def query_offers(*given):
        seen.append(given[3])
        return offers(*given)

    monkeypatch.setattr(fake_family.Planned, "query_offers", staticmethod(query_offers))
    here = ModelHost(
        Folders(root, root / "ckpts"),
        handler_for=lambda name: fake_family.Planned,
        machine=lambda: Machine("CPU", 64 << 30, 64 << 30),
        overrides=Overrides(dtype=dtype),
    )
    assert here.outlook(here.info("fake"), here.info("fake").defaults).plan.dtype == (dtype or "fp32")
    assert seen == [counted]


def test_a_worker_killed_twice_says_what_to_do(tmp_path):
    store = JobStore(tmp_path / "jobs.sqlite")
    job_id = store.submit(values())
    for _ in range(2):
        store.claim_next()
        store.recover_running("it was killed", advice=supervisor.AFTER_A_KILL)
    error = store.job(job_id).error
    assert error.startswith("Tried 2 times; each time it was killed. If it was the memory: ")
    assert "int8" in error
