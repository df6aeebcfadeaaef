"""How a tab follows the queue. Nothing else brings a job's progress to the page."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import gradio as gr

from shared.engine.engine import Engine
from shared.jobs.records import CANCELLED, FAILED, LIVE, Job
from shared.ui.components.downloads import DownloadQuestion
from shared.ui.components.errors import QUIET
from shared.ui.components.notice import notice_html
from shared.ui.components.queue_state import Sight, look, watch
from shared.ui.components.tab_name import WITH_TAB
from shared.ui.components.text import plural
from shared.ui.components.viewer import Pictures
from shared.ui.create.form import Form, Updates
from shared.ui.create.queue.panel import Queue
from shared.ui.create.queue.preview import stage_html
from shared.ui.create.welcome import Welcome

FOREVER, STOP_FOREVER = "Forever", "Stop"


class Following:
    """Shows what becomes of the queue in the parts of the tab Create that it is given."""

    def __init__(
        self,
        engine: Engine,
        form: Form,
        queue: Queue,
        pictures: Pictures,
        *,
        notice: Any,
        question: DownloadQuestion,
        welcome: Welcome,
        stage: Any,
        viewer: Any,
        recent: Any,
    ):
        self._engine, self._form, self._queue, self._pictures = engine, form, queue, pictures
        self._notice, self._welcome, self._stage = notice, welcome, stage
        self._question = question
        self._viewer, self._recent = viewer, recent
        self.seen = gr.State(None)  # the newest event this tab has shown; None until its first look
        self.on_stage = gr.State(None)  # the job this tab shows as the current one

    def wire(self, page: gr.Blocks, tab: Any, submitted: Any) -> None:
        """tab: holds the tab's name. submitted: the state that a new job's number goes to."""
        # A tab follows while it is seen. The other triggers are for one that lost its stream.
        following = gr.on(
            [page.load, submitted.change, self._stage.focus], self.follow,
            [tab, self.seen], self._followed, js=WITH_TAB, trigger_mode="once", **QUIET,
        )  # fmt: skip
        self._stage.hide(None, None, None, cancels=[following])
        self._stage.glance(self.glance, [tab, self.seen], self._followed, js=WITH_TAB, **QUIET)

    async def follow(self, tab: str, seen: int | None) -> AsyncIterator[Updates]:
        """Show the queue for as long as the tab is open. A new one begins with the newest pictures."""
        store = self._engine.store
        if seen is None:
            seen = store.last_seq()
            yield await asyncio.to_thread(self._arrival)
        shown: Updates = {}
        async for sight in watch(store, seen):
            state = await asyncio.to_thread(self._state, sight, tab)
            changed = {part: value for part, value in state.items() if shown.get(part) != value}
            yield {self.seen: sight.seq, **changed, **self._ends(sight, tab)}
            shown |= changed

    async def glance(self, tab: str, seen: int | None) -> Any:
        """What has changed, for a tab that does not follow."""
        store = self._engine.store
        if seen is None or store.last_seq() == seen:
            return gr.skip()
        sight = await asyncio.to_thread(look, store, seen)
        state = await asyncio.to_thread(self._state, sight, tab)
        return {self.seen: sight.seq, **state, **self._ends(sight, tab)}

    @property
    def _followed(self) -> list[Any]:
        form = self._form
        areas = [
            self._notice, self._question.area, self._stage, self._queue.panel, self._viewer, self._recent
        ]  # fmt: skip
        told = [form.controls["model_type"], form.stock, form.generate, form.cancel, form.forever]
        return [self.seen, self.on_stage, self._welcome.column, *areas, *told]

    def _arrival(self) -> Updates:
        self._engine.reload_catalog()
        pictures = {self._viewer: self._pictures.newest(), self._recent: self._pictures.recent()}
        told = {self._notice: notice_html(self._engine.notices)} if self._engine.notices else {}
        return {**self._form.refresh(), **pictures, **told}

    def _state(self, sight: Sight, tab: str) -> Updates:
        """What follows from the queue alone; nothing but this tab's follower changes it."""
        job, forever = sight.current, self._engine.forever
        state: Updates = {
            self.on_stage: job and job.id,
            self._queue.panel: self._queue.html(sight),
            self._question.area: self._question.html(sight, tab),
            self._welcome.column: gr.update(visible=not sight.queue and self._pictures.none_yet()),
            self._form.generate: "Add to queue" if sight.queue else "Generate",
            self._form.cancel: gr.update(visible=job is not None),
            self._form.forever: STOP_FOREVER if forever.on else FOREVER,
        }
        if sight.queue or not forever.on:  # else it is between two rounds
            state[self._stage] = stage_html(sight)
        if forever.ended:
            state[self._notice] = notice_html([forever.ended], "error")
        if not sight.ended:
            return state
        return {**state, **self._arrived(sight), self._recent: self._pictures.recent()}

    def _arrived(self, sight: Sight) -> Updates:
        """The list of models, of which a job may have fetched one; every tab is told, whichever is first."""
        models = self._engine.catalog.models
        used = {str(self._engine.store.job(one.job_id).settings.get("model_type")) for one in sight.ended}
        if not all(models[name].available for name in used if name in models):
            self._engine.reload_catalog()
        return {**self._form.refresh(), self._form.stock: self._form.stock_of(self._engine.catalog)}

    def _ends(self, sight: Sight, tab: str) -> Updates:
        """What became of this tab's own jobs. Those of others are seen among the recent pictures alone."""
        updates: Updates = {}
        for event in sight.ended:
            job = self._engine.store.job(event.job_id)
            if tab and job.client == tab:
                updates.update(self._end(job))
        return updates

    def _end(self, job: Job) -> Updates:
        if job.status == FAILED:
            return {self._notice: notice_html([job.error or "The job failed."], "error")}
        kept = len(self._engine.store.images(job.id))
        viewer = {self._viewer: self._pictures.job(job.id)} if kept else {}
        if job.status == CANCELLED and job.started and job.source != LIVE:
            count = (
                f" {kept} of {plural(job.settings['batch_size'], 'picture')} had been made." if kept else ""
            )
            return {**viewer, self._notice: notice_html([f"Cancelled.{count}"])}
        return viewer
