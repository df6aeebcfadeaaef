"""The Generate area: the form on the left, the pictures on the right, and the events between them."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import gradio as gr

from shared.engine.engine import Engine
from shared.engine.records import CANCELLED, DONE, FAILED, Event
from shared.errors import UserError
from shared.ui import recall
from shared.ui.api import uploads
from shared.ui.errors import QUIET, shows_errors, toast
from shared.ui.form import Form, Updates
from shared.ui.notice import notice_area, notice_html
from shared.ui.pictures import Pictures, picture_area
from shared.ui.presets import changes, lines_html
from shared.ui.stage import stage_area, stage_html
from shared.ui.watch import Sight, watch
from shared.ui.welcome import Welcome

LIVE = "live"  # the source of jobs that follow typing
LIVE_SEED = 0
PAUSE_SECONDS = 0.25
PICTURE_FILES = [".png", ".jpg", ".jpeg", ".webp"]


class Generate:
    """Lays the area out and connects it. Only `follow` brings a job's progress to the page."""

    def __init__(self, engine: Engine, page: gr.Blocks):
        self._engine = engine
        self._pictures = Pictures(engine)
        self._letters = itertools.count()
        self._typed: dict[str, int] = {}  # by tab: its newest letter, while the typing goes on
        self.seen = gr.State(None)  # the newest event this tab has shown; None until its first look
        self.submitted = gr.State(None)  # the job this tab added last
        with gr.Row(elem_id="generate-area"):
            with gr.Column(scale=4, min_width=320, elem_id="form"):
                self.form = Form(engine)
                self.drop = gr.File(
                    label="Use settings from a picture", file_types=PICTURE_FILES, height=64, elem_id="drop"
                )
            with gr.Column(scale=6, min_width=320, elem_id="results"):
                self.notice = notice_area()
                self.welcome = Welcome(engine.catalog.model(engine.catalog.default_model), self._is_new())
                self.stage = stage_area()
                self.viewer = picture_area("viewer")
                self.recent = picture_area("recent")
        self._wire(page)

    def _wire(self, page: gr.Blocks) -> None:
        form, controls = self.form, self.form.controls
        form.generate.click(self.submit, form.inputs, [self.submitted, self.notice], **QUIET)
        form.cancel.click(self.cancel, None, None, **QUIET)
        controls["prompt"].change(  # not "input": pasting a prompt makes no such event
            self.redraw, [form.live, *form.inputs], self.submitted, trigger_mode="multiple", **QUIET
        )
        gr.on(
            [one.change for one in form.shapers], form.draw_grid, form.inputs, form.time_grid,
            trigger_mode="always_last", **QUIET,
        )  # fmt: skip
        # "always_last": what is added while this tab follows gets a second round, which ends at once when the
        # first has already shown it. So no job is followed twice and none is missed.
        gr.on(
            [page.load, self.submitted.change, self.stage.focus], self.follow, self.seen, self._followed,
            trigger_mode="always_last", **QUIET,
        )  # fmt: skip
        suited = [*form.outputs, *self.welcome.examples]
        controls["model_type"].input(  # the last of several quick choices counts
            self.change_model, form.inputs, suited, trigger_mode="always_last", **QUIET
        )
        form.last_seed.click(self.last_seed, None, controls["seed"], **QUIET)
        self.welcome.fills(controls["prompt"])
        filled = [*suited, self.notice]
        self.drop.upload(
            self.read_picture, [self.drop, controls["model_type"]], [*filled, self.drop], **QUIET
        )
        presets = form.presets
        presets.apply.click(
            self.apply_preset, [presets.choice, *form.inputs], [*filled, presets.about], **QUIET
        )
        saved = [presets.name, presets.choice, presets.about, self.notice]
        presets.save.click(
            self.save_preset, [presets.name, presets.whole, *form.inputs],
            saved, **QUIET,
        )  # fmt: skip
        presets.about.replace(
            self.replace_preset, [presets.name, presets.whole, *form.inputs], saved, **QUIET
        )
        presets.acts.defaults(self.change_defaults, form.inputs, filled, **QUIET)
        for area in (self.viewer, self.recent):
            area.pick(self.pick, None, self.viewer, **QUIET)
            area.use(self.use_settings, None, filled, **QUIET)
            form.images.takes_from(area)

    # -- what the user does -------------------------------------------------------------------------------

    @shows_errors
    def submit(self, *values: Any) -> tuple[int, str]:
        """Queue what the form says; the new job clears the notice of the last one."""
        job_id, _ = self._engine.submit(self.form.read(values), source="ui", uploads=uploads())
        return job_id, ""

    async def redraw(self, request: gr.Request, live: bool, *values: Any) -> Any:
        """Queue what the form says once the typing has paused; of those in wait only the newest stays."""
        if not live:
            return gr.skip()
        tab = str(request.session_hash)
        typed = self._typed[tab] = next(self._letters)
        await asyncio.sleep(PAUSE_SECONDS)
        settings = self.form.read(values)
        if self._typed.get(tab) != typed or not settings["prompt"].strip():
            return gr.skip()
        del self._typed[tab]
        try:
            return self._submit_live(settings)
        except UserError as error:
            raise toast(str(error)) from None

    def _submit_live(self, settings: dict[str, Any]) -> int:
        if settings["seed"] == -1:
            settings["seed"] = LIVE_SEED  # or every letter would give another picture
        job_id, _ = self._engine.submit(settings, source=LIVE, newest_wins=True, uploads=uploads())
        return job_id

    @shows_errors
    def cancel(self) -> None:
        """Stop the job on the stage."""
        for job in self._engine.store.queue(limit=1):
            self._engine.cancel(job.id)

    @shows_errors
    def change_model(self, *values: Any) -> Updates:
        """Show what acts on the model just chosen."""
        model = self._engine.catalog.model(values[0])
        return {**self.form.change_model(values), **self.welcome.suit(model)}

    @shows_errors
    def last_seed(self) -> Any:
        """The seed of the newest batch."""
        newest = self._engine.store.images(limit=1)
        return self._engine.store.images(newest[0].job_id)[0].seed if newest else gr.skip()

    @shows_errors
    def pick(self, event: gr.EventData) -> str:
        """Put a picture on view, with its batch."""
        return self._pictures.viewer(int(event.id))

    @shows_errors
    def use_settings(self, event: gr.EventData) -> Updates:
        """Fill the form from the picture on view."""
        found, catalog = self._engine.store.image(int(event.id)).metadata, self._engine.catalog
        return self._fill(recall.from_metadata(found, "this picture", catalog, catalog.default_model))

    @shows_errors
    def read_picture(self, path: str, model_id: str) -> Updates:
        """Fill the form from a dropped picture."""
        found = recall.from_file(Path(path), Path(path).name, self._engine.catalog, model_id)
        return {**self._fill(found), self.drop: None}

    @shows_errors
    def apply_preset(self, choice: str | None, *values: Any) -> Updates:
        """Fill the form from a profile or preset."""
        presets = self.form.presets
        found = presets.applied(choice, self.form.read(values))
        return {**self._fill(found), self.notice: "", presets.about: lines_html(found.report)}

    @shows_errors
    def save_preset(self, name: str, whole: bool, *values: Any) -> Updates:
        """Keep what the form says under a name."""
        return self._save_preset(name, whole, values)

    @shows_errors
    def replace_preset(self, name: str, whole: bool, *values: Any) -> Updates:
        """The same in the place of the preset that has the name."""
        return self._save_preset(name, whole, values, replace=True)

    def _save_preset(self, name: str, whole: bool, values: tuple[Any, ...], replace: bool = False) -> Updates:
        path, updates = self.form.presets.saved(name, whole, self.form.read(values), replace)
        return updates if path is None else {**updates, self.notice: notice_html([f"Saved as {path}."])}

    @shows_errors
    def change_defaults(self, event: gr.EventData, *values: Any) -> Updates:
        """Save the model's defaults, or go back to the factory's."""
        if event.name == "factory":
            return self.factory_defaults(values)
        return {self.notice: self.keep_defaults(values)}

    def keep_defaults(self, values: tuple[Any, ...]) -> str:
        """Make what the form says the defaults of its model, for the page and for programs."""
        settings = self.form.read(values)
        kept = self._engine.save_defaults(settings)
        name = self._engine.catalog.model(settings["model_type"]).name
        if not kept:
            return notice_html([f"{name} keeps its factory defaults: the form says nothing else."])
        lines = changes(self._engine.catalog.model(settings["model_type"]).factory, kept)
        return notice_html([f"These are the defaults of {name} from now on.", *lines])

    def factory_defaults(self, values: tuple[Any, ...]) -> Updates:
        """Forget what was saved for the model, and show its factory defaults; what was typed stays."""
        model = self._engine.catalog.model(values[0])
        asides = self._engine.reset_defaults([model.id])
        said = [f"The saved defaults are now in {path.name}." for path in asides]
        shown = notice_html([f"{model.name} has its factory defaults.", *said])
        fresh = self.form.fill({"model_type": model.id, "prompt": self.form.read(values)["prompt"]})
        return {**fresh, self.notice: shown}

    # -- what jobs do -------------------------------------------------------------------------------------

    async def follow(self, seen: int | None) -> AsyncIterator[Updates]:
        """Show the queue until it is empty. A new tab begins with the models and the newest pictures."""
        store = self._engine.store
        if seen is None:
            seen = store.last_seq()
            yield self._arrival()
        async for sight in watch(store, seen):
            yield self._show(sight)

    @property
    def _followed(self) -> list[Any]:
        shown = [self.notice, self.welcome.column, self.stage, self.viewer, self.recent]
        return [self.seen, *shown, self.form.controls["model_type"], self.form.generate, self.form.cancel]

    def _arrival(self) -> Updates:
        self._engine.reload_catalog()
        pictures = {self.viewer: self._pictures.newest(), self.recent: self._pictures.recent()}
        told = {self.notice: notice_html(self._engine.notices)} if self._engine.notices else {}
        return {**self.form.refresh(), **pictures, **told}

    def _show(self, sight: Sight) -> Updates:
        busy = bool(sight.queue)
        updates: Updates = {
            self.seen: sight.seq,
            self.stage: stage_html(sight) if busy else "",
            self.welcome.column: gr.update(visible=not busy and self._is_new()),
            self.form.generate: "Add to queue" if busy else "Generate",
            self.form.cancel: gr.update(visible=busy),
        }
        for event in sight.ended:
            updates.update(self._show_end(event))
        if sight.ended:
            updates[self.recent] = self._pictures.recent()
        return updates

    def _show_end(self, event: Event) -> Updates:
        if event.kind == DONE:
            return {self.viewer: self._pictures.job(event.job_id)}
        if event.kind == FAILED:
            return {self.notice: notice_html([event.data.get("error") or "The job failed."], "error")}
        if event.kind == CANCELLED and self._engine.store.job(event.job_id).source != LIVE:
            return {self.notice: notice_html(["Cancelled."])}
        return {}

    def _fill(self, found: recall.Recalled) -> Updates:
        model = self._engine.catalog.model(found.settings["model_type"])
        settings, lost = self.form.images.present(found.settings)
        filled = {**self.form.fill(settings), **self.welcome.suit(model)}
        return {**filled, self.notice: notice_html([*found.report, *lost])}

    def _is_new(self) -> bool:
        return not self._engine.store.images(limit=1)
