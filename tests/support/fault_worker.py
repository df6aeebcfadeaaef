"""The real worker with one fault, once: ZGP_FAULT is a file that names it, which is gone once it happened."""

import errno
import os
import signal
import sqlite3
from pathlib import Path

from shared.imaging import saving
from shared.jobs import store
from shared.worker import progress


def happens(fault: str) -> bool:
    """True once, for the fault that was asked for."""
    wanted = Path(os.environ["ZGP_FAULT"])
    if not wanted.exists() or wanted.read_text() != fault:
        return False
    wanted.unlink()
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


def claim_image(self, job_id, real=store.JobStore.claim_image, **image):
    if image["index"] == 1 and happens("killed_before_a_picture_is_recorded"):
        die()
    image_id = real(self, job_id, **image)
    if image["index"] == 1 and happens("killed_before_a_file_is_named"):
        die()
    return image_id


def announce_image(self, image_id, real=store.JobStore.announce_image):
    if self.image(image_id).index == 1 and happens("killed_before_a_picture_is_announced"):
        die()
    real(self, image_id)


def finish(self, *arguments, real=store.JobStore.finish):
    if happens("end_not_written"):
        raise sqlite3.OperationalError("database or disk is full")
    real(self, *arguments)


if __name__ == "__main__":
    progress.Progress.phase, progress.Progress.step = phase, step
    saving._write = write
    store.JobStore.claim_image, store.JobStore.announce_image = claim_image, announce_image
    store.JobStore.finish = finish
    from shared.worker import worker

    worker.main()
