"""The one exception of the server."""

from __future__ import annotations

from collections.abc import Sequence


class Refused(Exception):
    """A request that is not served. `problems`: every one of several, one sentence each.

    retry: the seconds after which another try makes sense.
    """

    def __init__(self, status: int, sentence: str, problems: Sequence[str] = (), retry: float = 0) -> None:
        super().__init__(sentence)
        self.status = status
        self.sentence = sentence
        self.problems = list(problems) or [sentence]
        self.retry = retry
