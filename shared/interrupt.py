"""Whether the work in hand is to stop, for code far from whoever can be asked: loading and encoding.

What computes in short steps takes its `interrupt` as an argument.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from shared.errors import Cancelled

_asked: ContextVar[Callable[[], bool] | None] = ContextVar("interrupt", default=None)


@contextmanager
def listening(interrupt: Callable[[], bool] | None) -> Iterator[None]:
    """Within it `check` asks `interrupt`, in this thread; None: whom it asked before."""
    token = _asked.set(interrupt or _asked.get())
    try:
        check()
        yield
    finally:
        _asked.reset(token)


def check() -> None:
    """Raise Cancelled once the answer is yes. To be called wherever a second may pass."""
    interrupt = _asked.get()
    if interrupt is not None and interrupt():
        raise Cancelled
