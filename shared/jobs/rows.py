"""What is written of a job, always inside a transaction: rows of the tables jobs and events."""

from __future__ import annotations

import json
import math
import sqlite3
import time
from collections.abc import Sequence
from typing import Any

from shared.jobs.records import ASKS, QUEUED, RUNNING, Job, job_of, to_json


def append(
    cx: sqlite3.Connection,
    settings: str,
    *,
    source: str,
    output_dir: str | None,
    client: str,
    notes: Sequence[str] = (),
    grid: int | None = None,
    cell: int | None = None,
) -> int:
    """Put a job at the end of the queue; its id. settings: as JSON, valid ones."""
    job_id = cx.execute(
        "INSERT INTO jobs (status, settings, source, output_dir, client, grid, cell, created)"
        " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        (QUEUED, settings, source, output_dir, client, grid, cell, time.time()),
    ).lastrowid
    assert job_id is not None
    # Numbers order the queue, never times: a clock can go back.
    cx.execute("UPDATE jobs SET position = ? WHERE id = ?", (job_id, job_id))
    add_event(cx, job_id, QUEUED)
    for text in notes:
        note(cx, job_id, text)
    return job_id


def append_like(cx: sqlite3.Connection, job: Job, settings: str, cell: int | None) -> int:
    """Append a job for the one who wanted `job`, and for its grid."""
    return append(
        cx, settings, source=job.source, output_dir=job.output_dir, client=job.client,
        grid=job.grid, cell=cell,
    )  # fmt: skip


def renumber(cx: sqlite3.Connection, order: Sequence[int], positions: Sequence[float]) -> None:
    """Give the jobs in their new order the positions of the old one, which stay below any new job's."""
    last = -math.inf
    for job_id, position in zip(order, positions, strict=True):
        last = position if position > last else math.nextafter(last, math.inf)
        cx.execute("UPDATE jobs SET position = ? WHERE id = ? AND position != ?", (last, job_id, last))


def end_waiting(cx: sqlite3.Connection, status: str, error: str | None) -> int:
    """End every job that has not begun; how many these were."""
    rows = cx.execute("SELECT id FROM jobs WHERE status = 'queued'").fetchall()
    for row in rows:
        end(cx, row["id"], status, error)
    return len(rows)


def end(cx: sqlite3.Connection, job_id: int, status: str, error: str | None) -> None:
    """End a job; its steps and previews go, and behind the last cell of a grid its drawing is queued."""
    cx.execute(
        "UPDATE jobs SET status = ?, error = ?, finished = ?, seconds_left = NULL WHERE id = ?",
        (status, error, time.time(), job_id),
    )
    _forget_progress(cx, job_id)
    add_event(cx, job_id, status, {} if error is None else {"error": error})
    _draw_grid_after(cx, job_id)


def _draw_grid_after(cx: sqlite3.Connection, job_id: int) -> None:
    """Queue the drawing of a grid right behind the end of its last cell: also after a cell's second try."""
    row = cx.execute("SELECT * FROM jobs WHERE id = ?", (job_id,)).fetchone()
    job = job_of(row)
    if job.cell is None:
        return
    of_grid = "SELECT 1 FROM jobs WHERE grid = ? AND status IN ('queued', 'running') LIMIT 1"
    pictures = "SELECT 1 FROM images JOIN jobs ON jobs.id = job_id WHERE grid = ? LIMIT 1"
    if cx.execute(of_grid, (job.grid,)).fetchone() or not cx.execute(pictures, (job.grid,)).fetchone():
        return
    base = cx.execute("SELECT settings FROM grids WHERE id = ?", (job.grid,)).fetchone()["settings"]
    sheet = append_like(cx, job, base, None)
    cx.execute("UPDATE jobs SET position = ? WHERE id = ?", (row["position"], sheet))


def put_back(cx: sqlite3.Connection, row: sqlite3.Row, reason: str, counts: bool) -> None:
    """Let a job that had begun wait again, at its old place. counts: the attempt is one of its attempts."""
    attempts = row["attempts"] if counts else row["attempts"] - 1
    cx.execute(
        "UPDATE jobs SET status = ?, attempts = ?, started = NULL, phase = '', step = 0, steps = 0,"
        " seconds_left = NULL WHERE id = ?",
        (QUEUED, attempts, row["id"]),
    )
    _forget_progress(cx, row["id"])
    note(cx, row["id"], f"Put back in the queue: {reason}.")
    add_event(cx, row["id"], QUEUED)


def let_wait(cx: sqlite3.Connection, row: sqlite3.Row) -> None:
    """Let a job wait for a yes to its download; one that had begun has not tried yet."""
    begun = int(row["status"] == RUNNING)
    cx.execute(
        "UPDATE jobs SET status = ?, held = ?, attempts = attempts - ?, started = NULL, phase = '', step = 0,"
        " steps = 0, seconds_left = NULL WHERE id = ?",
        (QUEUED, ASKS, begun, row["id"]),
    )
    _forget_progress(cx, row["id"])
    add_event(cx, row["id"], "held")


def _forget_progress(cx: sqlite3.Connection, job_id: int) -> None:
    cx.execute("DELETE FROM events WHERE job_id = ? AND kind IN ('step', 'preview')", (job_id,))
    cx.execute("DELETE FROM previews WHERE job_id = ?", (job_id,))


def note(cx: sqlite3.Connection, job_id: int, text: str) -> None:
    """Tell the user something about a job, once."""
    notes = json.loads(cx.execute("SELECT notes FROM jobs WHERE id = ?", (job_id,)).fetchone()["notes"])
    if text in notes:
        return
    cx.execute("UPDATE jobs SET notes = ? WHERE id = ?", (to_json([*notes, text]), job_id))
    add_event(cx, job_id, "note", {"text": text})


def add_event(
    cx: sqlite3.Connection, job_id: int | None, kind: str, data: dict[str, Any] | None = None
) -> int:
    """The number of the new event. job_id: None for the queue as a whole."""
    seq = cx.execute(
        "INSERT INTO events (job_id, kind, data, time) VALUES (?, ?, ?, ?)",
        (job_id, kind, to_json(data or {}), time.time()),
    ).lastrowid
    assert seq is not None
    return seq
