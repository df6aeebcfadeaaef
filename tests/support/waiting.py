"""How tests wait for what other threads and processes do."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

LIMIT = 300.0  # seconds for what takes one on an idle computer: only what never comes may fail a test

T = TypeVar("T")


def until(condition: Callable[[], T], pause: Callable[[], object] = lambda: time.sleep(0.01)) -> T:
    """The condition's answer, once it is true. pause: what is done between two questions."""
    end = time.monotonic() + LIMIT
    while not (answer := condition()):
        assert time.monotonic() < end, f"waited {LIMIT:.0f} s in vain"
        pause()
    return answer
