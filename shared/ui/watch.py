"""From the store's events to what a page shows: the queue, the newest preview, the jobs that ended."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

from shared.engine.records import ENDED, Event, Job
from shared.engine.store import JobStore

POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Sight:
    """What can be seen at event number `seq`: `queue` has the running job first, `ended` what ended since."""

    seq: int
    queue: list[Job]
    preview: bytes | None
    ended: list[Event]


def look(store: JobStore, after: int) -> Sight:
    """The state of the queue now, with the jobs that ended after event `after`."""
    seq = store.last_seq()
    queue = store.queue()
    running = queue[0] if queue and queue[0].status == "running" else None
    preview = store.preview(running.id) if running else None
    ended = [event for event in store.events(after) if event.kind in ENDED and event.seq <= seq]
    return Sight(seq, queue, preview[1] if preview else None, ended)


async def watch(
    store: JobStore, after: int, goes_on: Callable[[], bool] = lambda: False
) -> AsyncIterator[Sight]:
    """A sight at once and one per change, until the queue is empty and nothing `goes_on` to fill it. Costs
    one tiny query per poll.
    """
    sight = look(store, after)
    yield sight
    while sight.queue or goes_on():
        await asyncio.sleep(POLL_SECONDS)
        if store.last_seq() != sight.seq:
            sight = look(store, sight.seq)
            yield sight
