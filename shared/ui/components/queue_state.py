"""From the store's events to what a page shows: the queue, the newest preview, the jobs that ended."""

from __future__ import annotations

import asyncio
import logging
import math
import sqlite3
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace

from shared.jobs.records import ENDED, RUNNING, Event, Job
from shared.jobs.store import CHANGES, JobStore

log = logging.getLogger(__name__)

POLL_SECONDS = 0.1
ALIVE_SECONDS = 15.0  # Gradio notices that a tab has gone when its stream has something to say
SHOWN = 50  # jobs of the queue; more are only counted
FAILURES = 5


@dataclass(frozen=True)
class Sight:
    """What can be seen at event number `seq`.

    `queue` has the running job first, then the first of those that wait; `more` counts the rest. `ended` is
    what ended since the sight before, `failures` the newest that nobody has dealt with.
    """

    seq: int
    queue: list[Job]
    preview: bytes | None
    ended: list[Event]
    more: int = 0
    paused: bool = False
    failures: list[Job] = field(default_factory=list)

    @property
    def current(self) -> Job | None:
        """The running job, or the one that is about to begin; None when none is."""
        begins = (job for job in self.queue if job.status == RUNNING or not (self.paused or job.held))
        return next(begins, None)

    @property
    def total(self) -> int:
        return len(self.queue) + self.more


def look(store: JobStore, after: int, last: Sight | None = None) -> Sight:
    """The state of the queue now, with the jobs that ended after event `after`.

    last: the sight before. While only the running job goes on, nothing else is read again.
    """
    seq = store.last_seq()
    changes = [event for event in store.events(after, kinds=CHANGES) if event.seq <= seq]
    if last is None or changes:
        sight = _whole(store, seq)
    else:
        running = [store.job(job.id) for job in last.queue[:1]]
        sight = replace(last, seq=seq, queue=[*running, *last.queue[1:]])
    current = sight.current
    preview = store.preview(current.id) if current and current.status == RUNNING else None
    ended = [event for event in changes if event.kind in ENDED]
    return replace(sight, preview=preview[1] if preview else None, ended=ended)


def _whole(store: JobStore, seq: int) -> Sight:
    queue, counts = store.queue(SHOWN), store.counts()
    more = max(0, counts.queued + counts.running - len(queue))
    return Sight(seq, queue, None, [], more, store.paused(), store.failures(FAILURES))


async def watch(store: JobStore, after: int) -> AsyncIterator[Sight]:
    """A sight at once, one per change, and one every ALIVE_SECONDS. Costs one tiny query per poll."""
    sight: Sight | None = None
    shown = -math.inf
    while True:
        try:
            changed = sight is None or store.last_seq() != sight.seq
            if changed or time.monotonic() - shown > ALIVE_SECONDS:
                sight = await asyncio.to_thread(look, store, sight.seq if sight else after, sight)
                shown = time.monotonic()
                yield sight
        except sqlite3.OperationalError as error:  # such as a full disk: the tab goes on when it is over
            log.warning("The queue cannot be read (%s); trying again.", error)
        await asyncio.sleep(POLL_SECONDS)
