"""The Generate area: the form on the left, the pictures on the right, and the events between them."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import gradio as gr

from shared.engine.engine import Engine
from shared.engine.gallery import Collection
from shared.engine.records import CANCELLED, FAILED, LIVE, Job
from shared.errors import UserError
from shared.ui import recall
from shared.ui.api import uploads
from shared.ui.dropping import drop_anywhere, refusal
from shared.ui.errors import QUIET, shows_errors, toast
from shared.ui.form import Form, Updates
from shared.ui.notice import notice_area, notice_html
from shared.ui.pictures import Pictures, picture_area
from shared.ui.presets import changes, lines_html
from shared.ui.queue import Queue
from shared.ui.stage import WITH_TAB, stage_area, stage_html
from shared.ui.text import plural
from shared.ui.upscale import Upscale
from shared.ui.watch import Sight, look, watch
from shared.ui.welcome import Welcome

FOREVER, STOP_FOREVER = "Forever", "Stop"
LIVE_SEED = 0
PAUSE_SECONDS = 0.25
PICTURE_FILES = [".png", ".jpg", ".jpeg", ".webp"]


class Generate:
    """Lays the area out and connects it. Only `follow` brings a job's progress to the page."""

    def __init__(self, engine: Engine, page: gr.Blocks):
        self._engine = engine
        self._pictures = Pictures(engine)
        self.queue = Queue(engine)
        self._collection = Collection(engine.store, *engine.config.picture_folders)
        self._letters = itertools.count()
        self._letter: dict[str, int] = {}  # by tab: its newest letter, while the typing goes on
        self.seen = gr.State(None)  # the newest event this tab has shown; None until its first look
        self.on_stage = gr.State(None)  # the job this tab shows as the current one
        self.tab = gr.Textbox(visible=False)  # see stage.py
        self.submitted = gr.State(None)  # the job this tab added last
        with gr.Row(elem_id="generate-area"):
            with gr.Column(scale=4, min_width=320, elem_id="form"):
                self.form = Form(engine)
                self.queue.lay_out_bar()
                self.drop = gr.File(
                    label="Use settings from a picture", file_types=PICTURE_FILES, height=64, elem_id="drop"
                )
                self.queue.lay_out_files()
                self.dropped = drop_anywhere(
                    {**dict.fromkeys(PICTURE_FILES, "drop"), ".zip": "queue-load", ".json": "queue-load"}
                )
            with gr.Column(scale=6, min_width=320, elem_id="results"):
                self.notice = notice_area()
                self.welcome = Welcome(engine.catalog.model(engine.catalog.default_model), self._is_new())
                self.stage = stage_area()
                self.queue.lay_out_panel()
                self.viewer = picture_area("viewer")
                self.upscale = Upscale(engine)
                self.recent = picture_area("recent")
        self._wire(page)

    def _wire(self, page: gr.Blocks) -> None:
        form, controls = self.form, self.form.controls
        submitted = [self.submitted, self.notice]
        form.generate.click(self.submit, [self.tab, *form.inputs], submitted, js=WITH_TAB, **QUIET)
        form.forever.click(
            self.forever, [self.tab, *form.inputs], [self.submitted, form.forever, self.notice], js=WITH_TAB,
            **QUIET,
        )  # fmt: skip
        form.grid.generate.click(
            self.submit_grid, [self.tab, *form.grid.inputs, *form.inputs], submitted, js=WITH_TAB, **QUIET
        )
        form.cancel.click(self.cancel, self.on_stage, None, **QUIET)
        controls["prompt"].change(  # not "input": pasting a prompt makes no such event
            self.redraw, [self.tab, form.live, *form.inputs], self.submitted, js=WITH_TAB,
            trigger_mode="multiple", **QUIET,
        )  # fmt: skip
        gr.on(
            [one.change for one in form.shapers], form.draw_grid, form.inputs, form.time_grid,
            trigger_mode="always_last", **QUIET,
        )  # fmt: skip
        # A tab follows while it is seen. The other triggers are for one that lost its stream.
        following = gr.on(
            [page.load, self.submitted.change, self.stage.focus], self.follow,
            [self.tab, self.seen], self._followed, js=WITH_TAB, trigger_mode="once", **QUIET,
        )  # fmt: skip
        self.stage.hide(None, None, None, cancels=[following])
        self.stage.glance(self.glance, [self.tab, self.seen], self._followed, js=WITH_TAB, **QUIET)
        suited = [*form.outputs, *self.welcome.examples]
        controls["model_type"].input(  # the last of several quick choices counts
            self.change_model, form.inputs, suited, trigger_mode="always_last", **QUIET
        )
        form.last_seed.click(self.last_seed, None, controls["seed"], **QUIET)
        self.welcome.fills(controls["prompt"])
        filled = self.filled = [*suited, self.notice]
        self.queue.wire(form, self.tab, self.notice, filled, self._fill)
        self.drop.upload(self.read_picture, [self.drop, *form.inputs], [*filled, self.drop], **QUIET)
        self.dropped.refused(self.refuse, None, self.notice, **QUIET)
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
            area.use(self.use_settings, form.inputs, filled, **QUIET)
            form.images.takes_from(area)
            self.upscale.opens_from(area)
        self.viewer.favour(self.favour, None, self.viewer, **QUIET)
        self.viewer.discard(self.discard, None, [self.viewer, self.recent, self.notice], **QUIET)
        self.notice.undo(self.restore, None, [self.viewer, self.recent], **QUIET)
        self.upscale.wire(self.tab, self.submitted, self.notice)

    # -- what the user does -------------------------------------------------------------------------------

    @shows_errors
    def submit(self, tab: str, *values: Any) -> tuple[int, str]:
        """Queue what the form says; the new job clears the notice of the last one."""
        jobs = self._engine.submit_all(self.form.read(values), uploads=uploads(), client=tab)
        self._engine.forever.ended = ""
        return jobs[-1][0], ""

    @shows_errors
    def forever(self, tab: str, *values: Any) -> tuple[Any, str, str]:
        """Begin to generate forever, or stop it."""
        forever = self._engine.forever
        if forever.on:
            forever.stop()
            return gr.skip(), FOREVER, notice_html(["What waits is still made; nothing follows it."])
        jobs = forever.start(self.form.read(values), uploads=uploads(), client=tab)
        return jobs[-1][0], STOP_FOREVER, ""

    @shows_errors
    def submit_grid(self, tab: str, *values: Any) -> tuple[int, str]:
        """Queue the pictures of a grid of what the form says."""
        axes, of_form = self.form.grid.axes(values)
        grid = self._engine.plan_grid(self.form.read(of_form), axes)
        _, job_ids = self._engine.submit_grid(grid, source="ui", uploads=uploads(), client=tab)
        return job_ids[-1], ""

    async def redraw(self, tab: str, live: bool, *values: Any) -> Any:
        """Queue what the form says once the typing has paused; of those in wait only the newest stays."""
        if not live:
            return gr.skip()
        typed = self._letter[tab] = next(self._letters)
        await asyncio.sleep(PAUSE_SECONDS)
        settings = self.form.read(values)
        if self._letter.get(tab) != typed or not settings["prompt"].strip():
            return gr.skip()
        del self._letter[tab]
        try:
            return self._submit_live(settings, tab)
        except UserError as error:
            raise toast(str(error)) from None

    def _submit_live(self, settings: dict[str, Any], tab: str) -> int:
        if settings["seed"] == -1:
            settings["seed"] = LIVE_SEED  # or every letter would give another picture
        first = self._engine.catalog.validate_all(settings)[0].settings
        job_id, _ = self._engine.submit(first, source=LIVE, newest_wins=True, uploads=uploads(), client=tab)
        return job_id

    @shows_errors
    def cancel(self, job_id: int | None) -> None:
        """Stop the job on the stage, and never the one that came after it meanwhile."""
        if job_id is not None:
            self._engine.cancel(job_id)

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
    def use_settings(self, event: gr.EventData, *values: Any) -> Updates:
        """Fill the form from a picture that was made."""
        record, catalog = self._engine.store.image(int(event.id)), self._engine.catalog
        if not record.job_id:  # found in the folder: perhaps another program's
            return self._fill(recall.from_file(Path(record.path), "this picture", catalog, values[0]), values)
        found = recall.from_metadata(record.metadata, "this picture", catalog, values[0])
        return self._fill(found, values)

    @shows_errors
    def read_picture(self, path: str, *values: Any) -> Updates:
        """Fill the form from a dropped picture."""
        found = recall.from_file(Path(path), Path(path).name, self._engine.catalog, values[0])
        return {**self._fill(found, values), self.drop: None}

    def refuse(self, event: gr.EventData) -> str:
        """Say where a file goes that cannot be dropped here."""
        return notice_html([refusal(event)], "error")

    @shows_errors
    def favour(self, event: gr.EventData) -> str:
        """Make the picture on view a favourite, or none."""
        record = self._engine.store.image(int(event.id))
        self._collection.favour([record.id], not record.favourite)
        return self._pictures.viewer(record.id)

    @shows_errors
    def discard(self, event: gr.EventData) -> Updates:
        """Move the picture on view into the trash, and show another one of its batch, or the newest."""
        record = self._engine.store.image(int(event.id))
        moved = self._collection.discard([record.id])
        notice = notice_html(moved.problems or ["Deleted: it lies in the gallery's trash."], undo=moved.ids)
        shown = self._pictures.job(record.job_id) or self._pictures.newest()
        return {self.viewer: shown, self.recent: self._pictures.recent(), self.notice: notice}

    @shows_errors
    def restore(self, event: gr.EventData) -> Updates:
        """Take pictures out of the trash again."""
        ids = [int(one) for one in event.ids]
        self._collection.restore(ids)
        return {self.viewer: self._pictures.viewer(ids[0]), self.recent: self._pictures.recent()}

    @shows_errors
    def apply_preset(self, choice: str | None, *values: Any) -> Updates:
        """Fill the form from a profile or preset."""
        presets = self.form.presets
        found = presets.applied(choice, self.form.read(values))
        return {**self._fill(found, values), self.notice: "", presets.about: lines_html(found.report)}

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

    async def follow(self, tab: str, seen: int | None) -> AsyncIterator[Updates]:
        """Show the queue for as long as the tab is open. A new one begins with the newest pictures."""
        store = self._engine.store
        if seen is None:
            seen = store.last_seq()
            yield await asyncio.to_thread(self._arrival)
        shown: Updates = {}
        async for sight in watch(store, seen):
            state = await asyncio.to_thread(self._state, sight)
            changed = {part: value for part, value in state.items() if shown.get(part) != value}
            yield {self.seen: sight.seq, **changed, **self._ends(sight, tab)}
            shown |= changed

    async def glance(self, tab: str, seen: int | None) -> Any:
        """What has changed, for a tab that does not follow."""
        store = self._engine.store
        if seen is None or store.last_seq() == seen:
            return gr.skip()
        sight = await asyncio.to_thread(look, store, seen)
        state = await asyncio.to_thread(self._state, sight)
        return {self.seen: sight.seq, **state, **self._ends(sight, tab)}

    @property
    def _followed(self) -> list[Any]:
        shown = [self.notice, self.welcome.column, self.stage, self.queue.panel, self.viewer, self.recent]
        return [
            self.seen,
            self.on_stage,
            *shown,
            self.form.controls["model_type"],
            self.form.generate,
            self.form.cancel,
            self.form.forever,
        ]

    def _arrival(self) -> Updates:
        self._engine.reload_catalog()
        pictures = {self.viewer: self._pictures.newest(), self.recent: self._pictures.recent()}
        told = {self.notice: notice_html(self._engine.notices)} if self._engine.notices else {}
        return {**self.form.refresh(), **pictures, **told}

    def _state(self, sight: Sight) -> Updates:
        """What follows from the queue alone; nothing but this tab's follower changes it."""
        job, forever = sight.current, self._engine.forever
        state: Updates = {
            self.on_stage: job and job.id,
            self.queue.panel: self.queue.html(sight),
            self.welcome.column: gr.update(visible=not sight.queue and self._is_new()),
            self.form.generate: "Add to queue" if sight.queue else "Generate",
            self.form.cancel: gr.update(visible=job is not None),
            self.form.forever: STOP_FOREVER if forever.on else FOREVER,
        }
        if sight.queue or not forever.on:  # else it is between two rounds
            state[self.stage] = stage_html(sight)
        if forever.ended:
            state[self.notice] = notice_html([forever.ended], "error")
        return {**state, self.recent: self._pictures.recent()} if sight.ended else state

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
            return {self.notice: notice_html([job.error or "The job failed."], "error")}
        kept = len(self._engine.store.images(job.id))
        viewer = {self.viewer: self._pictures.job(job.id)} if kept else {}
        if job.status == CANCELLED and job.started and job.source != LIVE:
            count = (
                f" {kept} of {plural(job.settings['batch_size'], 'picture')} had been made." if kept else ""
            )
            return {**viewer, self.notice: notice_html([f"Cancelled.{count}"])}
        return viewer

    def _fill(self, found: recall.Recalled, values: tuple[Any, ...] = ()) -> Updates:
        """Show settings in the form. values: of the form before; given, what they differ in is told."""
        model = self._engine.catalog.model(found.settings["model_type"])
        settings, lost = self.form.images.present(found.settings)
        settings, replaced = self.form.enlarging.present(model, settings)
        axes, unfit = self.form.grid.fill(model, found.axes)
        filled = {**self.form.fill(settings), **self.welcome.suit(model), **axes}
        before = dict(zip(self.form.controls, values, strict=True)) if values else {}
        changed = recall.differences(before, settings) if before else []
        return {**filled, self.notice: notice_html([*found.report, *lost, *replaced, *unfit, *changed])}

    def _is_new(self) -> bool:
        return not self._engine.store.images(limit=1)
