"""The job queue and its history: what any process may ask of it. No torch, no models, one SQLite file."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from shared.engine.database import Database
from shared.engine.records import CANCELLED, ENDED, FAILED, QUEUED, RUNNING, Event, ImageRecord, Job
from shared.errors import UserError

__all__ = ["ENDED", "MAX_ATTEMPTS", "Event", "ImageRecord", "Job", "JobStore"]

MAX_ATTEMPTS = 2
WORKER_DIED = "the worker process stopped while it ran"


class JobStore:
    """Queue, events, previews and images of all jobs; usable from many processes and threads at once."""

    def __init__(self, path: Path):
        self._db = Database(Path(path))
        self.path = self._db.path
        self.notice = self._db.notice

    # -- clients ------------------------------------------------------------------------------------------

    def submit(
        self,
        settings: dict[str, Any],
        *,
        source: str = "ui",
        output_dir: str | None = None,
        notes: Sequence[str] = (),
        newest_wins: bool = False,
    ) -> int:
        """Append a job to the queue and return its id; `settings` must already be valid.

        newest_wins: the jobs of the same source that still wait are cancelled, so that at most one waits.
        """
        with self._db.transaction() as cx:
            if newest_wins:
                older = "SELECT id FROM jobs WHERE status = ? AND source = ?"
                for row in cx.execute(older, (QUEUED, source)).fetchall():
                    _end(cx, row["id"], CANCELLED, None)
            job_id = cx.execute(
                "INSERT INTO jobs (status, settings, source, output_dir, created) VALUES (?, ?, ?, ?, ?)",
                (QUEUED, _to_json(settings), source, output_dir, time.time()),
            ).lastrowid
            assert job_id is not None
            cx.execute("UPDATE jobs SET position = ? WHERE id = ?", (job_id, job_id))
            _add_event(cx, job_id, QUEUED)
            for text in notes:
                _note(cx, job_id, text)
        return job_id

    def job(self, job_id: int) -> Job:
        """One job; UserError when there is none with that number."""
        row = self._db.connection().execute("SELECT * FROM jobs WHERE id = ?", (job_id,)).fetchone()
        if row is None:
            raise UserError(f"There is no job {job_id}: pick one of the list of jobs.")
        return _job(row)

    def jobs(self, statuses: Iterable[str] | None = None, limit: int = 100) -> list[Job]:
        """Jobs, newest first, of the given statuses or of all."""
        return [_job(row) for row in self._select_jobs("id DESC", statuses, limit)]

    def queue(self, limit: int = 1000) -> list[Job]:
        """The running job, then the waiting ones in the order in which they will run."""
        return [
            _job(row)
            for row in self._select_jobs("status = 'queued', position, id", (QUEUED, RUNNING), limit)
        ]

    def request_cancel(self, job_id: int) -> None:
        """Cancel a waiting job at once; ask the worker to stop a running one; nothing for an ended one."""
        with self._db.transaction() as cx:
            job = self.job(job_id)
            if job.status == QUEUED:
                _end(cx, job_id, CANCELLED, None)
            elif job.status == RUNNING:
                cx.execute("UPDATE jobs SET cancel = 1 WHERE id = ?", (job_id,))

    def events(self, after_seq: int, job_id: int | None = None, limit: int = 1000) -> list[Event]:
        """Events after number `after_seq`, in order. Steps and previews of ended jobs are gone."""
        only, values = ("", []) if job_id is None else (" AND job_id = ?", [job_id])
        rows = self._db.connection().execute(
            f"SELECT * FROM events WHERE seq > ?{only} ORDER BY seq LIMIT ?", [after_seq, *values, limit]
        )
        return [Event(r["seq"], r["job_id"], r["kind"], json.loads(r["data"]), r["time"]) for r in rows]

    def last_seq(self) -> int:
        """The number of the newest event, 0 when there is none."""
        return int(self._db.connection().execute("SELECT COALESCE(MAX(seq), 0) FROM events").fetchone()[0])

    def preview(self, job_id: int) -> tuple[int, bytes] | None:
        """(event number, JPEG) of a running job's newest preview."""
        row = (
            self._db.connection()
            .execute("SELECT seq, jpeg FROM previews WHERE job_id = ?", (job_id,))
            .fetchone()
        )
        return None if row is None else (row["seq"], row["jpeg"])

    def images(self, job_id: int | None = None, limit: int = 100) -> list[ImageRecord]:
        """The images of one job in the order of the batch, or the newest images of all jobs."""
        if job_id is None:
            query, values = "SELECT * FROM images ORDER BY id DESC LIMIT ?", [limit]
        else:
            query, values = "SELECT * FROM images WHERE job_id = ? ORDER BY number LIMIT ?", [job_id, limit]
        return [_image(row) for row in self._db.connection().execute(query, values)]

    def image(self, image_id: int) -> ImageRecord:
        """One image; UserError when there is none with that number."""
        row = self._db.connection().execute("SELECT * FROM images WHERE id = ?", (image_id,)).fetchone()
        if row is None:
            raise UserError(f"There is no image {image_id}: pick one of the list of images.")
        return _image(row)

    def has_image(self, paths: Iterable[str]) -> bool:
        """Whether one of these paths is that of a picture made here."""
        wanted = list(paths)
        marks = ", ".join("?" * len(wanted))
        query = f"SELECT 1 FROM images WHERE path IN ({marks}) LIMIT 1"
        return self._db.connection().execute(query, wanted).fetchone() is not None

    def waiting(self) -> int:
        """How many jobs wait."""
        query = "SELECT COUNT(*) FROM jobs WHERE status = ?"
        return int(self._db.connection().execute(query, (QUEUED,)).fetchone()[0])

    # -- worker -------------------------------------------------------------------------------------------

    def claim_next(self) -> Job | None:
        """Take the next waiting job, marking it running; no two callers ever get the same one."""
        next_job = "SELECT id FROM jobs WHERE status = 'queued' ORDER BY position, id LIMIT 1"
        if self._db.connection().execute(next_job).fetchone() is None:
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
            _add_event(cx, job.id, "started", {"attempt": job.attempts})
            return job

    def cancel_requested(self, job_id: int) -> bool:
        row = self._db.connection().execute("SELECT cancel FROM jobs WHERE id = ?", (job_id,)).fetchone()
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
            _add_event(cx, job_id, "step" if phase == before else "phase", data)

    def set_preview(self, job_id: int, jpeg: bytes) -> None:
        """Replace the job's preview."""
        with self._db.transaction() as cx:
            seq = _add_event(cx, job_id, "preview")
            cx.execute(
                "INSERT OR REPLACE INTO previews (job_id, seq, jpeg) VALUES (?, ?, ?)", (job_id, seq, jpeg)
            )

    def add_image(
        self,
        job_id: int,
        *,
        index: int,
        path: str,
        seed: int,
        width: int,
        height: int,
        metadata: dict[str, Any],
    ) -> int:
        """Record a saved image file and return its id."""
        with self._db.transaction() as cx:
            image_id = cx.execute(
                "INSERT INTO images (job_id, number, path, seed, width, height, created, metadata)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (job_id, index, path, seed, width, height, time.time(), _to_json(metadata)),
            ).lastrowid
            data = {
                "id": image_id,
                "index": index,
                "path": path,
                "seed": seed,
                "width": width,
                "height": height,
            }
            _add_event(cx, job_id, "image", data)
        assert image_id is not None
        return image_id

    def note(self, job_id: int, text: str) -> None:
        """Tell the user something about a job, once: what was substituted, or that it is tried again."""
        with self._db.transaction() as cx:
            _note(cx, job_id, text)

    def finish(self, job_id: int, status: str, error: str | None = None) -> None:
        """End a running job as done, failed or cancelled; its step and preview events are dropped."""
        if status not in ENDED:
            raise ValueError(f"status {status!r} is not one of {ENDED}")
        with self._db.transaction() as cx:
            if self.job(job_id).status == RUNNING:
                _end(cx, job_id, status, error)

    def fail_waiting(self, error: str) -> None:
        """Fail every waiting job: there is no worker to run it."""
        with self._db.transaction() as cx:
            for row in cx.execute("SELECT id FROM jobs WHERE status = 'queued'").fetchall():
                _end(cx, row["id"], FAILED, error)

    def recover_running(self, reason: str = WORKER_DIED, *, counts: bool = True) -> list[Job]:
        """Deal with jobs left running by a worker that is gone; call only when it is.

        Each goes back to its place in the queue once, then fails with `reason`. `counts=False` (a stop that
        the user asked for) gives the attempt back. A job whose cancelling was asked for is cancelled.
        """
        with self._db.transaction() as cx:
            rows = cx.execute("SELECT * FROM jobs WHERE status = 'running' ORDER BY position, id").fetchall()
            for row in rows:
                if row["cancel"]:
                    _end(cx, row["id"], CANCELLED, None)
                elif not counts or row["attempts"] < MAX_ATTEMPTS:
                    _put_back(cx, row, reason, counts)
                else:
                    _end(cx, row["id"], FAILED, f"Tried {row['attempts']} times; each time {reason}.")
            return [self.job(row["id"]) for row in rows]

    def _select_jobs(self, order: str, statuses: Iterable[str] | None, limit: int) -> list[sqlite3.Row]:
        wanted: Sequence[str] = () if statuses is None else tuple(statuses)
        where = "" if statuses is None else f"WHERE status IN ({', '.join('?' * len(wanted))})"
        query = f"SELECT * FROM jobs {where} ORDER BY {order} LIMIT ?"
        return self._db.connection().execute(query, [*wanted, limit]).fetchall()


def _end(cx: sqlite3.Connection, job_id: int, status: str, error: str | None) -> None:
    cx.execute(
        "UPDATE jobs SET status = ?, error = ?, finished = ?, seconds_left = NULL WHERE id = ?",
        (status, error, time.time(), job_id),
    )
    _forget_progress(cx, job_id)
    _add_event(cx, job_id, status, {} if error is None else {"error": error})


def _put_back(cx: sqlite3.Connection, row: sqlite3.Row, reason: str, counts: bool) -> None:
    attempts = row["attempts"] if counts else row["attempts"] - 1
    cx.execute(
        "UPDATE jobs SET status = ?, attempts = ?, started = NULL, phase = '', step = 0, steps = 0,"
        " seconds_left = NULL WHERE id = ?",
        (QUEUED, attempts, row["id"]),
    )
    _forget_progress(cx, row["id"])
    _note(cx, row["id"], f"Put back in the queue: {reason}.")
    _add_event(cx, row["id"], QUEUED)


def _forget_progress(cx: sqlite3.Connection, job_id: int) -> None:
    cx.execute("DELETE FROM events WHERE job_id = ? AND kind IN ('step', 'preview')", (job_id,))
    cx.execute("DELETE FROM previews WHERE job_id = ?", (job_id,))


def _note(cx: sqlite3.Connection, job_id: int, text: str) -> None:
    notes = json.loads(cx.execute("SELECT notes FROM jobs WHERE id = ?", (job_id,)).fetchone()["notes"])
    if text in notes:
        return
    cx.execute("UPDATE jobs SET notes = ? WHERE id = ?", (_to_json([*notes, text]), job_id))
    _add_event(cx, job_id, "note", {"text": text})


def _add_event(cx: sqlite3.Connection, job_id: int, kind: str, data: dict[str, Any] | None = None) -> int:
    seq = cx.execute(
        "INSERT INTO events (job_id, kind, data, time) VALUES (?, ?, ?, ?)",
        (job_id, kind, _to_json(data or {}), time.time()),
    ).lastrowid
    assert seq is not None
    return seq


def _to_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


def _job(row: sqlite3.Row) -> Job:
    return Job(
        id=row["id"],
        status=row["status"],
        settings=json.loads(row["settings"]),
        source=row["source"],
        output_dir=row["output_dir"],
        attempts=row["attempts"],
        phase=row["phase"],
        step=row["step"],
        steps=row["steps"],
        seconds_left=row["seconds_left"],
        error=row["error"],
        notes=json.loads(row["notes"]),
        created=row["created"],
        started=row["started"],
        finished=row["finished"],
    )


def _image(row: sqlite3.Row) -> ImageRecord:
    return ImageRecord(
        id=row["id"],
        job_id=row["job_id"],
        index=row["number"],
        path=row["path"],
        seed=row["seed"],
        width=row["width"],
        height=row["height"],
        created=row["created"],
        metadata=json.loads(row["metadata"]),
    )
