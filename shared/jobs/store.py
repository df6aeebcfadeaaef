"""The job queue and its history: what any process may ask of it. No torch, no models, one SQLite file."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from shared.errors import UserError
from shared.jobs import rows as job_rows
from shared.jobs.database import Database
from shared.jobs.records import (
    ASKS,
    CANCELLED,
    EDITED,
    ENDED,
    FAILED,
    QUEUED,
    RUNNING,
    Counts,
    Event,
    ImageRecord,
    Job,
    event_of,
    image_of,
    job_of,
    to_json,
)

MAX_ATTEMPTS = 2
WORKER_DIED = "the worker process stopped while it ran"
#: the kinds of events after which the queue looks different
CHANGES = (
    QUEUED, "started", "moved", "edited", "held", "released", "dismissed", "paused", "resumed", "agreed",
    *ENDED,
)  # fmt: skip

_SHOWN = "SELECT * FROM images WHERE place <> 'trash'"


class JobStore:
    """Queue, events, previews and images of all jobs; usable from many processes and threads at once."""

    def __init__(self, path: Path, check: bool = True):
        self._db = Database(Path(path), check)
        self.path = self._db.path
        self.notice = self._db.notice

    @property
    def database(self) -> Database:
        """The file, for what else is kept in it."""
        return self._db

    # -- clients: jobs and grids --------------------------------------------------------------------------

    def together(self) -> AbstractContextManager[object]:
        """What is written within it is kept as a whole or, on any exception, not at all."""
        return self._db.transaction()

    def submit(
        self,
        settings: dict[str, Any],
        *,
        source: str = "ui",
        output_dir: str | None = None,
        notes: Sequence[str] = (),
        newest_wins: bool = False,
        client: str = "",
    ) -> int:
        """Append a job to the queue and return its id; `settings` must already be valid.

        newest_wins: the jobs of the same source and client that still wait are cancelled, so that at most
        one waits.
        """
        with self._db.transaction() as cx:
            if newest_wins:
                older = "SELECT id FROM jobs WHERE status = ? AND source = ? AND client = ?"
                for row in cx.execute(older, (QUEUED, source, client)).fetchall():
                    job_rows.end(cx, row["id"], CANCELLED, None)
            return job_rows.append(
                cx, to_json(settings), source=source, output_dir=output_dir, client=client, notes=notes
            )

    def submit_grid(
        self,
        axes: Sequence[dict[str, Any]],
        base: dict[str, Any],
        cells: Sequence[tuple[int, dict[str, Any], Sequence[str]]],
        *,
        source: str = "ui",
        output_dir: str | None = None,
        client: str = "",
    ) -> tuple[int, list[int]]:
        """Append the jobs of a grid, all or none: (its id, theirs). cells: (number, settings, notes).

        When the last of them has ended, a job that draws the whole grid follows by itself.
        """
        with self._db.transaction() as cx:
            grid_id = cx.execute(
                "INSERT INTO grids (axes, settings, created) VALUES (?, ?, ?)",
                (to_json(axes), to_json(base), time.time()),
            ).lastrowid
            job_ids = [
                job_rows.append(
                    cx, to_json(settings), source=source, output_dir=output_dir, client=client, notes=notes,
                    grid=grid_id, cell=number,
                )
                for number, settings, notes in cells
            ]  # fmt: skip
        assert grid_id is not None
        return grid_id, job_ids

    def grid_axes(self, grid_id: int) -> list[dict[str, Any]]:
        """The axes of a grid, as they were submitted."""
        query = "SELECT axes FROM grids WHERE id = ?"
        return json.loads(self._read(query, (grid_id,)).fetchone()["axes"])

    def grid_jobs(self, grid_id: int) -> list[Job]:
        """The jobs of a grid in the order in which they were made, those that draw it last."""
        query = "SELECT * FROM jobs WHERE grid = ? ORDER BY cell IS NULL, id"
        return [job_of(row) for row in self._read(query, (grid_id,))]

    def job(self, job_id: int) -> Job:
        """One job; UserError when there is none with that number."""
        row = self._read("SELECT * FROM jobs WHERE id = ?", (job_id,)).fetchone()
        if row is None:
            raise UserError(f"There is no job {job_id}: pick one of the list of jobs.")
        return job_of(row)

    def jobs(self, statuses: Iterable[str] | None = None, limit: int = 100) -> list[Job]:
        """Jobs, newest first, of the given statuses or of all."""
        return [job_of(row) for row in self._select_jobs("id DESC", statuses, limit)]

    def queue(self, limit: int = 1000) -> list[Job]:
        """The running job, then the waiting ones in the order in which they will run."""
        return [
            job_of(row)
            for row in self._select_jobs("status = 'queued', position, id", (QUEUED, RUNNING), limit)
        ]

    def counts(self) -> Counts:
        """How many jobs there are of each status."""
        rows = self._read("SELECT status, COUNT(*) AS number FROM jobs GROUP BY status")
        return Counts(**{row["status"]: row["number"] for row in rows})

    def failures(self, limit: int = 5) -> list[Job]:
        """The newest failed jobs that nobody has retried or dismissed."""
        rows = self._read(
            "SELECT * FROM jobs WHERE status = 'failed' AND NOT dismissed ORDER BY id DESC LIMIT ?", (limit,)
        )
        return [job_of(row) for row in rows]

    # -- clients: the order of the queue ------------------------------------------------------------------

    def move(self, job_id: int, *, before: int | None = None, place: int | None = None, by: int = 0) -> None:
        """Move a waiting job: before another waiting one, to a place (0 is the next to run, places behind
        the last are the last), or by so many places. UserError when it has begun, or the other one has.
        """
        with self._db.transaction() as cx:
            self._waiting(job_id, "moved")
            if before is not None:
                self._waiting(before, "moved")
            rows = cx.execute(
                "SELECT id, position FROM jobs WHERE status = 'queued' ORDER BY position, id"
            ).fetchall()
            order = [row["id"] for row in rows]
            old = order.index(job_id)
            order.remove(job_id)
            new = old + by if place is None else place
            new = max(0, min(new, len(order))) if before in (None, job_id) else order.index(before)
            order.insert(new, job_id)
            job_rows.renumber(cx, order, [row["position"] for row in rows])
            job_rows.add_event(cx, job_id, "moved")

    def hold(self, job_id: int) -> Job:
        """Keep a waiting job from being started, while its user edits it. UserError when it has begun."""
        with self._db.transaction() as cx:
            self._waiting(job_id, "edited")
            cx.execute("UPDATE jobs SET held = ? WHERE id = ?", (EDITED, job_id))
            job_rows.add_event(cx, job_id, "held")
            return self.job(job_id)

    def release(self, job_id: int) -> None:
        """Let a held job be started; nothing for one that is not held."""
        with self._db.transaction() as cx:
            if cx.execute("UPDATE jobs SET held = 0 WHERE id = ? AND held", (job_id,)).rowcount:
                job_rows.add_event(cx, job_id, "released")

    def ask(self, job_ids: Iterable[int]) -> None:
        """Keep jobs from being started until somebody has said yes to their download. One that has begun
        goes back to its place, unless its cancelling was asked for.
        """
        with self._db.transaction() as cx:
            for job_id in job_ids:
                row = cx.execute("SELECT * FROM jobs WHERE id = ?", (job_id,)).fetchone()
                if row["cancel"] and row["status"] == RUNNING:
                    job_rows.end(cx, job_id, CANCELLED, None)
                elif row["status"] in (QUEUED, RUNNING):
                    job_rows.let_wait(cx, row)

    def asking(self) -> list[Job]:
        """The jobs that wait for a yes to their download, in the order of the queue."""
        query = "SELECT * FROM jobs WHERE status = 'queued' AND held = ? ORDER BY position, id"
        return [job_of(row) for row in self._read(query, (ASKS,))]

    def answered(self, job_ids: Iterable[int]) -> None:
        """Let jobs that waited for a yes be started."""
        with self._db.transaction() as cx:
            for job_id in job_ids:
                if cx.execute(
                    "UPDATE jobs SET held = 0 WHERE id = ? AND held = ?", (job_id, ASKS)
                ).rowcount:
                    job_rows.add_event(cx, job_id, "released")

    def edit(self, job_id: int, settings: dict[str, Any], notes: Sequence[str] = ()) -> None:
        """Replace the settings of a waiting job and release it. UserError when it has begun."""
        with self._db.transaction() as cx:
            self._waiting(job_id, "changed")
            if cx.execute("SELECT 1 FROM images WHERE job_id = ?", (job_id,)).fetchone():
                raise UserError(
                    f"Job {job_id} has made pictures already, so it cannot be changed: add its new settings "
                    "as a new job."
                )
            cx.execute(
                "UPDATE jobs SET settings = ?, notes = '[]', held = 0, attempts = 0 WHERE id = ?",
                (to_json(settings), job_id),
            )
            for text in notes:
                job_rows.note(cx, job_id, text)
            job_rows.add_event(cx, job_id, "edited")

    def retry(self, job_id: int, at_old_place: bool = False) -> int:
        """Queue a failed or cancelled job once more, as a new one; its id. The old one stays as it ended.

        at_old_place: before all that was submitted after it, else at the end.
        """
        with self._db.transaction() as cx:
            job = self.job(job_id)
            if job.status not in (FAILED, CANCELLED):
                raise UserError(f"Job {job_id} is {job.status}: only failed and cancelled jobs are retried.")
            row = cx.execute("SELECT settings, position FROM jobs WHERE id = ?", (job_id,)).fetchone()
            new = job_rows.append_like(cx, job, row["settings"], job.cell)
            if at_old_place:
                cx.execute("UPDATE jobs SET position = ? WHERE id = ?", (row["position"], new))
            self._dismiss(cx, job_id)
        return new

    def dismiss(self, job_id: int) -> None:
        """Take a job off the list of failures. It stays in the history."""
        with self._db.transaction() as cx:
            self._dismiss(cx, job_id)

    def pause(self) -> None:
        """Start no further job until `resume`, across restarts. The running one goes on to its end."""
        self._set_paused(True)

    def resume(self) -> None:
        self._set_paused(False)

    def paused(self) -> bool:
        return bool(self._read("SELECT paused FROM queue").fetchone()["paused"])

    # -- clients: cancelling ------------------------------------------------------------------------------

    def request_cancel(self, job_id: int) -> None:
        """Cancel a waiting job at once; ask the worker to stop a running one; nothing for an ended one."""
        with self._db.transaction() as cx:
            job = self.job(job_id)
            if job.status == QUEUED:
                job_rows.end(cx, job_id, CANCELLED, None)
            elif job.status == RUNNING:
                cx.execute("UPDATE jobs SET cancel = 1 WHERE id = ?", (job_id,))

    def clear_waiting(self) -> int:
        """Cancel every job that has not begun; how many these were."""
        with self._db.transaction() as cx:
            return job_rows.end_waiting(cx, CANCELLED, None)

    def cancel_all(self) -> int:
        """Cancel every waiting job and ask the running one to stop; how many these were."""
        with self._db.transaction() as cx:
            running = cx.execute("UPDATE jobs SET cancel = 1 WHERE status = 'running'").rowcount
            return running + job_rows.end_waiting(cx, CANCELLED, None)

    # -- clients: what happens ----------------------------------------------------------------------------

    def events(
        self,
        after_seq: int,
        job_id: int | None = None,
        limit: int = 1000,
        kinds: Sequence[str] = (),
    ) -> list[Event]:
        """Events after number `after_seq`, in order, of the given kinds or of all. Steps and previews of
        ended jobs are gone.
        """
        where = "seq > ?"
        values: list[Any] = [after_seq]
        if job_id is not None:
            where, values = f"{where} AND job_id = ?", [*values, job_id]
        if kinds:
            where, values = f"{where} AND kind IN ({', '.join('?' * len(kinds))})", [*values, *kinds]
        rows = self._read(f"SELECT * FROM events WHERE {where} ORDER BY seq LIMIT ?", [*values, limit])
        return [event_of(row) for row in rows]

    def last_seq(self) -> int:
        """The number of the newest event, 0 when there is none."""
        return int(self._read("SELECT COALESCE(MAX(seq), 0) FROM events").fetchone()[0])

    def preview(self, job_id: int) -> tuple[int, bytes] | None:
        """(event number, JPEG) of a running job's newest preview."""
        row = self._read("SELECT seq, jpeg FROM previews WHERE job_id = ?", (job_id,)).fetchone()
        return None if row is None else (row["seq"], row["jpeg"])

    def images(self, job_id: int | None = None, limit: int = 100) -> list[ImageRecord]:
        """The images of one job in the order of the batch, or the newest of all jobs; none of the trash."""
        if job_id is None:
            query, values = f"{_SHOWN} AND job_id IS NOT NULL ORDER BY id DESC LIMIT ?", [limit]
        else:
            query, values = f"{_SHOWN} AND job_id = ? ORDER BY number LIMIT ?", [job_id, limit]
        return [image_of(row) for row in self._read(query, values)]

    def image(self, image_id: int) -> ImageRecord:
        """One image; UserError when there is none with that number."""
        row = self._read("SELECT * FROM images WHERE id = ?", (image_id,)).fetchone()
        if row is None:
            raise UserError(f"There is no image {image_id}: pick one of the list of images.")
        return image_of(row)

    def texts(self, name: str, limit: int = 200, source: str = "") -> list[str]:
        """The different values of a setting in the newest jobs, newest first, as they were typed: templates
        for what was drawn from one. Jobs of `source` do not count.
        """
        given, template = (f"json_extract(settings, '$.{key}')" for key in (name, f"{name}_template"))
        newest = "SELECT id, settings FROM jobs WHERE source <> ? ORDER BY id DESC LIMIT 5000"
        rows = self._read(
            f"SELECT COALESCE(NULLIF({template}, ''), {given}) AS text FROM ({newest})"
            " GROUP BY text HAVING text <> '' ORDER BY MAX(id) DESC LIMIT ?",
            [source, limit],
        )
        return [row["text"] for row in rows]

    def has_image(self, paths: Iterable[str]) -> bool:
        """Whether one of these paths is that of a picture made here."""
        wanted = list(paths)
        marks = ", ".join("?" * len(wanted))
        query = f"SELECT 1 FROM images WHERE path IN ({marks}) LIMIT 1"
        return self._read(query, wanted).fetchone() is not None

    # -- worker -------------------------------------------------------------------------------------------

    def claim_next(self) -> Job | None:
        """Take the next waiting job, marking it running; no two callers ever get the same one.

        None while the queue is paused; held jobs are passed over.
        """
        next_job = (
            "SELECT jobs.id FROM jobs, queue WHERE status = 'queued' AND NOT held AND NOT paused"
            " ORDER BY position, jobs.id LIMIT 1"
        )
        if self._read(next_job).fetchone() is None:
            return None  # the usual answer, without taking the write lock
        with self._db.transaction() as cx:
            row = cx.execute(next_job).fetchone()
            if row is None:
                return None
            cx.execute(
                "UPDATE jobs SET status = ?, attempts = attempts + 1, started = ?, phase = '', step = 0,"
                " steps = 0, seconds_left = NULL WHERE id = ?",
                (RUNNING, time.time(), row["id"]),
            )
            job = self.job(row["id"])
            job_rows.add_event(cx, job.id, "started", {"attempt": job.attempts})
            return job

    def cancel_requested(self, job_id: int) -> bool:
        row = self._read("SELECT cancel FROM jobs WHERE id = ?", (job_id,)).fetchone()
        return row is not None and bool(row["cancel"])

    def progress(
        self, job_id: int, phase: str, step: int = 0, steps: int = 0, seconds_left: float | None = None
    ) -> None:
        """Note how far a job is; a new `phase` makes a "phase" event, anything else a "step" event."""
        data = {"phase": phase, "step": step, "steps": steps, "seconds_left": seconds_left}
        with self._db.transaction() as cx:
            before = cx.execute("SELECT phase FROM jobs WHERE id = ?", (job_id,)).fetchone()["phase"]
            cx.execute(
                "UPDATE jobs SET phase = ?, step = ?, steps = ?, seconds_left = ? WHERE id = ?",
                (phase, step, steps, seconds_left, job_id),
            )
            job_rows.add_event(cx, job_id, "step" if phase == before else "phase", data)

    def set_preview(self, job_id: int, jpeg: bytes) -> None:
        """Replace the job's preview."""
        with self._db.transaction() as cx:
            seq = job_rows.add_event(cx, job_id, "preview")
            cx.execute(
                "INSERT OR REPLACE INTO previews (job_id, seq, jpeg) VALUES (?, ?, ?)", (job_id, seq, jpeg)
            )

    def claim_image(
        self,
        job_id: int,
        *,
        index: int,
        path: str,
        seed: int,
        width: int,
        height: int,
        metadata: dict[str, Any],
        instead: int | None = None,
    ) -> int:
        """Record a picture whose file is about to get the name `path`, and return its id: a worker that is
        killed between leaves a record without a file, which `drop_lost_images` knows, and never a file
        without a record. instead: an earlier claim, whose name another process got.
        """
        with self._db.transaction() as cx:
            cx.execute("DELETE FROM images WHERE id = ?", (instead,))
            image_id = cx.execute(
                "INSERT INTO images (job_id, number, path, seed, width, height, created, metadata)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (job_id, index, path, seed, width, height, time.time(), to_json(metadata)),
            ).lastrowid
        assert image_id is not None
        return image_id

    def announce_image(self, image_id: int) -> None:
        """Tell who follows the job that a claimed picture's file is there."""
        with self._db.transaction() as cx:
            row = cx.execute("SELECT * FROM images WHERE id = ?", (image_id,)).fetchone()
            data = {"id": image_id, "index": row["number"], "path": row["path"], "seed": row["seed"]}
            data |= {"width": row["width"], "height": row["height"]}
            job_rows.add_event(cx, row["job_id"], "image", data)

    def add_image(self, job_id: int, **image: Any) -> int:
        """Record a saved image file (see `claim_image`) and return its id."""
        image_id = self.claim_image(job_id, **image)
        self.announce_image(image_id)
        return image_id

    def drop_lost_images(self, job_id: int) -> None:
        """Forget the pictures of a job that were claimed and whose files never came, or are gone."""
        lost = [image.id for image in self.images(job_id) if not Path(image.path).exists()]
        with self._db.transaction() as cx:
            cx.executemany("DELETE FROM images WHERE id = ?", [(one,) for one in lost])

    def note(self, job_id: int, text: str) -> None:
        """Tell the user something about a job, once: what was substituted, or that it is tried again."""
        with self._db.transaction() as cx:
            job_rows.note(cx, job_id, text)

    def finish(self, job_id: int, status: str, error: str | None = None) -> None:
        """End a running job as done, failed or cancelled; its step and preview events are dropped."""
        if status not in ENDED:
            raise ValueError(f"status {status!r} is not one of {ENDED}")
        with self._db.transaction() as cx:
            if self.job(job_id).status == RUNNING:
                job_rows.end(cx, job_id, status, error)

    def fail_waiting(self, error: str) -> None:
        """Fail every waiting job: there is no worker to run it."""
        with self._db.transaction() as cx:
            job_rows.end_waiting(cx, FAILED, error)

    def recover_running(
        self, reason: str = WORKER_DIED, *, counts: bool = True, advice: str = ""
    ) -> list[Job]:
        """Deal with jobs left running by a worker that is gone; call only when it is.

        Each goes back to its place in the queue once, then fails with `reason` and `advice`. `counts=False`
        (a stop that the user asked for) gives the attempt back. A job whose cancelling was asked for is
        cancelled.
        """
        with self._db.transaction() as cx:
            rows = cx.execute("SELECT * FROM jobs WHERE status = 'running' ORDER BY position, id").fetchall()
            for row in rows:
                if row["cancel"]:
                    job_rows.end(cx, row["id"], CANCELLED, None)
                elif not counts or row["attempts"] < MAX_ATTEMPTS:
                    job_rows.put_back(cx, row, reason, counts)
                else:
                    tried = f"Tried {row['attempts']} times; each time {reason}."
                    job_rows.end(cx, row["id"], FAILED, f"{tried} {advice}".rstrip())
            return [self.job(row["id"]) for row in rows]

    def _read(self, query: str, values: Sequence[Any] = ()) -> sqlite3.Cursor:
        return self._db.connection().execute(query, values)

    def _waiting(self, job_id: int, deed: str) -> Job:
        """The job, inside a transaction. UserError when it does not wait."""
        job = self.job(job_id)
        if job.status == RUNNING:
            raise UserError(f"Job {job_id} has begun, so it cannot be {deed}: cancel it, or add another job.")
        if job.status != QUEUED:
            raise UserError(f"Job {job_id} is {job.status}, so it cannot be {deed}: add another job.")
        return job

    def _set_paused(self, paused: bool) -> None:
        with self._db.transaction() as cx:
            if cx.execute("UPDATE queue SET paused = ? WHERE paused != ?", (paused, paused)).rowcount:
                job_rows.add_event(cx, None, "paused" if paused else "resumed")

    def _dismiss(self, cx: sqlite3.Connection, job_id: int) -> None:
        if cx.execute("UPDATE jobs SET dismissed = 1 WHERE id = ? AND NOT dismissed", (job_id,)).rowcount:
            job_rows.add_event(cx, job_id, "dismissed")

    def _select_jobs(self, order: str, statuses: Iterable[str] | None, limit: int) -> list[sqlite3.Row]:
        wanted: Sequence[str] = () if statuses is None else tuple(statuses)
        where = "" if statuses is None else f"WHERE status IN ({', '.join('?' * len(wanted))})"
        query = f"SELECT * FROM jobs {where} ORDER BY {order} LIMIT ?"
        return self._read(query, [*wanted, limit]).fetchall()
