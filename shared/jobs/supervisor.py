"""Keeps one worker process alive per database, from whichever ZGP process holds the lock."""

from __future__ import annotations

import contextlib
import logging
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from shared.files.lock import ProcessLock
from shared.jobs.store import WORKER_DIED, JobStore

log = logging.getLogger(__name__)

CODE_ROOT = Path(__file__).resolve().parents[2]
TAKE_OVER_SECONDS = 0.5  # how often a mere client looks whether the supervising process has gone
QUICK_SECONDS = 10.0  # a worker that dies sooner, with no job in hand, died of its start
QUICK_DEATHS = 3
STOP_SECONDS = 5.0
AFTER_A_KILL = (
    "If it was the memory: take a smaller file of this model (int8), a smaller resolution or fewer images at "
    "once, or close other programs."
)
RESTART_ME = 75  # exit code of a worker that ended a job and then needs a fresh process

# The page answers before the model is loaded, and while it computes: the worker yields the processor to it.
WINDOWS_FLAGS = getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0) | getattr(
    subprocess, "BELOW_NORMAL_PRIORITY_CLASS", 0
)


class Supervisor:
    """`first_arguments` are only given to the first worker: a restarted one does nothing unasked.
    before_spawn: is called whenever a worker is started.
    """

    def __init__(
        self,
        store: JobStore,
        command: Sequence[str],
        *,
        first_arguments: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        log_file: Path,
        restart_seconds: float = 0.5,
        before_spawn: Callable[[], object] = lambda: None,
    ):
        self._store, self._command, self._log_file = store, list(command), log_file
        self._first_arguments = list(first_arguments)
        self._environment = environment
        self._restart_seconds = restart_seconds
        self._before_spawn = before_spawn
        self._lock = ProcessLock(store.path.with_name(store.path.name + ".lock"))
        self._stopping = threading.Event()
        self._spawning = threading.Lock()
        self._thread: threading.Thread | None = None
        self._worker: subprocess.Popen[bytes] | None = None

    @property
    def supervises(self) -> bool:
        """True when this process runs the worker, False when another one does."""
        return self._lock.held

    @property
    def worker_pid(self) -> int | None:
        return None if self._worker is None else self._worker.pid

    def start(self) -> None:
        """Spawn the worker before returning, unless another process already supervises one."""
        if self._lock.acquire():
            self._spawn(self._first_arguments)
        self._thread = threading.Thread(target=self._run, name="worker supervisor", daemon=True)
        self._thread.start()

    def restart(self, command: Sequence[str]) -> None:
        """Let the worker end once it has no job in hand, and run `command` in its place."""
        with self._spawning:
            self._command = list(command)
            worker = self._worker
            if worker is not None and worker.stdin is not None:
                with contextlib.suppress(BrokenPipeError):  # it has just ended
                    worker.stdin.write(b"leave\n")
                    worker.stdin.flush()

    def stop(self) -> None:
        """End the worker and wait for it. The job in its hands goes back to its place in the queue."""
        self._stopping.set()
        with self._spawning:
            self._end_worker()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._lock.held:
            try:
                self._store.recover_running("ZGP was stopped while it ran", counts=False)
            except sqlite3.OperationalError as error:  # such as a full disk
                log.warning("The queue cannot be written (%s); the next start puts its job back.", error)
            self._lock.release()

    def _run(self) -> None:
        while not self._stopping.is_set() and not self._lock.acquire():
            self._stopping.wait(TAKE_OVER_SECONDS)
        deaths = 0
        while not self._stopping.is_set():
            try:
                deaths = self._one_life(deaths)
            except Exception:
                # Such as a full disk that lets neither the log nor the queue be written: try again later.
                log.exception("The worker could not be supervised; trying again.")
                self._stopping.wait(self._restart_seconds)

    def _one_life(self, deaths: int) -> int:
        """Run a worker to its end; returns how many in a row now died of their start."""
        if self._worker is None:
            self._spawn([])
        if self._worker is None:
            return deaths
        born = time.monotonic()
        code = self._worker.wait()
        self._worker = None
        if self._stopping.is_set():
            return deaths
        reason = describe_exit(code)
        advice = AFTER_A_KILL if code == -getattr(signal, "SIGKILL", 9) else ""
        interrupted = self._store.recover_running(f"{WORKER_DIED} ({reason})", advice=advice)
        log.warning("The worker stopped (%s)%s.", reason, "; it is started again" if deaths < 2 else "")
        if interrupted or code == RESTART_ME or time.monotonic() - born > QUICK_SECONDS:
            return 0
        deaths += 1
        if deaths < QUICK_DEATHS:
            self._stopping.wait(self._restart_seconds * 2 ** (deaths - 1))
        else:
            self._give_up(reason)
        return deaths

    def _give_up(self, reason: str) -> None:
        """Fail what waits, then stay without a worker until somebody submits again."""
        self._store.fail_waiting(
            f"The worker process stopped {QUICK_DEATHS} times right after its start ({reason}): the log "
            f"{self._log_file} has the details; mend that, then submit again."
        )
        while not self._store.queue(limit=1) and not self._stopping.wait(self._restart_seconds):
            pass

    def _spawn(self, more_arguments: Sequence[str]) -> None:
        self._log_file.parent.mkdir(parents=True, exist_ok=True)
        with self._spawning, self._log_file.open("ab") as output:
            if self._stopping.is_set():
                return
            self._before_spawn()
            self._worker = subprocess.Popen(
                [*self._command, *more_arguments],
                cwd=CODE_ROOT,
                env=self._environment,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                # Ctrl-C in the terminal is for this process only, which then ends the worker.
                start_new_session=sys.platform != "win32",
                creationflags=WINDOWS_FLAGS,
            )

    def _end_worker(self) -> None:
        worker = self._worker
        if worker is None:
            return
        assert worker.stdin is not None
        worker.stdin.close()
        try:
            worker.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.wait()


def describe_exit(code: int) -> str:
    """An exit status in words: "exit code 3", "killed by SIGKILL, perhaps because the memory ran out"."""
    if code >= 0:
        return f"exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    hint = ", perhaps because the memory ran out" if name == "SIGKILL" else ""
    return f"killed by {name}{hint}"
