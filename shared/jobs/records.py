"""What the job store hands out: plain frozen records, safe to pass between threads, made from its rows."""

from __future__ import annotations

import json
import sqlite3
from dataclasses import dataclass, field
from typing import Any

QUEUED, RUNNING, DONE, FAILED, CANCELLED = "queued", "running", "done", "failed", "cancelled"
#: values of the column held: its user edits the job, or has to say yes to its download
EDITED, ASKS = 1, 2
LIVE = "live"  # the source of jobs that follow typing: they come and go with every letter
FOREVER = "forever"  # of those that are made again and again
ON_A_PAGE = ("ui", FOREVER)  # the sources of jobs for which the page can ask something
ENDED = (DONE, FAILED, CANCELLED)


@dataclass(frozen=True)
class Job:
    """One request for a batch of images. Times are seconds since the epoch.

    grid: the grid that it belongs to; cell: its number there, None for the job that draws the grid.
    held: it waits for its user, who edits it, or is asked (asks) whether its files may be downloaded.
    client: the tab that submitted it, "" for programs. dismissed: its failure has been dealt with.
    """

    id: int
    status: str
    settings: dict[str, Any]
    source: str
    output_dir: str | None
    attempts: int
    phase: str
    step: int
    steps: int
    seconds_left: float | None
    error: str | None
    notes: list[str] = field(default_factory=list)
    created: float = 0.0
    started: float | None = None
    finished: float | None = None
    grid: int | None = None
    cell: int | None = None
    held: bool = False
    client: str = ""
    dismissed: bool = False
    asks: bool = False


@dataclass(frozen=True)
class Counts:
    """How many jobs there are of each status; `queued` counts the held ones too."""

    queued: int = 0
    running: int = 0
    done: int = 0
    failed: int = 0
    cancelled: int = 0


@dataclass(frozen=True)
class Event:
    """One thing that happened to a job, or to the queue as a whole (job_id 0). `seq` grows over all of them,
    so it works as a cursor.
    """

    seq: int
    job_id: int
    kind: str
    data: dict[str, Any]
    time: float


@dataclass(frozen=True)
class ImageRecord:
    """One saved image file; width and height in pixels, `seed` and `index` are this image's own.

    job_id is 0 for a file that was found in the folder. place: "here", "trash", or "gone": not among the
    outputs any more.
    """

    id: int
    job_id: int
    index: int
    path: str
    seed: int
    width: int
    height: int
    created: float
    metadata: dict[str, Any]
    favourite: bool = False
    place: str = "here"


def to_json(value: Any) -> str:
    """As the tables hold what has parts."""
    return json.dumps(value, ensure_ascii=False, default=str)


def job_of(row: sqlite3.Row) -> Job:
    """A row of the table jobs."""
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
        grid=row["grid"],
        cell=row["cell"],
        held=bool(row["held"]),
        client=row["client"],
        dismissed=bool(row["dismissed"]),
        asks=row["held"] == ASKS,
    )


def event_of(row: sqlite3.Row) -> Event:
    """A row of the table events."""
    return Event(row["seq"], row["job_id"] or 0, row["kind"], json.loads(row["data"]), row["time"])


def image_of(row: sqlite3.Row) -> ImageRecord:
    """A row of the table images."""
    return ImageRecord(
        id=row["id"],
        job_id=row["job_id"] or 0,
        index=row["number"],
        path=row["path"],
        seed=row["seed"],
        width=row["width"],
        height=row["height"],
        created=row["created"],
        metadata=json.loads(row["metadata"]),
        favourite=bool(row["favourite"]),
        place=row["place"],
    )
