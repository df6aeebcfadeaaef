"""Whether the work in hand is to stop, for code far from whoever can be asked: loading and encoding.

What computes in short steps takes its `interrupt` as an argument.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from types import ModuleType

from shared.errors import Cancelled

ASK_SECONDS = 0.05

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


def asked_to_stop() -> bool:
    """The answer, for code that stops in its own way."""
    interrupt = _asked.get()
    return interrupt is not None and interrupt()


def check() -> None:
    """Raise Cancelled once the answer is yes. To be called wherever a second may pass."""
    if asked_to_stop():
        raise Cancelled


def imported(name: str) -> ModuleType:
    """The module of that name. torch, transformers and diffusers take seconds to come: they do so in a
    thread, which goes on alone when this one is to stop.
    """
    if _asked.get() is not None:
        thread = threading.Thread(target=_import_quietly, args=(name,), name=f"import of {name}", daemon=True)
        thread.start()
        while thread.is_alive():
            thread.join(ASK_SECONDS)
            check()
    return importlib.import_module(name)


def _import_quietly(name: str) -> None:
    with suppress(Exception):  # it is raised again where it is waited for
        importlib.import_module(name)
