"""The boundary of the page: a UserError leaves a handler as one sentence in a toast, never as HTML."""

from __future__ import annotations

import functools
import html
from collections.abc import Callable
from typing import Any, TypeVar

import gradio as gr

from shared.errors import UserError

#: for listeners that answer at once, as many as there are tabs, and are no part of the API
QUIET: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden", "concurrency_limit": None}

Handler = TypeVar("Handler", bound=Callable[..., Any])


def toast(sentence: str) -> gr.Error:
    """The exception that shows `sentence` and stops the chain of events."""
    return gr.Error(html.escape(sentence, quote=False), print_exception=False)


def shows_errors(handler: Handler) -> Handler:
    """Decorate a handler of the page: whatever the user can mend is shown, a bug still reaches the log."""

    @functools.wraps(handler)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        try:
            return handler(*args, **kwargs)
        except UserError as error:
            raise toast(str(error)) from None

    return guarded  # type: ignore[return-value]
