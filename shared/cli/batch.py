"""Run a list of tasks without a page: validate all, run the valid ones, report each."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from shared.engine.engine import Engine
from shared.errors import UserError
from shared.jobs.grid import Grid, plan
from shared.jobs.inputs import check_pictures
from shared.jobs.records import CANCELLED, DONE, ENDED, Event
from shared.jobs.task_file import Task
from shared.library.catalog import Catalog
from shared.library.consent import amount
from shared.library.outlook import Outlook
from shared.library.translation import as_task
from shared.settings.table import SettingsError
from shared.settings.validation import Validated

CANCEL_SECONDS = 2.0


@dataclass(frozen=True)
class Valid:
    """A task that can run. grid: its cells, where it is a grid; cell: the name of the one that is meant."""

    number: int
    values: dict[str, Any]
    validated: Validated
    grid: Grid | None = None
    cell: str = ""

    @property
    def name(self) -> str:
        """How reports call it."""
        return f"item {self.number}" + (f", {self.cell}" if self.cell else "")

    @property
    def jobs(self) -> list[Valid]:
        """The task, or the cells of a grid in the order in which they are made."""
        if self.grid is None:
            return [self]
        return [replace(self, validated=cell.validated, cell=cell.name) for cell in self.grid.cells]


#: what reports call the job that draws a grid
SHEET = "the grid"


class Reporter:
    """Results go to standard output, as lines or as one JSON object each; all else to standard error."""

    def __init__(self, file: Path, as_json: bool):
        self._file, self._as_json = file, as_json
        self._shows_progress = sys.stderr.isatty() and not as_json
        self._width = 0

    def problem(self, number: int, sentence: str) -> None:
        """One thing that is wrong with a task."""
        print(f"{self._file}, item {number}: {sentence}", file=sys.stderr)

    def invalid(self, number: int, problems: Sequence[str]) -> None:
        for sentence in problems:
            self.problem(number, sentence)
        if self._as_json:
            self._object({"item": number, "status": "invalid", "error": "; ".join(problems)})

    def ignored(self, number: int, ignored: Mapping[str, str]) -> None:
        for key, reason in ignored.items():
            self.problem(number, f"'{key}' is ignored: {reason}")

    def planned(self, task: Valid, found: Outlook) -> None:
        """What would run and how, and what would be fetched first."""
        settings = task.validated.settings
        plan = "" if found.plan is None else found.plan.report()
        if self._as_json:
            fetched = {"download_bytes": found.left, "download": [one.source for one in found.missing]}
            self._object(_item(task) | {"status": "valid", "settings": settings, "plan": plan} | fetched)
            return
        seed = "random" if settings["seed"] == -1 else settings["seed"]
        print(
            f"{task.name}: {settings['model_type']}, {settings['resolution']}, "
            f"{settings['num_inference_steps']} steps, {settings['batch_size']} image(s), seed {seed}: "
            f"{settings['prompt']}"
        )
        if plan:
            print(f"{task.name}: {plan}")
        if found.left:
            names = ", ".join(one.name for one in found.missing if one.left)
            print(f"{task.name}: downloads {amount(found.left, found.kind)} first: {names}")

    def result(self, task: Valid, engine: Engine, job_id: int) -> None:
        """How a job ended."""
        self.progress("")
        job, images = engine.store.job(job_id), engine.store.images(job_id)
        seconds = max(0.0, round((job.finished or job.created) - (job.started or job.created), 3))
        if self._as_json:
            outcome = _item(task) | {"job": job.id, "status": job.status, "error": job.error}
            outcome |= {"seconds": seconds, "notes": job.notes, "ignored": task.validated.ignored}
            names = ("path", "index", "seed", "width", "height")
            self._object(outcome | {"images": [{k: getattr(i, k) for k in names} for i in images]})
            return
        for note in job.notes:
            print(f"{task.name}: {note}", file=sys.stderr)
        paths = ", ".join(image.path for image in images)
        ending = {DONE: f"done in {seconds:.1f} s: {paths}", CANCELLED: "cancelled"}
        print(f"{task.name}: {ending.get(job.status, f'{job.status}: {job.error}')}", flush=True)

    def event(self, task: Valid, event: Event) -> None:
        """Show a running job's phase and step in one line that is written over."""
        if self._shows_progress and event.kind in ("phase", "step"):
            data = event.data
            steps = f" {data['step']}/{data['steps']}" if data["steps"] else ""
            left = "" if data["seconds_left"] is None else f", {data['seconds_left']:.0f} s left"
            self.progress(f"{task.name}: {data['phase']}{steps}{left}")

    def progress(self, text: str) -> None:
        """Replace the progress line; "" removes it."""
        if self._shows_progress and (text or self._width):
            line = "\r" + text.ljust(self._width) + ("" if text else "\r")
            print(line, end="", file=sys.stderr, flush=True)
            self._width = len(text)

    def _object(self, content: dict[str, Any]) -> None:
        print(json.dumps(content), flush=True)


def _item(task: Valid) -> dict[str, Any]:
    return {"item": task.number} | ({"cell": task.cell} if task.cell else {})


def validate_tasks(
    tasks: Sequence[Task], catalog: Catalog, model_id: str, reporter: Reporter, inputs: Path
) -> list[Valid]:
    """The jobs of the tasks that can run; reports the problems of the others. `model_id`: for those that name
    none. `inputs`: the folder of the copies of pictures, which may be named as they are there.
    """
    valid = []
    for task in tasks:
        values, lines = as_task(task.values, catalog, model_id)
        for line in lines:
            reporter.problem(task.number, line)
        try:
            jobs = _validated(task.number, values, catalog)
        except SettingsError as error:
            reporter.invalid(task.number, error.problems)
            continue
        if problems := check_pictures(jobs[0].validated.settings, inputs):
            reporter.invalid(task.number, problems)
            continue
        reporter.ignored(task.number, jobs[0].validated.ignored)
        valid += jobs
    return valid


def _validated(number: int, values: Any, catalog: Catalog) -> list[Valid]:
    if not isinstance(values, dict) or values.get("grid") is None:
        return [Valid(number, job.settings, job) for job in catalog.validate_all(values)]
    plain = {name: value for name, value in values.items() if name != "grid"}
    grid = plan(plain, values["grid"], catalog)
    return [Valid(number, values, grid.base, grid)]


def run_tasks(tasks: Sequence[Valid], engine: Engine, reporter: Reporter, output_dir: Path | None) -> bool:
    """Run all tasks with `engine`, which is started and stopped here; True when every one was done.

    KeyboardInterrupt cancels what is not done yet, reports it, and is raised again. UserError when the queue
    is paused; nothing is queued then.
    """
    if engine.store.paused():
        raise UserError(
            f"The queue {engine.store.path} is paused, so nothing would run: press Resume on its page, then "
            "start this again."
        )
    jobs: list[tuple[Valid, int]] = []
    reported, left_out = 0, False
    try:
        # Queued before the worker starts, which then begins with them instead of warming up its default.
        for task in tasks:
            try:
                jobs += _submit(task, engine, output_dir)
            except UserError as error:  # such as a picture that cannot be used
                left_out = True
                problems = error.problems if isinstance(error, SettingsError) else [str(error)]
                reporter.invalid(task.number, problems)
        engine.start()
        for task, job_id in jobs:  # grows: the job that draws a grid comes with the end of its last cell
            for event in engine.follow(job_id):
                reporter.event(task, event)
            reporter.result(task, engine, job_id)
            reported += 1
            jobs += _sheet(task, job_id, jobs, engine)
    except KeyboardInterrupt:
        _cancel(engine, [job_id for _, job_id in jobs])
        engine.stop()
        for task, job_id in jobs[reported:]:
            reporter.result(task, engine, job_id)
        raise
    finally:
        engine.stop()
    return not left_out and all(engine.store.job(job_id).status == DONE for _, job_id in jobs)


def _submit(task: Valid, engine: Engine, output_dir: Path | None) -> list[tuple[Valid, int]]:
    """The task's jobs, in the queue."""
    if task.grid is None:
        return [(task, engine.submit(task.values, "cli", output_dir)[0])]
    _, job_ids = engine.submit_grid(task.grid, "cli", output_dir)
    return list(zip(task.jobs, job_ids, strict=True))


def _sheet(
    task: Valid, job_id: int, jobs: Sequence[tuple[Valid, int]], engine: Engine
) -> list[tuple[Valid, int]]:
    """The job that draws the grid of a job which was its last one."""
    grid, known = engine.store.job(job_id).grid, {one for _, one in jobs}
    if grid is None:
        return []
    drawn = [job.id for job in engine.store.grid_jobs(grid) if job.cell is None and job.id not in known]
    return [(replace(task, cell=SHEET), one) for one in drawn]


def _cancel(engine: Engine, job_ids: Sequence[int]) -> None:
    """Cancel the jobs, giving the running one a moment to end by itself."""
    for job_id in job_ids:
        engine.cancel(job_id)
    deadline = time.monotonic() + CANCEL_SECONDS
    while any(engine.store.job(job_id).status not in ENDED for job_id in job_ids):
        if time.monotonic() > deadline:
            return
        time.sleep(0.02)
