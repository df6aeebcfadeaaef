"""The real worker with one fault, once: ZGP_FAULT names it and the file that marks that it has happened."""

import errno
import os
import signal
import sqlite3
from pathlib import Path

from shared.engine import progress, store
from shared.imaging import saving


def happens(fault: str) -> bool:
    """True once, for the fault that was asked for."""
    wanted, _, marker = os.environ.get("ZGP_FAULT", "").partition(" ")
    if wanted != fault or Path(marker).exists():
        return False
    Path(marker).touch()
    return True


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def phase(self, name, real=progress.Progress.phase):
    real(self, name)
    if name.startswith("Loading") and happens("killed_at_load"):
        die()


def step(self, number, *others, real=progress.Progress.step):
    real(self, number, *others)
    if number == 3 and happens("killed_at_a_step"):
        die()
    if number == 3 and happens("database_full"):
        raise sqlite3.OperationalError("database or disk is full")


def write(path, data, real=saving._write):
    if happens("killed_while_a_file_is_written"):
        path.write_bytes(data[: len(data) // 2])
        die()
    if happens("disk_full"):
        raise OSError(errno.ENOSPC, "No space left on device")
    real(path, data)


def add_image(self, job_id, real=store.JobStore.add_image, **image):
    if image["index"] == 1 and happens("killed_before_a_file_is_recorded"):
        die()
    return real(self, job_id, **image)


def finish(self, *arguments, real=store.JobStore.finish):
    if happens("end_not_written"):
        raise sqlite3.OperationalError("database or disk is full")
    real(self, *arguments)


if __name__ == "__main__":
    progress.Progress.phase, progress.Progress.step = phase, step
    saving._write = write
    store.JobStore.add_image, store.JobStore.finish = add_image, finish
    from shared.engine import worker

    worker.main()
