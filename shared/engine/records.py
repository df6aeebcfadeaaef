"""What the job store hands out: plain frozen records, safe to pass between threads."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

QUEUED, RUNNING, DONE, FAILED, CANCELLED = "queued", "running", "done", "failed", "cancelled"
LIVE = "live"  # the source of jobs that follow typing: they come and go with every letter
ENDED = (DONE, FAILED, CANCELLED)


@dataclass(frozen=True)
class Job:
    """One request for a batch of images. Times are seconds since the epoch.

    grid: the grid that it belongs to; cell: its number there, None for the job that draws the grid.
    held: it waits for its user, who edits it. client: the tab that submitted it, "" for programs. dismissed:
    its failure has been dealt with.
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
