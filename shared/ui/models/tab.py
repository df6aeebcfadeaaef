"""The tab "Models": what is on this computer, downloads, removal, and models of the user's own."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from typing import Any

import gradio as gr

from shared.engine import custom_models, inventory
from shared.engine.engine import Engine
from shared.jobs.records import RUNNING, Job
from shared.library.download_queue import ACTIVE
from shared.ui.components.errors import QUIET, shows_errors
from shared.ui.components.notice import notice_area, notice_html
from shared.ui.components.text import size_text
from shared.ui.create.form import Updates
from shared.ui.create.tab import Generate
from shared.ui.models.custom_model import OwnModels
from shared.ui.models.html import Shelf, forget_html, removal_html, shelf_html

POLL_SECONDS = 0.5
CARDS = (6, 8, 10, 12, 16, 24, 32)  # GB, that a plan can be shown for

# 'act' carries what was pressed and for which model; 'use' needs the form of Create, too. A question is
# closed by its own button, by Escape and by a press beside it. A page that comes back into view looks again.
# Lists of files that were opened stay open when the list is drawn anew.
_CLICKS = """element.addEventListener('click', (event) => {
  const button = event.target.closest('button[data-act]');
  if (!button && event.target.classList.contains('zgp-question')) props.value = '';
  if (!button) return;
  const {act, id, mark} = button.dataset;
  if (act === 'close') props.value = '';
  else if (act === 'edit') document.querySelector('#own-model').scrollIntoView({block: 'center'});
  if (act !== 'close') trigger(act === 'use' ? 'use' : 'act', {act, id, mark: mark || ''});
});
element.addEventListener('change', (event) => {
  const {act, id} = event.target.dataset;
  if (act === 'precision') trigger('act', {act, id, mark: event.target.value});
});
element.addEventListener('keydown', (event) => {
  if (event.key === 'Escape' && element.querySelector('.zgp-question')) props.value = '';
});
document.addEventListener('visibilitychange', () => {
  if (!document.hidden && element.querySelector('.zgp-models')) trigger('focus');
});
const opened = new Set();
const nameOf = (details) => details.closest('[data-model]')?.dataset.model;
element.addEventListener('click', (event) => {
  const details = event.target.closest('summary')?.parentElement;
  if (details) details.open ? opened.delete(nameOf(details)) : opened.add(nameOf(details));
});
new MutationObserver(() => {
  for (const details of element.querySelectorAll('details')) {
    if (!details.open && opened.has(nameOf(details))) details.open = true;
  }
  const question = element.querySelector('.zgp-question');
  if (question && !question.contains(document.activeElement)) {
    question.querySelector('[data-act="close"]').focus();
  }
}).observe(element, {childList: true, subtree: true, attributeFilter: ['open']});"""

DOWNLOADS = """<details class="zgp-models-help"><summary>About downloads</summary>
<p>Files come from Hugging Face and are checked before they are used. What has come stays: a download that
was paused, cut, or ended with the program goes on with Resume.</p>
<p>For files behind a login set <code>HF_TOKEN</code>, or log in once with <code>hf auth login</code>.
<code>HF_ENDPOINT</code> names a mirror, <code>HF_HUB_OFFLINE=1</code> forbids downloads. These are variables
of the environment in which ZGP is started.</p></details>"""


class Models:
    """Lays the tab out and connects it. tabs: to go to Create. create: its form takes the chosen model."""

    def __init__(self, engine: Engine, page: gr.Blocks, tabs: gr.Tabs, create: Generate):
        self._engine, self._create, self._tabs = engine, create, tabs
        self._numbers = itertools.count(1)
        with gr.Tab("Models", id="models") as self.tab:
            self.pulse = gr.State(0)  # a new number makes `follow` look again
            self.notice = notice_area("models-notice")
            self.question = _html("models-question")
            self.card = gr.Dropdown(
                [("this computer alone", 0), *((f"a card of {size} GB, too", size) for size in CARDS)],
                value=0, label="Plan for", filterable=False, elem_id="models-card",
            )  # fmt: skip
            self.own = OwnModels(engine)
            self.list = _html("models-list")
            gr.HTML(DOWNLOADS, apply_default_css=False)
        self._wire()

    def _wire(self) -> None:
        models = self._create.form.controls["model_type"]
        gr.on(
            [self.tab.select, self.pulse.change, self.list.focus, self.card.input], self.follow, self.card,
            [self.list, models, self._create.form.stock], trigger_mode="always_last", **QUIET,
        )  # fmt: skip
        acted = [self.pulse, self.question, self.notice, *self.own.outputs]
        for area in (self.list, self.question):
            area.act(self.act, None, acted, **QUIET)
        filled = [*self._create.form.outputs, *self._create.welcome.examples, self._tabs]
        self.list.use(self.use, self._create.form.inputs, list(dict.fromkeys(filled)), **QUIET)
        self.own.wire(self.saved, [self.pulse, self.notice])

    # -- what the user does -------------------------------------------------------------------------------

    @shows_errors
    def act(self, event: gr.EventData) -> Updates:
        """Do what a button of the list or of a question says."""
        engine, model_id = self._engine, str(event.id)
        match str(event.act):
            case "start":
                engine.downloads.start(model_id)
            case "pause":
                engine.downloads.pause(model_id)
            case "cancel":
                engine.downloads.cancel(model_id)
                engine.reload_catalog()  # so that every tab takes stock again
            case "remove":
                return {self.question: removal_html(inventory.removal(engine, model_id))}
            case "delete":
                freed = inventory.remove(engine, model_id, str(event.mark))
                return self._done(f"{size_text(freed)} were freed.")
            case "precision":
                engine.preferences.prefer(model_id, "precision", str(event.mark))
            case "edit":
                return self.own.edit(model_id)
            case "forget":
                return {self.question: forget_html(model_id, engine.catalog.model(model_id).name)}
            case "forgotten":
                custom_models.forget(engine, model_id)
                return self._done("The model is no longer in the list.")
        return {self.pulse: next(self._numbers), self.notice: ""}

    @shows_errors
    def use(self, event: gr.EventData, *values: Any) -> Updates:
        """Go to Create with this model."""
        form = self._create.form
        updates = self._create.change_model(str(event.id), *values[1:])
        choices = form.refresh()[form.controls["model_type"]]["choices"]
        chosen = gr.update(choices=choices, value=str(event.id))
        return {**updates, form.controls["model_type"]: chosen, self._tabs: gr.Tabs(selected="create")}

    def saved(self, sentence: str) -> Updates:
        """The list after a card was written."""
        return {self.pulse: next(self._numbers), self.notice: notice_html([sentence])}

    def _done(self, sentence: str) -> Updates:
        return {**self.saved(sentence), self.question: ""}

    # -- what the tab shows -------------------------------------------------------------------------------

    async def follow(self, vram: float) -> AsyncIterator[Updates]:
        """The list now, and again whenever something has changed for as long as anything is downloaded.

        vram: as for take_stock.
        """
        engine, shown, fetched = self._engine, "", ""
        stocks, known = await asyncio.to_thread(self._take_stock, vram), engine.catalog
        while True:
            downloads, running = engine.downloads.look(), self._running()
            before, fetched = fetched, _fetches(running)
            if before != fetched:  # a job has begun or ended a download
                await asyncio.to_thread(engine.reload_catalog)
            if known is not engine.catalog:  # here, or in another tab, or when a download ended
                known, stocks = engine.catalog, await asyncio.to_thread(inventory.take_stock, engine, vram)
            free, folder = engine.downloads.free_bytes(), str(engine.config.ckpts)
            html = shelf_html(Shelf(stocks, downloads, free, folder, running, known.errors, vram))
            if html != shown:
                shown = html
                form = self._create.form
                yield {self.list: html, **form.refresh(), form.stock: form.stock_of(known)}
            if not fetched and not any(one.status in ACTIVE for one in downloads.values()):
                return
            await asyncio.sleep(POLL_SECONDS)

    def _take_stock(self, vram: float) -> list[inventory.Stock]:
        self._engine.reload_catalog()
        return inventory.take_stock(self._engine, vram)

    def _running(self) -> Job | None:
        queue = self._engine.store.queue(limit=1)
        return queue[0] if queue and queue[0].status == RUNNING else None


def _fetches(running: Job | None) -> str:
    """The file that the running job downloads; "" for none."""
    return running.phase if running is not None and running.phase.startswith("Downloading ") else ""


def _html(elem_id: str) -> Any:
    return gr.HTML("", js_on_load=_CLICKS, elem_id=elem_id, apply_default_css=False)
