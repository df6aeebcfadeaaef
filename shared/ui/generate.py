"""The Generate area: the form on the left, the pictures on the right, and the events between them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import gradio as gr

from shared.engine.engine import Engine
from shared.engine.records import CANCELLED, DONE, FAILED, Job
from shared.ui import recall
from shared.ui.errors import shows_errors
from shared.ui.form import Form, Updates
from shared.ui.notice import notice_area, notice_html
from shared.ui.stage import WELCOME, stage_html
from shared.ui.viewer import Recent, Viewer
from shared.ui.watch import Sight, watch

QUIET: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
PICTURES = [".png", ".jpg", ".jpeg", ".webp"]

# An idle page has no timer: it looks at the queue again when its tab comes back into view.
_LOOK_AGAIN = """document.addEventListener('visibilitychange', () => {
  if (!document.hidden) trigger('focus');
});"""


class Generate:
    """Lays the area out and connects it. `follow` is the one way in which a job's progress reaches the page."""

    def __init__(self, engine: Engine, page: gr.Blocks):
        self._engine = engine
        self.seen = gr.State(None)  # the newest event this tab has shown; None until the first look
        self.submitted = gr.State(None)  # the job this tab added last
        with gr.Row(elem_id="generate-area"):
            with gr.Column(scale=4, min_width=320, elem_id="form"):
                self.form = Form(engine.catalog)
                self.drop = gr.File(
                    label="Use settings from a picture", file_types=PICTURES, height=110, elem_id="drop"
                )
            with gr.Column(scale=6, min_width=320, elem_id="results"):
                self.notice = notice_area()
                self.stage = gr.HTML(WELCOME, js_on_load=_LOOK_AGAIN, elem_id="stage")
                self.viewer = Viewer(engine)
                self.recent = Recent(engine)
        self._wire(page)

    # -- events -------------------------------------------------------------------------------------------

    def _wire(self, page: gr.Blocks) -> None:
        form, viewer = self.form, self.viewer
        form.generate.click(self.submit, form.inputs, [self.submitted, self.notice], **QUIET)
        # "always_last": a job added while this tab follows is seen by a second round, which ends at once
        # when the first has shown it; so no job is followed twice and none is missed.
        gr.on(
            [page.load, self.submitted.change, self.stage.focus], self.follow, self.seen, self._followed,
            trigger_mode="always_last", concurrency_limit=None, **QUIET,
        )  # fmt: skip
        form.cancel.click(self.cancel, None, None, **QUIET)
        form.last_seed.click(self.last_seed, viewer.selected, form.controls["seed"], **QUIET)
        filled = [*form.outputs, self.notice]
        viewer.use.click(self.use_settings, viewer.selected, filled, **QUIET)
        self.drop.upload(
            self.read_picture, [self.drop, form.controls["model_type"]], [*filled, self.drop], **QUIET
        )
        self.recent.gallery.select(self.pick, self.recent.ids, viewer.outputs, **QUIET)

    @property
    def _followed(self) -> list[Any]:
        return [
            self.seen, self.stage, self.notice, self.form.generate, self.form.cancel,
            *self.viewer.outputs, *self.recent.outputs,
        ]  # fmt: skip

    @shows_errors
    def submit(self, *values: Any) -> tuple[int, str]:
        """Queue what the form says; the new job clears the notice of the last one."""
        job_id, _ = self._engine.submit(self.form.read(values), source="ui")
        return job_id, ""

    @shows_errors
    def cancel(self) -> None:
        """Stop the job on the stage."""
        queue = self._engine.store.queue(limit=1)
        if queue:
            self._engine.cancel(queue[0].id)

    async def follow(self, seen: int | None) -> AsyncIterator[Updates]:
        """Show the queue until it is empty. A new tab begins with the newest pictures."""
        store = self._engine.store
        if seen is None:
            seen = store.last_seq()
            yield {**self._newest(), **self.recent.show()}
        async for sight in watch(store, seen):
            yield self._show(sight)

    @shows_errors
    def last_seed(self, selected: int | None) -> Any:
        """The seed of the picture on view."""
        return gr.skip() if selected is None else self._engine.store.image(selected).seed

    @shows_errors
    def use_settings(self, selected: int) -> Updates:
        """Fill the form from the picture on view."""
        record = self._engine.store.image(selected)
        default = self._engine.catalog.default_model
        found = recall.from_metadata(record.metadata, Path(record.path).name, self._engine.catalog, default)
        return self._fill(found)

    @shows_errors
    def read_picture(self, path: str, model_id: str) -> Updates:
        """Fill the form from a dropped picture."""
        found = recall.from_file(Path(path), Path(path).name, self._engine.catalog, model_id)
        return {**self._fill(found), self.drop: None}

    @shows_errors
    def pick(self, ids: list[int], event: gr.SelectData) -> Updates:
        """Put a recent picture on view, with its batch."""
        return self.viewer.show(*self.recent.picked(ids, event.index))

    # -- what is shown ------------------------------------------------------------------------------------

    def _fill(self, found: recall.Recalled) -> Updates:
        return {**self.form.fill(found.settings), self.notice: notice_html(found.report)}

    def _newest(self) -> Updates:
        newest = self._engine.store.images(limit=1)
        return self.viewer.show(self._engine.store.images(newest[0].job_id)) if newest else {}

    def _show(self, sight: Sight) -> Updates:
        updates: Updates = {self.seen: sight.seq, **self._buttons(sight.queue)}
        for event in sight.ended:
            if event.kind == DONE:
                updates.update(self.viewer.show(self._engine.store.images(event.job_id)))
            elif event.kind == FAILED:
                updates[self.notice] = notice_html([event.data.get("error") or "The job failed."], "error")
            elif event.kind == CANCELLED:
                updates[self.notice] = notice_html(["Cancelled."])
        if sight.ended:
            updates.update(self.recent.show())
        if sight.queue:
            updates.update(self.viewer.hide())
        return {**updates, self.stage: self._stage(sight)}

    def _stage(self, sight: Sight) -> str:
        if sight.queue:
            return stage_html(sight)
        return "" if self._engine.store.images(limit=1) else WELCOME

    def _buttons(self, queue: list[Job]) -> Updates:
        return {
            self.form.generate: "Add to queue" if queue else "Generate",
            self.form.cancel: gr.update(visible=bool(queue)),
        }
