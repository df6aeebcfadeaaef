"""The exceptions that cross the rooms of the house."""

import errno
import re

#: how libraries say it that raise no MemoryError: torch, its mapping of files, safetensors; 1455 is Windows'
#: "the paging file is too small", in the system's own language
MEMORY_TEXT = re.compile(
    r"out of memory|not enough memory|(can't|cannot|could not) allocate"
    r"|paging file is too small|\b(os error|error code:|winerror)\W*1455\b"
)


class UserError(Exception):
    """Something the user can mend. `str(error)` is the one sentence shown: what came, what was expected,
    what to do.
    """


class QueueFull(UserError):
    """No further job is taken for now."""


class Cancelled(Exception):
    """The user asked for the work in progress to stop."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether RAM or a card's memory did not suffice, or no address space was left to map a file."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True  # torch's class is known by name: this file must not import torch
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM or getattr(error, "winerror", None) == 1455 or _tells(error)
    return (isinstance(error, RuntimeError) or type(error).__name__ == "SafetensorError") and _tells(error)


def _tells(error: BaseException) -> bool:
    return MEMORY_TEXT.search(str(error).lower()) is not None
