"""The process that owns the graphics card: takes one job after the other and makes its images.

Run as `python -m shared.worker.worker`. It lives as long as its standard input is open, so that it never
outlives the process that started it.
"""

from __future__ import annotations

import argparse
import faulthandler
import logging
import os
import signal
import sqlite3
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image

from shared.errors import Cancelled, UserError
from shared.files.lock import ProcessLock
from shared.gpu.planner import Plan
from shared.imaging import metadata, saving
from shared.imaging.naming import Facts, output_path
from shared.jobs.agreements import Agreed
from shared.jobs.inputs import without_folders
from shared.jobs.records import CANCELLED, DONE, FAILED, ON_A_PAGE, Job
from shared.jobs.store import JobStore
from shared.jobs.supervisor import RESTART_ME
from shared.library.consent import NotAgreed
from shared.library.model_info import HandlerFor
from shared.loras.library import without_secrets
from shared.worker import failures, grid_sheet
from shared.worker.config import WorkerConfig
from shared.worker.model_manager import LoadedModel, ModelHost, Silent
from shared.worker.progress import Progress

log = logging.getLogger(__name__)

SIZES = ("model_type", "resolution", "batch_size", "hires_scale", "hires_tile")  # what memory depends on
IDLE_SECONDS = 0.02
NICENESS = 10  # the page answers before the model is loaded, and while it computes
RETRY_SECONDS = 1.0
PREDECESSOR_SECONDS = 30.0

T = TypeVar("T")


WAITS = "waits"  # for a yes to its download


@dataclass(frozen=True)
class Outcome:
    """How a job ended, or WAITS; `release`: the model goes from memory, `restart`: this process must end."""

    status: str
    error: str | None = None
    release: bool = False
    restart: bool = False


class Worker:
    """Runs the jobs of one store. A job's failure is its own: the worker goes on with the next one."""

    def __init__(
        self,
        store: JobStore,
        host: ModelHost,
        output_dir: Path,
        log_file: Path,
        rules: saving.Rules = saving.DEFAULT_RULES,
    ):
        self._store, self._host, self._output_dir, self._log_file = store, host, output_dir, log_file
        self._rules = rules
        self._rungs: dict[tuple[Any, ...], int] = {}  # of the ladder, for jobs of a kind that did not fit

    def warm_up(self, model_id: str) -> None:
        """Load a model that nobody asked for yet, unless a job waits or its files are not all here."""
        if self._store.queue(limit=1) or not self._host.info(model_id).available:
            return
        try:
            self._host.get(model_id, Silent())
        except Exception:  # the first job that wants this model will tell its user
            log.exception("The model %s could not be loaded in advance.", model_id)
        else:
            log.info("%s is loaded.", model_id)

    def run(self, leave: threading.Event | None = None) -> None:
        """Run jobs until `leave` is set, which is looked at between two of them."""
        while leave is None or not leave.is_set():
            if not self.run_one():
                time.sleep(IDLE_SECONDS)

    def run_one(self) -> bool:
        """Run the next waiting job to its end; False when none waits."""
        job = persist(self._store.claim_next)
        if job is None:
            return False
        outcome = self._outcome(job)
        if outcome.release:
            self._host.release()
        if outcome.status == WAITS:
            persist(lambda: self._store.ask([job.id]))
        else:
            persist(lambda: self._store.finish(job.id, outcome.status, outcome.error))
        if outcome.restart:
            sys.exit(RESTART_ME)
        return True

    def _outcome(self, job: Job) -> Outcome:
        # The exception must not leave this function: its traceback holds the job's tensors.
        try:
            self._draw_grid(job) if grid_sheet.is_sheet(job) else self._make_images_that_fit(job)
        except Cancelled:
            return Outcome(CANCELLED)
        except Exception as error:
            if isinstance(error, NotAgreed) and job.source in ON_A_PAGE:
                return Outcome(WAITS)
            expected, ruined = failures.is_expected(error), failures.ruins_the_device(error)
            log.error("Job %d failed: %s", job.id, error, exc_info=None if expected else error)
            return Outcome(
                FAILED,
                failures.sentence(error, str(self._log_file)),
                release=not isinstance(error, UserError) and not ruined,
                restart=ruined,
            )
        return Outcome(DONE)

    def _draw_grid(self, job: Job) -> None:
        Progress(self._store, job.id).phase("Drawing the grid")
        grid_sheet.make(self._store, job, without_folders(_public(job.settings)), partial(self._write, job))

    def _make_images_that_fit(self, job: Job) -> None:
        """Go down the planner's ladder until the job fits. What was learned stays for jobs of its kind."""
        kind = tuple(job.settings.get(name) for name in SIZES)
        progress, failed = Progress(self._store, job.id), list[str]()
        first = job.attempts - 1  # a worker was killed at it: not once more as it was
        while not self._fits(job, progress, max(first, self._rungs.get(kind, 0)), failed):
            self._rungs[kind] = max(first, self._rungs.get(kind, 0)) + 1
            self._host.give_way()

    def _fits(self, job: Job, progress: Progress, rung: int, failed: list[str]) -> bool:
        """Try one rung; False when the memory did not suffice and a lower one is left.

        failed: the plans tried so far. The exception ends here, because it holds the job's tensors.
        """
        try:
            self._make_images(job, progress, rung, failed)
        except Exception as error:
            plan = self._host.planned
            if not failures.is_out_of_memory(error) or plan is None or plan.last:
                raise
            log.warning("Job %d did not fit at '%s': %s", job.id, plan.sentence(), error)
            failed.append(plan.sentence())
            if progress.cancelled():
                raise Cancelled from None
            return False
        return True

    def _make_images(self, job: Job, progress: Progress, rung: int, failed: list[str]) -> None:
        settings = job.settings
        self._store.drop_lost_images(job.id)
        saved = {image.index for image in self._store.images(job.id)}  # by an attempt that was cut short
        indices = [index for index in range(settings["batch_size"]) if index not in saved]
        if not indices:
            return
        killed = job.attempts > 1
        model = self._host.get(settings["model_type"], progress, settings, rung, careful=killed)
        result = model.processor.generate(
            settings,
            seeds=[settings["seed"] + index for index in indices],
            on_phase=progress.phase,
            on_step=progress.step,
            interrupt=progress.cancelled,
        )
        usual = model.plan
        if killed and usual is not None:
            usual = self._host.outlook(model.info, settings, lora_bytes=model.loras.bytes).plan
        substituted = [*_descent(failed, model, usual), *model.loras.notes, *result.notes]
        for note in substituted:
            self._store.note(job.id, note)
        notes = [*job.notes, *substituted]
        loras, plan = model.lora_entries(), model.plan
        extra = {
            **result.extra,
            **({"loras": loras} if loras else {}),
            **({"plan": plan.sentence()} if plan is not None and plan.on_card else {}),
        }
        # `images` may be decoded one by one as this loop asks for them.
        for index, image in zip(indices, result.images, strict=True):
            self._save(job, model, index, image, notes, extra)
            if index != indices[-1] and progress.cancelled():
                raise Cancelled  # what is saved stays

    def _save(
        self,
        job: Job,
        model: LoadedModel,
        index: int,
        image: Image.Image,
        notes: list[str],
        extra: dict[str, Any],
    ) -> None:
        settings = job.settings
        seed = settings["seed"] + index
        meta = metadata.build(
            without_folders(_public(settings)),
            seed=seed,
            index=index,
            model_name=model.info.name,
            model_files=model.hashes.known(),
            notes=notes,
            extra=extra,
        )
        facts = Facts(
            datetime.now(), seed, settings["prompt"], model.info.id, index,
            steps=settings.get("num_inference_steps", 0), resolution=f"{image.width}x{image.height}",
        )  # fmt: skip

        claimed: int | None = None

        def claim(path: Path) -> None:
            nonlocal claimed
            claimed = self._store.claim_image(
                job.id,
                index=index,
                path=str(path),
                seed=seed,
                width=image.width,
                height=image.height,
                metadata=meta,
                instead=claimed,
            )

        try:
            self._write(job, image, facts, settings["image_format"], meta, claim)
        except UserError:
            self._store.drop_lost_images(job.id)
            raise
        assert claimed is not None  # there was a name
        self._store.announce_image(claimed)

    def _write(
        self,
        job: Job,
        image: Image.Image,
        facts: Facts,
        fmt: str,
        meta: dict[str, Any],
        claim: Callable[[Path], object] = lambda path: None,
    ) -> Path:
        """Save a picture where the job and the rules want it. claim: as for saving.save_image."""
        rules = self._rules
        name = output_path(rules.template, facts)
        # A folder that the job names has no subfolders.
        folder = Path(job.output_dir) if job.output_dir else self._output_dir / name.parent
        quality = rules.quality if fmt == rules.format else saving.QUALITY
        written = meta if rules.metadata else None
        return saving.save_image(image, folder, name.name, fmt, written, quality, claim)


def _public(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings as they may stand in a picture."""
    if not settings.get("activated_loras"):
        return settings
    return settings | {"activated_loras": [without_secrets(entry) for entry in settings["activated_loras"]]}


def _descent(failed: Sequence[str], model: LoadedModel, usual: Plan | None) -> list[str]:
    """What is said of a plan that is not the `usual` one, or before which others failed."""
    if model.plan is None or not (failed or model.plan != usual):
        return []
    if not failed:
        return [f"Tried again with less: made with '{model.plan.sentence()}'."]
    tried = "; ".join(f"'{plan}'" for plan in failed)
    return [f"It did not fit at {tried}: made with '{model.plan.sentence()}'."]


def persist(action: Callable[[], T]) -> T:
    """Repeat a database action until it succeeds: a full disk must not end the worker or lose a job's end."""
    while True:
        try:
            return action()
        except sqlite3.OperationalError as error:
            log.error("The queue cannot be written (%s); trying again.", error)
            time.sleep(RETRY_SECONDS)


def end_with_standard_input(leave: threading.Event) -> None:
    """End this process at once when the other end of its standard input is closed; anything written there
    sets `leave`.
    """
    # On Windows, loading a DLL hangs while another thread reads descriptor 0, so a copy of it is read.
    watched = os.dup(0)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)

    def watch() -> None:
        while os.read(watched, 1024):
            leave.set()
        os._exit(0)

    threading.Thread(target=watch, name="standard input", daemon=True).start()


def main(arguments: Sequence[str] | None = None, handler_for: HandlerFor | None = None) -> None:
    """Run until the standard input ends. `handler_for` replaces the registry of families in tests."""
    config, warm = _parse(arguments)
    leave = threading.Event()
    end_with_standard_input(leave)
    if hasattr(os, "nice"):  # on Windows the supervisor asks for the same when it starts this process
        os.nice(NICENESS)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the supervisor
    faulthandler.enable()
    level = (logging.WARNING, logging.INFO, logging.DEBUG)[config.verbose]
    logging.basicConfig(level=level, format="%(asctime)s worker %(levelname)s %(name)s: %(message)s")
    lock = ProcessLock(config.database.with_name(config.database.name + ".worker.lock"))
    if not lock.acquire(PREDECESSOR_SECONDS):
        sys.exit(f"Another worker still works on {config.database}: end that process, then start again.")
    store = JobStore(config.database, check=False)  # whoever started this has looked at it
    store.recover_running()  # left by a worker whose supervisor died with it
    host = ModelHost(
        config.folders,
        gpu=config.gpu,
        overrides=config.overrides,
        lora_folders=config.lora_folders,
        save_quantized=config.save_quantized,
        handler_for=handler_for,
        agreed=Agreed(store.database).given,
    )
    worker = Worker(store, host, config.output_dir, config.database.with_name("zgp.log"), config.saving)
    if warm:
        worker.warm_up(warm)
    worker.run(leave)
    sys.exit(RESTART_ME)


def _parse(arguments: Sequence[str] | None) -> tuple[WorkerConfig, str]:
    """(configuration, the model to load at the start or "")"""
    parser = argparse.ArgumentParser(prog="python -m shared.worker.worker")
    parser.add_argument("config", type=WorkerConfig.from_json, help="a WorkerConfig as JSON")
    parser.add_argument("--warm", default="", metavar="MODEL", help="load this one before there is a job")
    options = parser.parse_args(arguments)
    return options.config, options.warm


if __name__ == "__main__":
    main()
