"""Generate forever: when a job is done, it is queued again with another seed, until somebody stops it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from typing import Any

from shared.errors import UserError
from shared.jobs.inputs import PICTURES
from shared.jobs.records import CANCELLED, DONE, ENDED
from shared.jobs.records import FOREVER as SOURCE
from shared.jobs.store import JobStore
from shared.settings.validation import Validated

log = logging.getLogger(__name__)

POLL_SECONDS = 0.05
ENDED_WITH_THE_PROGRAM = "Generate forever ended when the program was stopped; this was its last round."

Submit = Callable[..., list[tuple[int, Validated]]]


class Forever:
    """One at a time for all pages, in the process of the engine: it ends with the program, not with a page.

    A failure ends it, and so does cancelling one of its jobs. submit: Engine.submit_all.
    """

    def __init__(self, store: JobStore, submit: Submit):
        self._store, self._submit = store, submit
        self._starting = threading.Lock()  # of two pages that start at once, one does
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self.ended = ""  # why it ended by itself, one sentence; whoever has read it may clear it

    @property
    def on(self) -> bool:
        return self._thread is not None and self._thread.is_alive() and not self._stopping.is_set()

    def start(self, values: Mapping[str, Any], **options: Any) -> list[tuple[int, Validated]]:
        """Queue the first round, as `Engine.submit_all`; from the second on, seeds are random."""
        with self._starting:
            if self.on:
                raise UserError("Generate forever is on already: stop it first.")
            jobs = self._submit(values, source=SOURCE, **options)
            kept = {name: value for name, value in jobs[0][1].settings.items() if name in PICTURES}
            again = {**values, **kept, "seed": -1}  # uploads do not last; our copies of them do
            self.ended, self._stopping = "", threading.Event()
            self._thread = threading.Thread(
                target=self._run, args=(_ids(jobs), again, options, self._stopping), name=SOURCE, daemon=True
            )
            self._thread.start()
            return jobs

    def stop(self) -> None:
        """The round in the queue is the last one."""
        self._stopping.set()

    def tell_of_the_last_stop(self) -> None:
        """Note in the jobs that a stopped program left behind that no others will follow."""
        for job in self._store.queue():
            if job.source == SOURCE:
                self._store.note(job.id, ENDED_WITH_THE_PROGRAM)

    def _run(
        self, jobs: list[int], values: dict[str, Any], options: dict[str, Any], stopping: threading.Event
    ) -> None:
        try:
            while True:
                reason = self._outcome(jobs, stopping)
                if reason or stopping.is_set():
                    break
                jobs = _ids(self._submit(values, source=SOURCE, **options))
        except UserError as error:
            reason = str(error)
        except Exception:
            log.exception("Generate forever ended.")
            reason = "the log has the details."
        if reason:
            self.ended = f"Generate forever ended: {reason}"
            stopping.set()
            self._store.note(jobs[-1], self.ended)  # an event: pages look again

    def _outcome(self, job_ids: list[int], stopping: threading.Event) -> str:
        """Wait for these jobs, or for the stop; why no others should follow, "" when all were done."""
        for job_id in job_ids:
            while (job := self._store.job(job_id)).status not in ENDED:
                if stopping.wait(POLL_SECONDS):
                    return ""
            if job.status != DONE:
                return "its job was cancelled." if job.status == CANCELLED else str(job.error)
        return ""


def _ids(jobs: list[tuple[int, Validated]]) -> list[int]:
    return [job_id for job_id, _ in jobs]
