"""A job's events as server-sent events, each with its number: a broken line goes on where it broke."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator
from typing import Any

from shared.errors import UserError
from shared.jobs.records import ENDED, Event
from shared.jobs.store import JobStore

POLL_SECONDS = 0.1
SILENCE_SECONDS = 15.0  # then a comment is sent, before something on the way takes the line for dead


async def event_lines(store: JobStore, job_id: int, after: int, previews: bool) -> AsyncIterator[str]:
    """The events of a job after number `after`, as they come, until the job has ended."""
    spoke = time.monotonic()
    yield "retry: 2000\n\n"
    while True:
        for event in store.events(after, job_id):
            after, spoke = event.seq, time.monotonic()
            if event.kind != "preview" or previews:
                yield event_text(event, _data(event, store))
            if event.kind in ENDED:
                return
        if time.monotonic() - spoke > SILENCE_SECONDS:
            if _is_over(store, job_id):  # its end was before `after`
                return
            spoke = time.monotonic()
            yield ": still here\n\n"
        await asyncio.sleep(POLL_SECONDS)


def nothing_follows(store: JobStore, job_id: int, after: int) -> bool:
    """Whether the caller has had the last event already."""
    return _is_over(store, job_id) and not store.events(after, job_id, limit=1)


def event_text(event: Event, data: dict[str, Any]) -> str:
    return f"id: {event.seq}\nevent: {event.kind}\ndata: {json.dumps(data)}\n\n"


def _data(event: Event, store: JobStore) -> dict[str, Any]:
    data: dict[str, Any] = {"job": event.job_id, "time": event.time, **event.data}
    if "path" in data:
        del data["path"]
        data["url"] = f"/api/v1/images/{data['id']}"
    if event.kind == "preview" and (newest := store.preview(event.job_id)):
        data["jpeg"] = base64.b64encode(newest[1]).decode("ascii")
    return data


def _is_over(store: JobStore, job_id: int) -> bool:
    try:
        return store.job(job_id).status in ENDED
    except UserError:  # it was deleted meanwhile
        return True
