"""The job store: its queue, its events, and what it does when a worker or its own file is damaged."""

import gc
import json
import os
import sqlite3
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor, TimeoutError
from pathlib import Path

import pytest

from shared.errors import UserError
from shared.files.lock import ProcessLock
from shared.jobs.database import MIGRATIONS, Database
from shared.jobs.records import CANCELLED, QUEUED, Counts
from shared.jobs.store import JobStore
from tests.support.waiting import LIMIT

ROOT = Path(__file__).resolve().parents[2]


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
        assert claim.result(timeout=LIMIT) is None


def test_many_processes_write_at_once(store):
    code = (
        "import sys; from pathlib import Path; from shared.jobs.store import JobStore\n"
        "store = JobStore(Path(sys.argv[1]))\n"
        "for number in range(20): store.submit({'prompt': str(number)})"
    )
    processes = [in_another_process(code, store.path) for _ in range(3)]
    for process in processes:
        process.communicate(timeout=LIMIT)
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


# -- the order of the queue, and what its user does with it --------------------------------------------------


def waiting(store):
    return [job.id for job in store.queue() if job.status == QUEUED]


@pytest.mark.parametrize(
    "job, where, expected",
    [
        (4, {"before": 2}, [1, 4, 2, 3]),
        (1, {"before": 4}, [2, 3, 1, 4]),
        (2, {"before": 2}, [1, 2, 3, 4]),
        (3, {"place": 0}, [3, 1, 2, 4]),
        (1, {"place": 2}, [2, 3, 1, 4]),
        (1, {"place": 99}, [2, 3, 4, 1]),
        (3, {"by": -1}, [1, 3, 2, 4]),
        (2, {"by": 1}, [1, 3, 2, 4]),
        (1, {"by": -1}, [1, 2, 3, 4]),
        (4, {"by": 5}, [1, 2, 3, 4]),
    ],
)
def test_a_waiting_job_moves_to_its_place(store, job, where, expected):
    for _ in range(4):
        submit(store)
    store.move(job, **where)
    assert waiting(store) == expected
    assert kinds(store, job)[-1] == "moved"
    assert submit(store) == 5 and waiting(store) == [*expected, 5]  # a new job is the last one
    assert [store.claim_next().id for _ in range(5)] == [*expected, 5]


def test_many_moves_keep_the_order_that_a_list_would_have(store):
    expected = [submit(store) for _ in range(12)]
    for number in range(80):
        job, before = expected[number * 7 % 12], expected[(number * 5 + 3) % 12]
        store.move(job, before=before)
        if job != before:
            expected.remove(job)
            expected.insert(expected.index(before), job)
        assert waiting(store) == expected


def test_equal_positions_still_change_places(store):
    first, second = submit(store), submit(store)
    sqlite3.connect(store.path, isolation_level=None).execute("UPDATE jobs SET position = 1")
    store.move(second, place=0)
    assert waiting(store) == [second, first]
    assert submit(store) == waiting(store)[-1]


@pytest.mark.parametrize("deed", ["move", "hold", "edit"])
def test_a_job_that_has_begun_or_ended_is_not_changed(store, deed):
    deeds = {
        "move": lambda job: store.move(job, place=0),
        "hold": store.hold,
        "edit": lambda job: store.edit(job, {"prompt": "another"}),
    }
    job_id = submit(store)
    store.claim_next()
    with pytest.raises(UserError, match=f"Job {job_id} has begun"):
        deeds[deed](job_id)
    store.finish(job_id, "done")
    with pytest.raises(UserError, match=f"Job {job_id} is done"):
        deeds[deed](job_id)
    assert store.job(job_id).settings == {"prompt": "a circle"}


def test_a_job_is_not_moved_before_one_that_has_begun(store):
    first, _, third = (submit(store) for _ in range(3))
    store.claim_next()
    with pytest.raises(UserError, match=f"Job {first} has begun"):
        store.move(third, before=first)
    assert waiting(store) == [2, 3]


def test_a_held_job_waits_for_its_user(store):
    held, other = submit(store), submit(store)
    assert store.hold(held).held
    assert store.claim_next().id == other and store.claim_next() is None
    store.edit(held, {"prompt": "a star"}, ["clamped"])
    job = store.claim_next()
    assert (job.id, job.settings, job.notes, job.held) == (held, {"prompt": "a star"}, ["clamped"], False)
    assert kinds(store, held)[:4] == ["queued", "held", "note", "edited"]


def test_a_held_job_is_released_once(store):
    job_id = submit(store)
    store.hold(job_id)
    store.release(job_id)
    store.release(job_id)
    assert kinds(store, job_id) == ["queued", "held", "released"]
    assert JobStore(store.path).claim_next().id == job_id


def test_a_job_that_made_pictures_keeps_its_settings(store):
    job_id = submit(store)
    store.claim_next()
    store.add_image(job_id, index=0, path="a.png", seed=7, width=64, height=64, metadata={})
    store.recover_running()
    with pytest.raises(UserError, match="made pictures already"):
        store.edit(job_id, {"prompt": "a star"})


def test_of_editing_and_claiming_one_comes_first(store):
    for _ in range(20):
        job_id, start = submit(store), threading.Barrier(2)

        def edit(job_id=job_id, start=start):
            start.wait()
            try:
                store.edit(job_id, {"prompt": "edited"})
            except UserError:
                return False
            return True

        def claim(start=start):
            start.wait()
            return store.claim_next()

        with ThreadPoolExecutor(2) as pool:
            edited, claimed = pool.submit(edit), pool.submit(claim)
            assert claimed.result().settings == {"prompt": "edited" if edited.result() else "a circle"}


def test_a_paused_queue_starts_nothing_until_it_goes_on_even_after_a_restart(store):
    running, next_one = submit(store), submit(store)
    store.claim_next()
    store.pause()
    store.pause()
    assert store.paused() and JobStore(store.path).claim_next() is None
    assert store.job(running).status == "running"
    store.finish(running, "done")
    store.resume()
    assert not store.paused() and store.claim_next().id == next_one
    of_all = [event.kind for event in store.events(0) if event.job_id == 0]
    assert of_all == ["paused", "resumed"]


def test_everything_or_only_what_waits_is_cancelled(store):
    running, *others = (submit(store) for _ in range(3))
    store.claim_next()
    store.hold(others[1])
    assert store.clear_waiting() == 2 and not store.cancel_requested(running)
    again = submit(store)
    assert store.cancel_all() == 2 and store.cancel_requested(running)
    assert store.cancel_all() == 1  # the running one has not ended yet
    assert [store.job(job).status for job in (*others, again)] == [CANCELLED] * 3
    assert kinds(store, again) == ["queued", "cancelled"]


@pytest.mark.parametrize("at_old_place, expected", [(True, [3, 2]), (False, [2, 3])])
def test_a_failed_job_is_retried_as_a_new_one(store, at_old_place, expected):
    first, _ = submit(store, output_dir="/mine", client="tab"), submit(store)
    store.claim_next()
    store.finish(first, "failed", "It broke.")
    assert [job.id for job in store.failures()] == [first]
    new = store.retry(first, at_old_place)
    assert waiting(store) == expected and store.failures() == []
    old, job = store.job(first), store.job(new)
    assert (old.status, old.error) == ("failed", "It broke.")
    assert (job.settings, job.output_dir, job.client, job.attempts) == (old.settings, "/mine", "tab", 0)
    assert [job.id for job in store.jobs(["failed"])] == [first]


def test_only_what_failed_or_was_cancelled_is_retried(store):
    job_id = submit(store)
    with pytest.raises(UserError, match="is queued: only failed and cancelled"):
        store.retry(job_id)
    store.request_cancel(job_id)
    assert store.retry(job_id) == 2


def test_a_dismissed_failure_stays_in_the_history(store):
    job_id = submit(store)
    store.claim_next()
    store.finish(job_id, "failed", "It broke.")
    store.dismiss(job_id)
    assert store.failures() == [] and [job.id for job in store.jobs(["failed"])] == [job_id]


def test_jobs_are_counted_by_status(store):
    for _ in range(3):
        submit(store)
    store.hold(3)
    store.claim_next()
    assert store.counts() == Counts(queued=2, running=1)


def test_typing_in_one_tab_leaves_the_jobs_of_another(store):
    mine, yours = (submit(store, source="live", client=tab) for tab in ("mine", "yours"))
    newest = submit(store, source="live", client="mine", newest_wins=True)
    assert waiting(store) == [yours, newest] and store.job(mine).status == CANCELLED


def test_events_of_some_kinds(store):
    first, second = submit(store), submit(store)
    store.note(first, "clamped")
    assert [event.job_id for event in store.events(0, kinds=["queued"])] == [first, second]
    assert [event.kind for event in store.events(0, first, kinds=["note", "held"])] == ["note"]


def test_a_clock_that_goes_back_changes_no_order(store, monkeypatch):
    times = iter(range(1000, 0, -10))
    monkeypatch.setattr("shared.jobs.store.time.time", lambda: float(next(times)))
    ids = [submit(store) for _ in range(4)]
    store.move(ids[3], place=0)
    assert [store.claim_next().id for _ in range(4)] == [4, 1, 2, 3]
    assert [job.id for job in store.jobs()] == [4, 3, 2, 1]
    sequence = [event.seq for event in store.events(0)]
    assert sequence == sorted(sequence) and store.last_seq() == sequence[-1]


def test_a_file_of_the_first_schema_keeps_its_jobs_and_events(tmp_path):
    path = tmp_path / "zgp.sqlite3"
    old = sqlite3.connect(path)
    for statement in MIGRATIONS[0]:
        old.execute(statement)
    old.execute("PRAGMA user_version = 1")
    old.execute(
        "INSERT INTO jobs (status, settings, source, created, position)"
        " VALUES ('queued', '{\"prompt\": \"old\"}', 'ui', 5.0, 1)"
    )
    old.execute("INSERT INTO events (seq, job_id, kind, data, time) VALUES (41, 1, 'queued', '{}', 5.0)")
    old.commit()
    old.close()
    store = JobStore(path)
    assert [(event.seq, event.job_id, event.kind) for event in store.events(0)] == [(41, 1, "queued")]
    job = store.claim_next()
    assert (job.settings, job.held, job.client) == ({"prompt": "old"}, False, "")
    assert store.last_seq() == 42


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


_LEFT_OPEN = """
import os, sys
from shared.jobs.store import JobStore
store = JobStore(sys.argv[1])
store.submit({})
os._exit(9)
"""


def _spoil(path, place, pages=1):
    with open(path, "r+b") as file:
        file.seek(place)
        file.write(b"\xff" * 4096 * pages)


@pytest.fixture
def looked_at(tmp_path):
    """A database of several pages, closed as it should be, that has been looked at as a whole."""
    path = tmp_path / "zgp.sqlite3"
    for _ in range(2):
        store = JobStore(path)
        for _ in range(20):
            submit(store, "x" * 3000)
        del store
        gc.collect()
    assert not path.with_name(path.name + "-wal").exists()
    return path


@pytest.mark.parametrize("damage", ["header", "cut off", "schema", "first table"])
def test_damage_that_is_seen_at_once_needs_no_look_at_the_whole_file(looked_at, damage):
    size = looked_at.stat().st_size
    with sqlite3.connect(looked_at) as connection:
        (root,) = connection.execute("SELECT rootpage FROM sqlite_master WHERE name = 'jobs'").fetchone()
    connection.close()
    if damage == "cut off":
        os.truncate(looked_at, size - 8192)
    else:
        _spoil(looked_at, {"header": 0, "schema": 100, "first table": (root - 1) * 4096}[damage])
    assert "is damaged" in JobStore(looked_at).notice


@pytest.mark.parametrize("reason", ["left open", "long ago", "seen by a reader"])
def test_the_whole_file_is_looked_at_when_there_is_a_reason(looked_at, reason):
    marker = looked_at.with_name(looked_at.name + ".checked")
    if reason == "left open":
        killed = subprocess.run([sys.executable, "-c", _LEFT_OPEN, str(looked_at)], cwd=ROOT, check=False)
        assert killed.returncode == 9 and looked_at.with_name(looked_at.name + "-wal").stat().st_size
    elif reason == "long ago":
        os.utime(marker, (1, 1))
    else:
        database = Database(looked_at)
        with pytest.raises(sqlite3.DatabaseError), database.transaction():
            raise sqlite3.DatabaseError("database disk image is malformed")
        assert not marker.exists()
        del database
        gc.collect()
    _spoil(looked_at, 5 * 4096, pages=looked_at.stat().st_size // 4096 - 5)  # a log may have some of them
    assert "is damaged" in JobStore(looked_at).notice


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
        "import sys; from pathlib import Path; from shared.files.lock import ProcessLock\n"
        "lock = ProcessLock(Path(sys.argv[1])); print(lock.acquire(), flush=True); sys.stdin.read()"
    )
    lock = ProcessLock(tmp_path / "lock")
    holder = in_another_process(code, lock.path)
    assert holder.stdout.readline().strip() == b"True"
    assert not lock.acquire()
    holder.kill()
    holder.communicate()
    assert lock.acquire(timeout=LIMIT) and lock.held
    assert not ProcessLock(lock.path).acquire()
    lock.release()
    assert ProcessLock(lock.path).acquire()


def test_events_are_plain_json(store):
    store.claim_next()
    job_id = submit(store)
    for event in store.events(0, job_id):
        json.dumps(event.data)
