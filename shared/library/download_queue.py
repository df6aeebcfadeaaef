"""Downloads of models from the page: a queue that one thread of this process works through, one model at a
time. What has come stays on disk, so a download that was paused, cut or killed goes on where it stopped.

The files are those that a job with the model's default settings would use here. The worker fetches through
the same functions; of two processes that want a file one downloads it and the other waits (downloads.py).
"""

from __future__ import annotations

import logging
import shutil
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from shared.errors import Cancelled, UserError
from shared.gpu.planner import Machine
from shared.library.catalog import Catalog
from shared.library.model_info import ModelInfo
from shared.library.outlook import Outlook, unplanned
from shared.weights.downloads import DownloadProgress, discard, ensure
from shared.weights.files import Folders, Required

log = logging.getLogger(__name__)

WAITING, RUNNING, PAUSED, FAILED = "waiting", "running", "paused", "failed"
ACTIVE = (WAITING, RUNNING)


@dataclass(frozen=True)
class Download:
    """How far the download of one model is.

    done, total: bytes of all its files that were missing when it began; total is 0 until the server has told
    them. speed: bytes per second. note: why nothing comes at the moment, or why it failed.
    """

    model_id: str
    status: str
    file: str = ""
    done: int = 0
    total: int = 0
    speed: float = 0.0
    note: str = ""

    @property
    def seconds_left(self) -> float | None:
        """None while it cannot be told."""
        if self.status != RUNNING or not self.speed or not self.total:
            return None
        return (self.total - self.done) / self.speed


class Agreements(Protocol):
    """Who keeps what somebody said yes to."""

    def give(self, sources: Iterable[str]) -> None: ...
    def withdraw(self, sources: Iterable[str]) -> None: ...


class Downloads:
    """models: the catalog as it is now. outlook: of a job with the model's defaults. finished: is called from
    the downloading thread whenever a download has ended, however it ended. agreed: a download that is asked
    for here needs no other yes.
    """

    def __init__(
        self,
        models: Callable[[], Catalog],
        folders: Folders,
        outlook: Callable[..., Outlook],
        finished: Callable[[], object],
        agreed: Agreements | None = None,
    ):
        self._models, self._folders, self._outlook, self._finished = models, folders, outlook, finished
        self._agreed = agreed
        self._lock = threading.RLock()
        self._table: dict[str, Download] = {}  # in the order in which they were asked for
        self._thread: threading.Thread | None = None
        self._stopped = threading.Event()

    # -- what a page asks -------------------------------------------------------------------------------

    def look(self) -> Mapping[str, Download]:
        """Every download that is not complete, by the model's id."""
        with self._lock:
            return dict(self._table)

    def outlook(self, info: ModelInfo, machine: Machine | None = None) -> Outlook:
        """The model's files, and how a picture would be made of them; whoever wants a model that cannot be
        planned here gets its first files.

        machine: this computer, where the caller has looked at it already.
        """
        try:
            return self._outlook(info, machine=machine)
        except (UserError, OSError) as error:
            log.info("No plan for %s: %s", info.id, error)
            return unplanned(info, self._folders)

    def free_bytes(self) -> int:
        """Free on the disk that downloads go to."""
        folder = self._folders.ckpts.absolute()
        return shutil.disk_usage(next(p for p in (folder, *folder.parents) if p.exists())).free

    # -- what the user does -------------------------------------------------------------------------------

    def start(self, model_id: str) -> None:
        """Begin or go on; behind those that were asked for before. UserError when there is nothing to do."""
        info = self._models().model(model_id)
        missing = self.outlook(info).missing
        if not missing:
            raise UserError(f"All files of {info.name} are on this computer already.")
        if self._agreed is not None:
            self._agreed.give(one.source for one in missing)
        with self._lock:
            before = self._table.pop(model_id, Download(model_id, PAUSED))
            running = before.status == RUNNING
            self._table[model_id] = before if running else replace(before, status=WAITING, note="", speed=0)
            self._stopped.clear()
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="downloads", daemon=True)
                self._thread.start()

    def pause(self, model_id: str) -> None:
        """Stop for now; what has come stays."""
        with self._lock:
            if model_id in self._table and self._table[model_id].status in ACTIVE:
                self._change(model_id, status=PAUSED, speed=0.0, note="")

    def cancel(self, model_id: str) -> None:
        """Stop, and delete what has come of the files that no other download here waits for."""
        info = self._models().model(model_id)
        with self._lock:
            before = self._table.pop(model_id, None)
        if before is None or before.status != RUNNING:
            self._discard(info)  # else the thread does it, once it has let go of the file

    def stop(self) -> None:
        """Pause everything: the program ends."""
        self._stopped.set()
        for model_id in self.look():
            self.pause(model_id)

    # -- the thread ---------------------------------------------------------------------------------------

    def _work(self) -> None:
        while (model_id := self._next()) is not None:
            complete = False
            try:
                complete = self._download(model_id)
                self._finished()  # before it leaves the table: who looks then finds the model complete
            except Exception:  # a defect here must not end the downloads that wait
                log.exception("The download of %s failed.", model_id)
                self._end(model_id, "It failed for a reason that ZGP does not know; the log has the details.")
            if complete:
                with self._lock:
                    self._table.pop(model_id, None)

    def _next(self) -> str | None:
        with self._lock:
            waiting = [one.model_id for one in self._table.values() if one.status == WAITING]
            if not waiting or self._stopped.is_set():
                self._thread = None
                return None
            self._change(waiting[0], status=RUNNING)
            return waiting[0]

    def _download(self, model_id: str) -> bool:
        """Whether all files of the model are here now."""

        def report(one: DownloadProgress) -> None:
            if self._runs(model_id):
                self._change(
                    model_id,
                    file=one.file,
                    done=one.before_bytes + one.done_bytes,
                    total=one.before_bytes + one.total_bytes + one.after_bytes if one.total_bytes else 0,
                    speed=one.speed,
                    note=one.note,
                )

        try:
            info = self._models().model(model_id)
            ensure(self.outlook(info).files, self._folders, report, lambda: not self._runs(model_id))
        except Cancelled:
            with self._lock:
                cancelled = model_id not in self._table
            if cancelled:
                self._discard(info)
        except UserError as error:
            self._end(model_id, str(error))
        else:
            return True
        return False

    def _runs(self, model_id: str) -> bool:
        with self._lock:
            return model_id in self._table and self._table[model_id].status == RUNNING

    def _end(self, model_id: str, reason: str) -> None:
        if self._runs(model_id):
            self._change(model_id, status=FAILED, note=reason, speed=0.0)

    def _change(self, model_id: str, **changes: object) -> None:
        with self._lock:
            if model_id in self._table:
                self._table[model_id] = replace(self._table[model_id], **changes)  # type: ignore[arg-type]

    def _discard(self, info: ModelInfo) -> None:
        models = self._models().models
        others = [models[one].required for one in self.look() if one in models]
        needed = {required for one in others for required in map(_key, one)}
        unneeded = [one for one in info.required if _key(one) not in needed]
        if self._agreed is not None:
            self._agreed.withdraw(source for one in unneeded for source in one.alternatives)
        discard(unneeded, self._folders)


def _key(required: Required) -> tuple[str, tuple[str, ...]]:
    return required.target, tuple(required.alternatives)
