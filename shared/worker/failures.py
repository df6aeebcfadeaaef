"""What a user is told when a job fails: one sentence that says what happened and what to do."""

from __future__ import annotations

import errno
import re
import sqlite3

from shared.errors import UserError, is_out_of_memory

OUT_OF_MEMORY = (
    "The graphics card's memory did not suffice for this job: choose a smaller resolution, fewer images at "
    "once or a smaller model, or close other programs that use the graphics card."
)
OUT_OF_RAM = (
    "The computer's memory (RAM) did not suffice for this job: choose a smaller file of the model (int8), a "
    "smaller resolution or fewer images at once, or close other programs."
)
DISK_FULL = "The disk is full: free some space, or choose another output folder, and run this job again."


def is_expected(error: BaseException) -> bool:
    """True when the sentence says everything, so that a traceback would only bury it."""
    return isinstance(error, UserError) or is_out_of_memory(error) or is_disk_full(error)


def is_on_the_card(error: BaseException) -> bool:
    """Whether it was a card's memory that did not suffice, and not the RAM."""
    named = re.search(r"\b(cuda|hip|mps)\b", str(error).lower())
    return type(error).__name__ == "OutOfMemoryError" or named is not None


def is_disk_full(error: BaseException) -> bool:
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))
    return isinstance(error, sqlite3.OperationalError) and "disk is full" in str(error)


def ruins_the_device(error: BaseException) -> bool:
    """True for errors after which CUDA refuses all further work of this process, which must then restart."""
    if is_out_of_memory(error):
        return False
    return type(error).__name__ == "AcceleratorError" or (
        isinstance(error, RuntimeError) and "CUDA error" in str(error)
    )


def sentence(error: BaseException, log_file: str) -> str:
    """The one sentence for the user; `log_file` is where the traceback of an unexpected error was written."""
    if isinstance(error, UserError):
        return str(error)
    if is_out_of_memory(error):
        return OUT_OF_MEMORY if is_on_the_card(error) else OUT_OF_RAM
    if is_disk_full(error):
        return DISK_FULL
    message = " ".join(str(error).split()) or "no message"
    return f"{type(error).__name__}: {message[:500]}; the log {log_file} has the details."
