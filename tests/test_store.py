"""The job store: its queue, its events, and what it does when a worker or its own file is damaged."""

import json
import sqlite3
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor, TimeoutError
from pathlib import Path

import pytest

from shared.engine.database import MIGRATIONS
from shared.engine.records import CANCELLED, QUEUED
from shared.engine.store import JobStore
from shared.errors import UserError
from shared.lock import ProcessLock

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def store(tmp_path):
    return JobStore(tmp_path / "queue" / "zgp.sqlite3")


def submit(store, prompt="a circle", **others):
    return store.submit({"prompt": prompt}, **others)


def kinds(store, job_id):
    return [event.kind for event in store.events(0, job_id)]


def in_another_process(code, *arguments):
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )


def test_a_submitted_job_keeps_everything(store):
    settings = {"prompt": "绿色 🟢", "seed": 2**53 - 1}
    job_id = store.submit(settings, source="cli", output_dir="/somewhere", notes=["clamped"])
    job = store.job(job_id)
    assert (job.status, job.source, job.output_dir, job.attempts) == ("queued", "cli", "/somewhere", 0)
    assert (job.settings, job.notes) == (settings, ["clamped"])
    assert kinds(store, job_id) == ["queued", "note"]


def test_unknown_numbers_are_one_sentence(store):
    with pytest.raises(UserError, match="no job 7"):
        store.job(7)
    with pytest.raises(UserError, match="no image 7"):
        store.image(7)


def test_jobs_run_in_the_order_of_submission(store):
    ids = [submit(store) for _ in range(3)]
    assert [store.claim_next().id for _ in range(3)] == ids
    assert store.claim_next() is None


def test_position_decides_before_age(store):
    first, second = submit(store), submit(store)
    sqlite3.connect(store.path, isolation_level=None).execute(
        "UPDATE jobs SET position = 0 WHERE id = ?", (second,)
    )
    assert [job.id for job in store.queue()] == [second, first]
    assert store.claim_next().id == second


def test_lists_are_newest_first_and_limited(store):
    ids = [submit(store) for _ in range(5)]
    store.claim_next()
    assert [job.id for job in store.jobs(limit=2)] == [ids[4], ids[3]]
    assert [job.id for job in store.jobs(["running"])] == [ids[0]]
    assert store.jobs([]) == []
    assert [job.id for job in store.queue()] == ids


def test_a_job_is_claimed_once_however_many_ask(store):
    ids = {submit(store) for _ in range(40)}
    stores = [JobStore(store.path) for _ in range(4)]
    start = threading.Barrier(4)

    def claim_all(mine):
        start.wait()
        claimed = []
        while (job := mine.claim_next()) is not None:
            claimed.append(job.id)
        return claimed

    with ThreadPoolExecutor(4) as pool:
        claimed = [job_id for claims in pool.map(claim_all, stores) for job_id in claims]
    assert len(claimed) == 40 and set(claimed) == ids


def test_a_job_that_another_process_is_just_claiming_is_not_claimed_again(store):
    job_id = submit(store)
    other = sqlite3.connect(store.path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    other.execute("UPDATE jobs SET status = 'running' WHERE id = ?", (job_id,))
    with ThreadPoolExecutor(1) as pool:
        claim = pool.submit(store.claim_next)  # still sees the job waiting
        with pytest.raises(TimeoutError):
            claim.result(timeout=0.1)
        other.execute("COMMIT")
        assert claim.result(timeout=30) is None


def test_many_processes_write_at_once(store):
    code = (
        "import sys; from pathlib import Path; from shared.engine.store import JobStore\n"
        "store = JobStore(Path(sys.argv[1]))\n"
        "for number in range(20): store.submit({'prompt': str(number)})"
    )
    processes = [in_another_process(code, store.path) for _ in range(3)]
    for process in processes:
        process.communicate(timeout=60)
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert len(store.queue()) == 60


def test_processes_may_create_the_file_at_the_same_moment(tmp_path):
    path, start = tmp_path / "new.sqlite3", threading.Barrier(8)

    def open_and_submit(_):
        start.wait()
        return submit(JobStore(path))

    with ThreadPoolExecutor(8) as pool:
        assert sorted(pool.map(open_and_submit, range(8))) == list(range(1, 9))


def test_a_waiting_job_is_cancelled_at_once(store):
    job_id = submit(store)
    store.request_cancel(job_id)
    assert store.job(job_id).status == "cancelled"
    assert store.claim_next() is None
    assert kinds(store, job_id) == ["queued", "cancelled"]


def test_the_newest_of_a_kind_is_the_only_one_that_waits(store):
    running, other = submit(store, source="live"), submit(store)
    assert store.claim_next().id == running
    typed = [submit(store, source="live", newest_wins=True) for _ in range(5)]
    assert [job.id for job in store.queue()] == [running, other, typed[-1]]
    assert [store.job(i).status for i in typed] == [CANCELLED] * 4 + [QUEUED]
    assert kinds(store, typed[0])[-1] == CANCELLED


def test_a_running_job_is_asked_to_stop(store):
    job_id = submit(store)
    store.claim_next()
    assert not store.cancel_requested(job_id)
    store.request_cancel(job_id)
    assert store.job(job_id).status == "running"
    assert store.cancel_requested(job_id)


def test_an_ended_job_stays_as_it_ended(store):
    job_id = submit(store)
    store.claim_next()
    store.finish(job_id, "done")
    store.request_cancel(job_id)
    store.finish(job_id, "failed", "too late")
    assert (store.job(job_id).status, store.job(job_id).error) == ("done", None)
    assert kinds(store, job_id) == ["queued", "started", "done"]


def test_progress_makes_phase_and_step_events_and_the_end_drops_the_steps(store):
    job_id = submit(store)
    store.claim_next()
    store.progress(job_id, "Denoising", 0, 8)
    store.progress(job_id, "Denoising", 1, 8, 3.5)
    store.set_preview(job_id, b"jpeg one")
    store.set_preview(job_id, b"jpeg two")
    job = store.job(job_id)
    assert (job.phase, job.step, job.steps, job.seconds_left) == ("Denoising", 1, 8, 3.5)
    assert kinds(store, job_id) == ["queued", "started", "phase", "step", "preview", "preview"]
    assert store.preview(job_id) == (store.last_seq(), b"jpeg two")
    store.finish(job_id, "failed", "It broke.")
    assert kinds(store, job_id) == ["queued", "started", "phase", "failed"]
    assert store.events(0, job_id)[-1].data == {"error": "It broke."}
    assert store.preview(job_id) is None


def test_events_continue_after_a_number_across_jobs(store):
    first = submit(store)
    seen = store.last_seq()
    second = submit(store)
    assert [(event.job_id, event.kind) for event in store.events(seen)] == [(second, "queued")]
    assert store.events(seen, first) == []
    assert len(store.events(0, limit=1)) == 1


def test_images_are_recorded_with_their_metadata(store):
    job_id = submit(store)
    store.claim_next()
    common = {"width": 64, "height": 32, "metadata": {"prompt": "é", "n": 1}}
    second = store.add_image(job_id, index=1, path="b.png", seed=8, **common)
    first = store.add_image(job_id, index=0, path="a.png", seed=7, **common)
    assert [image.path for image in store.images(job_id)] == ["a.png", "b.png"]
    assert [image.id for image in store.images(limit=1)] == [first]
    image = store.image(second)
    assert (image.index, image.seed, image.width, image.height, image.metadata) == (
        1,
        8,
        64,
        32,
        common["metadata"],
    )
    assert store.events(0, job_id)[-1].data["path"] == "a.png"


def test_the_same_note_is_told_once(store):
    job_id = submit(store)
    store.note(job_id, "clamped")
    store.note(job_id, "clamped")
    store.note(job_id, "another")
    assert store.job(job_id).notes == ["clamped", "another"]
    assert kinds(store, job_id).count("note") == 2


def test_a_job_of_a_dead_worker_runs_once_more_then_fails(store):
    first, second = submit(store), submit(store)
    assert store.claim_next().id == first
    assert [job.status for job in store.recover_running("the worker was killed")] == ["queued"]
    assert "the worker was killed" in store.job(first).notes[0]
    assert store.claim_next().attempts == 2  # in its old place, before the second job
    assert [job.status for job in store.recover_running("the worker was killed")] == ["failed"]
    assert "the worker was killed" in store.job(first).error
    assert store.claim_next().id == second
    assert kinds(store, first) == ["queued", "started", "note", "queued", "started", "failed"]


def test_recovery_honours_a_wish_to_cancel(store):
    job_id = submit(store)
    store.claim_next()
    store.request_cancel(job_id)
    store.recover_running()
    assert store.job(job_id).status == "cancelled"


def test_a_stop_that_the_user_asked_for_costs_no_attempt(store):
    job_id = submit(store)
    for _ in range(4):
        assert store.claim_next().attempts == 1
        store.recover_running("ZGP was stopped", counts=False)
    assert store.job(job_id).status == "queued"


def test_fail_waiting_spares_the_running_job(store):
    running, waiting = submit(store), submit(store)
    store.claim_next()
    store.fail_waiting("no worker")
    assert [store.job(job).status for job in (running, waiting)] == ["running", "failed"]


def test_a_transaction_that_fails_leaves_nothing_behind(store):
    job_id = submit(store)
    with pytest.raises(ValueError):
        store.finish(job_id, "sleeping")
    with pytest.raises(sqlite3.Error):
        store.set_preview(job_id, object())
    assert store.finish(job_id, "done") is None and store.job(job_id).status == "queued"
    assert kinds(store, job_id) == ["queued"]


def test_what_was_written_is_there_after_a_restart(store):
    job_id = submit(store)
    again = JobStore(store.path)
    assert again.notice is None
    assert again.job(job_id) == store.job(job_id)


@pytest.mark.parametrize("damage", ["not a database" * 100, "a truncated one"])
def test_a_damaged_file_is_set_aside_and_said(tmp_path, damage):
    path = tmp_path / "zgp.sqlite3"
    if damage == "a truncated one":
        connection = sqlite3.connect(path)
        connection.execute("CREATE TABLE filler (text)")
        connection.executemany("INSERT INTO filler VALUES (?)", [("x" * 3000,)] * 20)
        connection.commit()
        connection.close()
        content = path.read_bytes()
        content = content[:4096] + b"\xff" * 4096 + content[8192:-9000]
        path.write_bytes(content)
    else:
        path.write_text(damage)
    before = path.read_bytes()
    store = JobStore(path)
    [aside] = tmp_path.glob("zgp.damaged-*.sqlite3")
    assert aside.read_bytes() == before
    assert aside.name in store.notice
    assert submit(store) == 1


def test_a_newer_schema_is_left_alone(store):
    submit(store)
    with sqlite3.connect(store.path) as connection:
        connection.execute(f"PRAGMA user_version = {len(MIGRATIONS) + 1}")
    with pytest.raises(UserError, match="newer ZGP"):
        JobStore(store.path)
    assert list(store.path.parent.glob("*damaged*")) == []


def test_a_place_that_cannot_hold_the_file_is_a_sentence(tmp_path):
    (tmp_path / "folder.sqlite3").mkdir()
    (tmp_path / "file").touch()
    for path in (tmp_path / "folder.sqlite3", tmp_path / "file" / "zgp.sqlite3"):
        with pytest.raises(UserError, match="cannot be opened"):
            JobStore(path)


def test_the_file_is_in_wal_mode_and_knows_its_version(store):
    connection = sqlite3.connect(store.path)
    assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert connection.execute("PRAGMA user_version").fetchone() == (len(MIGRATIONS),)


def test_threads_come_and_go_without_leaving_connections_open(store):
    opened = []

    def use():
        submit(store)
        opened.append(store._db.connection())

    threads = [threading.Thread(target=use) for _ in range(3)]
    for thread in threads:
        thread.start()
        thread.join()
    del threads
    for connection in opened:
        with pytest.raises(sqlite3.ProgrammingError, match="closed"):
            connection.execute("SELECT 1")


def test_the_lock_is_exclusive_between_processes_and_dies_with_its_holder(tmp_path):
    code = (
        "import sys; from pathlib import Path; from shared.lock import ProcessLock\n"
        "lock = ProcessLock(Path(sys.argv[1])); print(lock.acquire(), flush=True); sys.stdin.read()"
    )
    lock = ProcessLock(tmp_path / "lock")
    holder = in_another_process(code, lock.path)
    assert holder.stdout.readline().strip() == b"True"
    assert not lock.acquire()
    holder.kill()
    holder.communicate()
    assert lock.acquire(timeout=5) and lock.held
    assert not ProcessLock(lock.path).acquire()
    lock.release()
    assert ProcessLock(lock.path).acquire()


def test_events_are_plain_json(store):
    store.claim_next()
    job_id = submit(store)
    for event in store.events(0, job_id):
        json.dumps(event.data)
