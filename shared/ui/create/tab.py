"""The tab Create: the form on the left, the pictures on the right, and what the user does with them."""

from __future__ import annotations

import asyncio
import itertools
from pathlib import Path
from typing import Any

import gradio as gr

from shared.engine.engine import Engine
from shared.errors import UserError
from shared.jobs.records import LIVE
from shared.library.consent import NotAgreed
from shared.ui.api import uploads
from shared.ui.components.downloads import DownloadQuestion
from shared.ui.components.drop_target import drop_anywhere, refusal
from shared.ui.components.errors import QUIET, shows_errors, toast
from shared.ui.components.notice import notice_area, notice_html
from shared.ui.components.tab_name import WITH_TAB
from shared.ui.components.viewer import Pictures, picture_area
from shared.ui.create import import_settings
from shared.ui.create.defaults import Defaults
from shared.ui.create.form import Form, Updates
from shared.ui.create.queue.live_updates import FOREVER, STOP_FOREVER, Following
from shared.ui.create.queue.panel import Queue, is_queue
from shared.ui.create.queue.preview import stage_area
from shared.ui.create.queue.viewer_actions import PictureActs
from shared.ui.create.upscale import Upscale
from shared.ui.create.welcome import Welcome

LIVE_SEED = 0
PAUSE_SECONDS = 0.25
PICTURE_FILES = [".png", ".jpg", ".jpeg", ".webp"]


class Generate:
    """Lays the tab out and connects it."""

    def __init__(self, engine: Engine, page: gr.Blocks):
        self._engine = engine
        self._pictures = Pictures(engine)
        self.queue = Queue(engine)
        self._letters = itertools.count()
        self._letter: dict[str, int] = {}  # by tab: its newest letter, while the typing goes on
        self.tab = gr.Textbox(visible=False)  # see components/tab_name.py
        self.submitted = gr.State(None)  # the job this tab added last
        with gr.Row(elem_id="generate-area"):
            with gr.Column(scale=4, min_width=320, elem_id="form"):
                self.form = Form(engine)
                self.queue.lay_out_bar()
                with gr.Row(elem_id="extras"):
                    self.drop = gr.File(
                        label="Use settings from a picture",
                        file_types=[*PICTURE_FILES, *import_settings.TEXT_FILES],
                        height=44,
                        elem_id="drop",
                    )
                    self.queue.lay_out_files()
                fields = dict.fromkeys([*PICTURE_FILES, *import_settings.TEXT_FILES], "drop")
                self.dropped = drop_anywhere({**fields, ".zip": "queue-load"})
            with gr.Column(scale=6, min_width=320, elem_id="results"):
                self.notice = notice_area()
                self.question = DownloadQuestion(engine)
                self.welcome = Welcome(self.form.first, self._pictures.none_yet())
                self.stage = stage_area()
                self.queue.lay_out_panel()
                self.viewer = picture_area("viewer")
                self.upscale = Upscale(engine)
                self.recent = picture_area("recent")
        self.following = Following(
            engine, self.form, self.queue, self._pictures, notice=self.notice, question=self.question,
            welcome=self.welcome, stage=self.stage, viewer=self.viewer, recent=self.recent,
        )  # fmt: skip
        self.acts = PictureActs(engine, self._pictures, self.viewer, self.recent, self.notice)
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
        form.cancel.click(self.cancel, self.following.on_stage, None, **QUIET)
        controls["prompt"].change(  # not "input": pasting a prompt makes no such event
            self.redraw, [self.tab, form.live, *form.inputs], self.submitted, js=WITH_TAB,
            trigger_mode="multiple", **QUIET,
        )  # fmt: skip
        gr.on(
            [one.change for one in form.shapers], form.draw_grid, form.inputs, form.time_grid,
            trigger_mode="always_last", **QUIET,
        )  # fmt: skip
        self.following.wire(page, self.tab, self.submitted)
        suited = [*form.outputs, *self.welcome.examples]
        controls["model_type"].input(  # the last of several quick choices counts
            self.change_model, form.inputs, suited, trigger_mode="always_last", **QUIET
        )
        form.last_seed.click(self.last_seed, None, controls["seed"], **QUIET)
        self.welcome.fills(controls["prompt"])
        filled = self.filled = [*suited, self.notice]
        self.queue.wire(form, self.tab, self.notice, filled, self._fill)
        read = [*filled, self.drop]
        self.drop.upload(self.read_picture, [self.tab, self.drop, *form.inputs], read, js=WITH_TAB, **QUIET)
        form.prompts.count.read(self.read_prompt, form.inputs, filled, **QUIET)
        self.dropped.refused(self.refuse, None, self.notice, **QUIET)
        form.presets.wire_form(form.inputs, form.read, filled, self._fill, self.notice)
        Defaults(self._engine, form, filled, self.notice)
        for area in (self.viewer, self.recent):
            area.use(self.use_settings, form.inputs, filled, **QUIET)
            form.images.takes_from(area)
            self.upscale.opens_from(area)
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
        if self._letter.get(tab) != typed:
            return gr.skip()
        del self._letter[tab]
        if not settings["prompt"].strip():
            return gr.skip()
        try:
            return self._submit_live(settings, tab)
        except UserError as error:
            raise toast(str(error)) from None

    def _submit_live(self, settings: dict[str, Any], tab: str) -> Any:
        if settings["seed"] == -1:
            settings["seed"] = LIVE_SEED  # or every letter would give another picture
        first = self._engine.catalog.validate_all(settings)[0].settings
        try:
            return self._engine.submit(
                first, source=LIVE, newest_wins=True, uploads=uploads(), client=tab
            )[0]
        except NotAgreed:  # the first picture is one that Generate was pressed for
            return gr.skip()

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
    def use_settings(self, event: gr.EventData, *values: Any) -> Updates:
        """Fill the form from a picture that was made."""
        record, catalog = self._engine.store.image(int(event.id)), self._engine.catalog
        if not record.job_id:  # found in the folder: perhaps another program's
            found = import_settings.from_file(Path(record.path), "this picture", catalog, values[0])
            return self._fill(found, values)
        found = import_settings.from_metadata(record.metadata, "this picture", catalog, values[0])
        return self._fill(found, values)

    @shows_errors
    def read_picture(self, tab: str, path: str, *values: Any) -> Updates:
        """Fill the form from a dropped picture, workflow or text; queue what a saved queue holds."""
        try:
            if is_queue(Path(path)):
                return {self.notice: self.queue.loaded(tab, path), self.drop: None}
            found = import_settings.from_file(Path(path), Path(path).name, self._engine.catalog, values[0])
            return {**self._fill(found, values), self.drop: None}
        except UserError as error:  # the field is emptied, or it would take no other file
            return {self.notice: notice_html([str(error)], "error"), self.drop: None}

    @shows_errors
    def read_prompt(self, *values: Any) -> Updates:
        """Fill the form from the data of a picture that was pasted into the prompt."""
        text = self.form.read(values)["prompt"]
        found = import_settings.from_text(text, "the pasted text", self._engine.catalog, values[0])
        return self._fill(found, values)

    @shows_errors
    def refuse(self, event: gr.EventData) -> str:
        """Say where a file goes that cannot be dropped here."""
        return notice_html([refusal(event)], "error")

    def _fill(self, found: import_settings.Recalled, values: tuple[Any, ...] = ()) -> Updates:
        """Show settings in the form. values: of the form before; given, what they differ in is told."""
        model = self._engine.catalog.model(found.settings["model_type"])
        settings, lost = self.form.images.present(found.settings)
        settings, replaced = self.form.enlarging.present(model, settings)
        axes, unfit = self.form.grid.fill(model, found.axes)
        filled = {**self.form.fill(settings), **self.welcome.suit(model), **axes}
        before = dict(zip(self.form.controls, values, strict=True)) if values else {}
        changed = import_settings.differences(before, settings) if before else []
        return {**filled, self.notice: notice_html([*found.report, *lost, *replaced, *unfit, *changed])}
