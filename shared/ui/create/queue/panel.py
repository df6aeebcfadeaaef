"""The queue on the page: what waits in which order, what failed, and what can be done about it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from shared.engine.engine import Engine
from shared.errors import UserError
from shared.gallery.archive import DOWNLOAD
from shared.jobs.queue_file import MAX_JOBS, MAX_MANIFEST, write_queue
from shared.jobs.records import LIVE, RUNNING, Job
from shared.jobs.task_file import Task, read_tasks
from shared.library.translation import as_task
from shared.ui import static_files
from shared.ui.api import uploads
from shared.ui.components.errors import QUIET, shows_errors
from shared.ui.components.notice import notice_html
from shared.ui.components.queue_state import SHOWN, Sight
from shared.ui.components.tab_name import WITH_TAB
from shared.ui.components.text import DOT, plural
from shared.ui.create import import_settings
from shared.ui.create.form import Form, Updates

PROMPT_LENGTH = 200
MAX_REPORT = 12  # lines
MAX_BLANKS = 1000  # bytes before the first sign of a list

#: act, the name of a button -> what it does with (engine, job, the job it is dropped before, tab)
_DEEDS: dict[str, Callable[[Engine, int, int, str], object]] = {
    "up": lambda engine, job, other, tab: engine.store.move(job, by=-1),
    "down": lambda engine, job, other, tab: engine.store.move(job, by=1),
    "before": lambda engine, job, other, tab: engine.store.move(job, before=other),
    "last": lambda engine, job, other, tab: engine.store.move(job, place=SHOWN - 1),
    "remove": lambda engine, job, other, tab: engine.cancel(job),
    "more": lambda engine, job, other, tab: engine.one_more(job, tab),
    "release": lambda engine, job, other, tab: engine.store.release(job),
    "retry": lambda engine, job, other, tab: engine.store.retry(job),
    "dismiss": lambda engine, job, other, tab: engine.store.dismiss(job),
    "pause": lambda engine, job, other, tab: engine.store.pause(),
    "resume": lambda engine, job, other, tab: engine.store.resume(),
    "clear": lambda engine, job, other, tab: engine.store.clear_waiting(),
    "cancel_all": lambda engine, job, other, tab: engine.store.cancel_all(),
}


class Queue:
    """Lays out its parts where `Generate` calls for them. `html` is shown by whoever follows the queue."""

    def __init__(self, engine: Engine):
        self._engine = engine
        self.editing = gr.State(None)  # the job whose settings this tab's form has
        self.before = gr.State(None)  # what the form had before

    def lay_out_bar(self) -> None:
        """What is seen below the form while it has the settings of a waiting job."""
        with gr.Row(visible=False, elem_id="edit-bar") as self.bar:
            self.about = gr.HTML("", apply_default_css=False)
            self.save_edit = gr.Button("Save changes", variant="primary", size="sm", elem_id="edit-save")
            self.leave_edit = gr.Button("Leave it", size="sm", elem_id="edit-leave")

    def lay_out_files(self) -> None:
        """Loading a queue, which an empty one is there for too; and where a saved one passes through."""
        self.load = gr.UploadButton(
            "Load a saved queue", file_types=[".zip", ".json"], size="sm", elem_id="queue-load"
        )
        self.saved = gr.File(visible=False)

    def lay_out_panel(self) -> None:
        """The list itself."""
        script = static_files.read("queue.js")
        self.panel = gr.HTML("", js_on_load=script, elem_id="queue", apply_default_css=False)

    def wire(
        self,
        form: Form,
        tab: Any,
        notice: Any,
        filled: Sequence[Any],
        fill: Callable[[import_settings.Recalled], Updates],
    ) -> None:
        """Connect the parts. `fill` shows settings in the form; `filled` is what it updates."""
        self._form, self._notice, self._fill = form, notice, fill
        edited = [*filled, self.bar, self.about, form.generate, self.editing, self.before]
        state = [self.editing, self.before]
        self.panel.act(self.act, tab, None, js=WITH_TAB, **QUIET)
        self.panel.edit(self.edit, [*state, *form.inputs], edited, **QUIET)
        self.panel.save(self.save, None, self.saved, **QUIET).then(None, self.saved, None, js=DOWNLOAD)
        self.save_edit.click(self.save_changes, [*state, *form.inputs], edited, **QUIET)
        self.leave_edit.click(self.leave, state, edited, **QUIET)
        self.load.upload(self.load_file, [tab, self.load], notice, js=WITH_TAB, **QUIET)

    # -- what the user does -------------------------------------------------------------------------------

    @shows_errors
    def act(self, tab: str, event: gr.EventData) -> None:
        """One of the deeds, by the buttons' names."""
        _DEEDS[str(event.act)](self._engine, int(event.id), int(event.other), tab)

    @shows_errors
    def edit(self, editing: int | None, before: Any, event: gr.EventData, *values: Any) -> Updates:
        """Bring a waiting job's settings into the form. It waits meanwhile, even when this tab is closed."""
        store = self._engine.store
        kept = before if editing else self._form.read(values)
        job = store.hold(int(event.id))
        try:
            updates = self._shown(job.settings, f"The form now has the settings of job {job.id}.")
        except UserError:
            store.release(job.id)
            raise
        if editing and editing != job.id:
            store.release(editing)
        about = f"<b>Editing job {job.id}.</b> It does not start meanwhile."
        return {
            **updates, self.bar: gr.update(visible=True), self.about: about,
            self._form.generate: gr.update(visible=False), self.editing: job.id, self.before: kept,
        }  # fmt: skip

    @shows_errors
    def save_changes(self, editing: int, before: dict[str, Any], *values: Any) -> Updates:
        """Give the job what the form says, and the form what it had before."""
        self._engine.edit(editing, self._form.read(values), uploads())
        return self._ended(before, f"Job {editing} is changed.")

    @shows_errors
    def leave(self, editing: int, before: dict[str, Any]) -> Updates:
        """Leave the job as it was, and give the form what it had before."""
        self._engine.store.release(editing)
        return self._ended(before, f"Job {editing} stays as it was.")

    def _ended(self, before: dict[str, Any], said: str) -> Updates:
        return {
            **self._shown(before, said), self.bar: gr.update(visible=False), self.about: "",
            self._form.generate: gr.update(visible=True), self.editing: None, self.before: None,
        }  # fmt: skip

    def _shown(self, settings: dict[str, Any], said: str) -> Updates:
        return self._fill(import_settings.complete(settings, [said], self._engine.catalog))

    @shows_errors
    def save(self) -> str:
        """The running and waiting jobs as a file that this page and Wan2GP load."""
        jobs = self._engine.store.queue()
        if not jobs:
            raise UserError("The queue is empty: there is nothing to save.")
        return str(write_queue(jobs, Path(tempfile.mkdtemp(prefix="zgp-")) / "queue.zip"))

    @shows_errors
    def load_file(self, tab: str, path: str) -> str:
        """As `loaded`, for the button."""
        return self.loaded(tab, path)

    def loaded(self, tab: str, path: str) -> str:
        """Queue the jobs of a file; those that cannot run are named, the others go on. UserError when it is
        no such file.
        """
        with tempfile.TemporaryDirectory(prefix="zgp-") as folder:
            tasks = _tasks(Path(path), Path(folder))
            within = Path(folder) if path.lower().endswith(".zip") else uploads()
            loaded, lines, ignored = 0, list[str](), dict[str, str]()
            for task in tasks:
                catalog = self._engine.catalog
                values, said = as_task(task.values, catalog, catalog.default_model)
                lines += said
                try:
                    jobs = self._engine.submit_all(values, uploads=within, client=tab)
                except UserError as error:
                    lines.append(f"Item {task.number} is left out: {error}")
                else:
                    loaded += 1
                    ignored |= jobs[0][1].ignored
        lines = [f"{loaded} of {plural(len(tasks), 'job')} loaded from {Path(path).name}.", *lines]
        return notice_html(shortened(lines, ignored), "info" if loaded == len(tasks) else "error")

    # -- what is seen -------------------------------------------------------------------------------------

    def html(self, sight: Sight) -> str:
        """The list; "" while there is nothing to do about the queue."""
        jobs = [job for job in sight.queue if job.source != LIVE]
        waits = [job for job in jobs if job.status != RUNNING]
        if not (waits or sight.paused or sight.failures):
            return ""
        waiting = len(waits) + sight.more
        names = {model.id: model.name for model in self._engine.catalog.models.values()}
        rows = "".join(_row(job, names) for job in jobs)
        failed = "".join(_failure(job, names) for job in sight.failures)
        return (
            '<section class="zgp-jobs" aria-label="Queue">'
            + _head(waiting, sight)
            + (f'<ol class="zgp-job-list">{rows}</ol>' if rows else "")
            + (f'<p class="zgp-line">and {sight.more} more</p>' if sight.more else "")
            + (f'<h3 class="zgp-heading">Failed</h3><ul class="zgp-job-list">{failed}</ul>' if failed else "")
            + "</section>"
        )


def _tasks(path: Path, folder: Path) -> list[Task]:
    """The jobs of an uploaded file. UserError when it cannot be read, or has more than a saved queue."""
    if path.suffix.lower() != ".zip" and path.stat().st_size > MAX_MANIFEST:
        raise UserError(f"{path.name} is larger than {MAX_MANIFEST >> 20} MB: split it.")
    tasks = read_tasks(path, folder)
    if len(tasks) > MAX_JOBS:
        raise UserError(f"{path.name} holds {len(tasks)} jobs; at most {MAX_JOBS} are loaded: split it.")
    return tasks


def is_queue(path: Path) -> bool:
    """Whether a .json file is a list, as saved queues are."""
    if path.suffix.lower() != ".json" or path.stat().st_size > MAX_MANIFEST:
        return False
    with path.open("rb") as file:
        return file.read(MAX_BLANKS).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")


def shortened(lines: Sequence[str], ignored: dict[str, str]) -> list[str]:
    """A report of a length that can be read: the first lines, and what was ignored in one of them."""
    said = list(lines[:MAX_REPORT])
    if len(lines) > MAX_REPORT:
        said.append(f"And {len(lines) - MAX_REPORT} more.")
    return [*said, f"Ignored, as they do nothing here: {', '.join(sorted(ignored))}."] if ignored else said


def _head(waiting: int, sight: Sight) -> str:
    said = [f"{waiting} waiting"] + (["paused"] if sight.paused else [])
    pause = ("resume", "Resume") if sight.paused else ("pause", "Pause")
    buttons = [_button(*pause, 0)]
    if waiting and sight.total > waiting:
        question = f"Cancel {plural(waiting, 'waiting job')}? The running one goes on."
        buttons.append(_button("clear", "Clear waiting", 0, ask=question))
    if waiting:
        question = f"Cancel {plural(sight.total, 'job')}? Pictures that are done stay."
        buttons += [_button("cancel_all", "Cancel all", 0, ask=question), _button("save", "Save queue", 0)]
    buttons.append(_button("load", "Load queue", 0))
    return (
        f'<div class="zgp-jobs-head"><h2 class="zgp-heading">Queue <span>{DOT.join(said)}</span></h2>'
        f'<span class="zgp-job-tools">{"".join(buttons)}</span></div>'
    )


#: act -> (what the small button shows, what it is called), in the order of a row
_WAITING = {
    "up": ("↑", "Earlier"),
    "down": ("↓", "Later"),
    "edit": ("✎", "Edit"),
    "more": ("+1", "One more, with a new seed"),
    "remove": ("×", "Remove"),
}
_RUNNING = {"more": _WAITING["more"], "remove": ("×", "Cancel")}
_FAILED = {"retry": ("Retry", "Retry"), "dismiss": ("×", "Take it off this list")}


def _row(job: Job, names: dict[str, str]) -> str:
    running = job.status == RUNNING
    tools = _tools(_RUNNING if running else _WAITING, job.id)
    if job.held and not job.asks:
        tools = _button("release", "Start it", job.id) + tools
    grip = '<span class="zgp-grip" title="Drag to reorder" aria-hidden="true">⠿</span>'
    held = "waits for a yes to its download" if job.asks else "being edited, does not start"
    state = "running" if running else held if job.held else ""
    return (
        f'<li class="zgp-job" data-id="{job.id}" data-waits="{int(not running)}">{"" if running else grip}'
        f'{_about(job, names, state)}<span class="zgp-job-tools">{tools}</span></li>'
    )


def _failure(job: Job, names: dict[str, str]) -> str:
    return (
        f'<li class="zgp-job" data-id="{job.id}">{_about(job, names, job.error or "")}'
        f'<span class="zgp-job-tools">{_tools(_FAILED, job.id)}</span></li>'
    )


def _about(job: Job, names: dict[str, str], state: str) -> str:
    settings = job.settings
    prompt = str(settings.get("prompt", ""))[:PROMPT_LENGTH]
    model = str(settings.get("model_type", ""))
    parts = [
        f"job {job.id}",
        names.get(model, model),
        str(settings.get("resolution", "")).replace("x", " × "),
    ]
    if settings.get("batch_size", 1) > 1:
        parts.append(plural(settings["batch_size"], "image"))
    said = f"<b>{escape(state)}</b>" if state else ""
    return (
        f'<span class="zgp-job-about"><span class="zgp-job-prompt">{escape(prompt)}</span>'
        f'<span class="zgp-line">{escape(DOT.join(parts))}</span>{said}</span>'
    )


def _tools(tools: dict[str, tuple[str, str]], job_id: int) -> str:
    return "".join(_button(act, shown, job_id, name) for act, (shown, name) in tools.items())


def _button(act: str, shown: str, job_id: int, name: str = "", ask: str = "") -> str:
    named = f' title="{name}" aria-label="{name}: job {job_id}"' if name else ""
    asks = f' data-confirm="{escape(ask)}"' if ask else ""
    return (
        f'<button type="button" class="zgp-button" data-act="{act}" data-job="{job_id}"{named}{asks}>'
        f"{shown}</button>"
    )
