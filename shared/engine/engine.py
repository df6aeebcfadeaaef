"""The one way in for the page, the command line and REST: submit a job, follow its events, cancel it."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import compress
from pathlib import Path
from typing import Any

from shared import config as config_file
from shared.engine import second_start
from shared.engine.configuration import EngineConfig, read_catalog, worker_config, worker_environment
from shared.engine.preferences import Preferences
from shared.engine.questions import Questions
from shared.errors import QueueFull, UserError
from shared.gpu.machine import survey
from shared.gpu.planner import Machine
from shared.jobs.agreements import Agreed
from shared.jobs.grid import Grid
from shared.jobs.grid import plan as plan_grid
from shared.jobs.inputs import PICTURES, keep_pictures
from shared.jobs.records import ENDED, Event
from shared.jobs.repeat import Forever
from shared.jobs.store import JobStore
from shared.jobs.supervisor import Supervisor
from shared.library.catalog import Catalog
from shared.library.download_queue import Downloads
from shared.library.job_loras import check_addresses
from shared.library.model_info import HandlerFor, ModelInfo
from shared.library.outlook import Outlook, outlook
from shared.loras.library import Library
from shared.settings.table import random_seed
from shared.settings.validation import Validated

log = logging.getLogger(__name__)

MAX_WAITING = 2000  # jobs; more come over the network by mistake or by malice


class Engine:
    """`handler_for` replaces the registry of families in tests."""

    def __init__(self, config: EngineConfig, handler_for: HandlerFor | None = None):
        self.store = JobStore(config.database)
        self.config = self._with_last_model(config)
        self.notices = list(config.notices)  # what the page tells a new tab
        self._mendable: list[str] = []
        self.forever = Forever(self.store, self.submit_all)
        self._handler_for = handler_for
        self.catalog: Catalog
        self.reload_catalog()
        self.preferences = Preferences(self.config, lambda: self.catalog, self.reload_catalog, self._use)
        self.agreed = Agreed(self.store.database)
        self.questions = Questions(self.store, self.agreed, lambda: self.catalog, self.outlook)
        self.downloads = Downloads(
            lambda: self.catalog, config.folders, self.outlook, self.reload_catalog, self.agreed
        )
        self._supervisor = Supervisor(
            self.store,
            self._worker_command(),
            first_arguments=self._warm_arguments(),
            environment=worker_environment(config.gpu, os.environ),
            log_file=config.log_file,
            restart_seconds=config.restart_seconds,
            before_spawn=lambda: second_start.note(self.config),
        )

    # -- jobs ------------------------------------------------------------------------------------------------

    def submit(
        self,
        values: Mapping[str, Any],
        source: str = "ui",
        output_dir: Path | None = None,
        newest_wins: bool = False,
        uploads: Path | None = None,
        client: str = "",
        download: bool = False,
    ) -> tuple[int, Validated]:
        """Validate and queue one job as it stands: (its id, what was understood). SettingsError lists what is
        wrong.

        newest_wins, client: see JobStore.submit. uploads: given for settings that come over the network;
        pictures are then read from there and from the outputs alone, LoRAs are fetched from the internet
        alone, and QueueFull is raised while MAX_WAITING jobs wait. download: a yes to a large download, which
        jobs of the page wait for otherwise; NotAgreed for others.
        """
        if not newest_wins and uploads is not None:
            self._check_room(1)
        ready = self._ready([self.catalog.validate(values)], uploads)
        return self._queue(ready, source, output_dir, newest_wins, client, download)[0]

    def submit_all(
        self,
        values: Mapping[str, Any],
        source: str = "ui",
        output_dir: Path | None = None,
        uploads: Path | None = None,
        client: str = "",
        download: bool = False,
    ) -> list[tuple[int, Validated]]:
        """Queue every job that `values` stand for, in order: what a user wrote is submitted by this.

        All of them or none. values: settings, whose prompt may stand for several jobs (see
        prompts.jobs.expand), or those of a grid with its axes under "grid". SettingsError as for `submit`.
        """
        if axes := _axes(values):
            planned = self.plan_grid(_without_axes(values), axes)
            _, job_ids = self.submit_grid(planned, source, output_dir, uploads, client, download)
            return list(zip(job_ids, (cell.validated for cell in planned.cells), strict=True))
        jobs = self.catalog.validate_all(values)
        if uploads is not None:
            self._check_room(len(jobs))
        ready = self._ready(jobs, uploads)
        return self._queue(ready, source, output_dir, client=client, download=download)

    def submit_grid(
        self,
        planned: Grid,
        source: str = "ui",
        output_dir: Path | None = None,
        uploads: Path | None = None,
        client: str = "",
        download: bool = False,
    ) -> tuple[int, list[int]]:
        """Queue the cells that `plan_grid` made: (the grid's id, the jobs' in the order of the cells).

        SettingsError when a picture cannot be used; then none is queued.
        """
        if uploads is not None:
            self._check_room(len(planned.cells))
        kept = self._ready([cell.validated for cell in planned.cells], uploads)
        cells = [
            (cell.number, one.settings, one.notes) for cell, one in zip(planned.cells, kept, strict=True)
        ]
        base = next(settings for number, settings, _ in cells if number == 0)
        waits = self.questions.permit([one.settings for one in kept], source, download)
        with self.store.together():
            grid_id, job_ids = self.store.submit_grid(
                planned.record(), base, cells, source=source, output_dir=self._folder(output_dir),
                client=client,
            )  # fmt: skip
            self.store.ask(compress(job_ids, waits))
        return grid_id, job_ids

    def plan_grid(self, values: Mapping[str, Any], axes: Mapping[str, Sequence[Any]]) -> Grid:
        """The pictures for each combination of `axes` (see grid.plan). SettingsError with all problems."""
        return plan_grid(values, axes, self.catalog)

    def check(self, values: Mapping[str, Any]) -> None:
        """SettingsError when `submit_all` would not take these values, but for the pictures they name."""
        if axes := _axes(values):
            self.plan_grid(_without_axes(values), axes)
        else:
            self.catalog.validate_all(values)

    def edit(self, job_id: int, values: Mapping[str, Any], uploads: Path | None = None) -> Validated:
        """Replace the settings of a waiting job. SettingsError lists what is wrong with them, UserError says
        that the job has begun; either way it stays as it is.
        """
        validated = self._ready([self.catalog.validate_one(values)], uploads)[0]
        waits = self.questions.permit([validated.settings], self.store.job(job_id).source, False)
        with self.store.together():
            self.store.edit(job_id, validated.settings, validated.notes)
            self.store.ask(compress([job_id], waits))
        return validated

    def one_more(self, job_id: int, client: str = "") -> int:
        """Queue a job with the same settings and another seed; its id. QueueFull as for `submit`."""
        self._check_room(1)
        job = self.store.job(job_id)
        folder = Path(job.output_dir) if job.output_dir else None
        return self.submit({**job.settings, "seed": -1}, job.source, folder, client=client)[0]

    def cancel(self, job_id: int) -> None:
        """Ask for a job to stop; its last event then is "cancelled" unless it was done before."""
        self.store.request_cancel(job_id)

    def follow(self, job_id: int, poll: float = 0.05) -> Iterator[Event]:
        """Every event of a job from its first one on, as it comes; ends after done, failed or cancelled."""
        self.store.job(job_id)
        seen = 0
        while True:
            for event in self.store.events(seen, job_id):
                seen = event.seq
                yield event
                if event.kind in ENDED:
                    return
            time.sleep(poll)

    def _check_room(self, jobs: int) -> None:
        if self.store.counts().queued + jobs > MAX_WAITING:
            raise QueueFull(f"{MAX_WAITING} jobs wait already: submit this one when some of them are done.")

    def _ready(self, jobs: Sequence[Validated], uploads: Path | None) -> list[Validated]:
        """As jobs hold their settings: with copies of the pictures, each made once, and a seed."""
        within = None if uploads is None else (uploads, *self.config.picture_folders)
        copies: dict[tuple[Any, ...], tuple[dict[str, Any], list[str]]] = {}
        found = []
        for job in jobs:
            if uploads is not None:
                check_addresses(job.settings)
            named = {name: job.settings[name] for name in PICTURES if name in job.settings}
            key = tuple(named.items())
            if key not in copies:
                copies[key] = keep_pictures(named, self.config.inputs, within)
            kept, notes = copies[key]
            # Drawn here and not by the worker: a job that is tried twice makes the same picture.
            seed = random_seed() if job.settings["seed"] == -1 else job.settings["seed"]
            settings = {**job.settings, **kept, "seed": seed}
            found.append(replace(job, settings=settings, notes=[*job.notes, *notes]))
        return found

    def _queue(
        self,
        jobs: Sequence[Validated],
        source: str,
        output_dir: Path | None,
        newest_wins: bool = False,
        client: str = "",
        download: bool = False,
    ) -> list[tuple[int, Validated]]:
        waits = self.questions.permit([job.settings for job in jobs], source, download)
        append = partial(
            self.store.submit, source=source, output_dir=self._folder(output_dir), newest_wins=newest_wins,
            client=client,
        )  # fmt: skip
        with self.store.together():
            queued = [(append(job.settings, notes=job.notes), job) for job in jobs]
            self.store.ask(compress((job_id for job_id, _ in queued), waits))
        return queued

    def _folder(self, output_dir: Path | None) -> str | None:
        """Where the images of a job go; None: into the folder of the day."""
        if output_dir is None and not self.config.dated_folders:
            output_dir = self.config.output_dir
        return None if output_dir is None else str(output_dir.absolute())

    # -- the worker ------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Spawn the worker at once, or become a client of the process that already has one."""
        self._log_notices()
        self._supervisor.start()
        if self.supervises:
            self.forever.tell_of_the_last_stop()
            self.questions.open()  # files may have been put there meanwhile
        else:
            log.info("Another ZGP process works on %s; this one uses its worker.", self.config.database)

    def stop(self) -> None:
        """End the worker; a running job goes back to the queue, where the next start finds it."""
        self.downloads.stop()
        self.forever.stop()
        self._supervisor.stop()

    def restart_worker(self) -> None:
        """Give the worker a new process after the job in its hands. UserError when another ZGP has it."""
        self.preferences.check_unlocked()
        if not self.supervises:
            raise UserError("Another ZGP on this computer runs the worker: restart it there.")
        self._supervisor.restart(self._worker_command())

    @property
    def supervises(self) -> bool:
        """True when this process runs the worker, False when another process on the same queue does."""
        return self._supervisor.supervises

    @property
    def worker_pid(self) -> int | None:
        return self._supervisor.worker_pid

    def _log_notices(self) -> None:
        if self.config.notices:
            with self.config.log_file.open("a", encoding="utf-8") as log_file:
                log_file.writelines(f"{notice}\n" for notice in self.config.notices)

    def _worker_command(self) -> list[str]:
        return [*self.config.worker_command, worker_config(self.config).to_json()]

    def _warm_arguments(self) -> list[str]:
        model = self.catalog.models.get(self.catalog.default_model)
        return ["--warm", model.id] if self.config.warm and model is not None and model.available else []

    # -- models ----------------------------------------------------------------------------------------------

    def reload_catalog(self) -> Catalog:
        """Read the cards and look at the disk again: after a download or an edited card."""
        self.catalog = read_catalog(self.config, self._handler_for)
        # What is wrong with saved defaults is told until it is mended; a file set aside was told only once.
        kept = [notice for notice in self.notices if notice not in self._mendable]
        asides = [notice for notice in self.catalog.notices if " it is now " in notice]
        self._mendable = [notice for notice in self.catalog.notices if notice not in asides]
        self.notices = [*kept, *asides, *self._mendable]
        return self.catalog

    def draft(self, cards: Mapping[str, dict[str, Any]]) -> Catalog:
        """The catalog as it would be with these cards of the user: id -> content."""
        return read_catalog(self.config, self._handler_for, cards)

    def outlook(
        self,
        model: ModelInfo,
        settings: Mapping[str, Any] | None = None,
        machine: Machine | None = None,
    ) -> Outlook:
        """How a job with these settings, by default the model's own, is made here, and its files. UserError
        when it cannot be. machine: by default what the system says of this one.
        """
        config = self.config
        return outlook(
            model,
            config.folders,
            model.defaults if settings is None else settings,
            lambda: machine or survey(config.gpu),
            config.overrides,
            agreed=self.agreed.given(),
        )

    def loras(self, model_id: str) -> Library:
        """The LoRA files for a model, and what each of them is. SettingsError for models without LoRAs."""
        return self.catalog.model(model_id).loras()

    def _use(self, config: EngineConfig) -> None:
        self.config = config
        self.reload_catalog()

    def _with_last_model(self, config: EngineConfig) -> EngineConfig:
        if config.default_model != config_file.LAST_USED:
            return config
        newest = self.store.jobs(limit=1)
        return replace(config, default_model=newest[0].settings["model_type"] if newest else "")


def _axes(values: Any) -> Any:
    return values.get("grid") if isinstance(values, Mapping) else None


def _without_axes(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name != "grid"}
