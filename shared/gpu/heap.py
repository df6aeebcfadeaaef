"""Freed memory goes back to the system.

glibc keeps what lies below the top of its heap, and a large model is loaded through many arrays that do: 1.6
to 4.9 GB stayed with the process after a model had gone.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable


def trim() -> None:
    """Give freed memory back; nothing where the C library has no such function."""
    _malloc_trim()(0)


@functools.cache
def _malloc_trim() -> Callable[[int], object]:
    function = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    return function or (lambda kept: None)
