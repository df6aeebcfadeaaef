"""Settings from programs become jobs: all of a request's, or none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

from starlette.requests import Request

from shared.engine.engine import Engine
from shared.errors import QueueFull, UserError
from shared.library.consent import NotAgreed
from shared.server.errors import ApiError
from shared.settings.table import SettingsError
from shared.settings.validation import Validated

MAX_JOBS = 100
SOURCE = "api"
RETRY_SECONDS = 30.0


async def json_body(request: Request) -> Any:
    """The body of a request; ApiError when it is no JSON."""
    try:
        return json.loads(await request.body())
    except (ValueError, RecursionError) as error:
        raise ApiError(
            400, f"The body cannot be read as JSON ({error}); send one object of settings."
        ) from None


def submit_all(
    engine: Engine, uploads: Path, many: list[Any], download: bool = False
) -> list[tuple[int, Validated]]:
    """Queue what a list of settings stands for. ApiError names every problem; then nothing is queued.

    download: a yes to large downloads that it takes.
    """
    if not 1 <= len(many) <= MAX_JOBS:
        raise ApiError(400, f"The list has {len(many)} jobs; expected 1 to {MAX_JOBS}, send more lists.")
    _check(engine, many)
    try:
        with engine.store.together():
            return [
                job
                for values in many
                for job in engine.submit_all(values, source=SOURCE, uploads=uploads, download=download)
            ]
    except UserError as error:
        refuse(error)


def refuse(error: UserError) -> NoReturn:
    """Raise the error as an answer."""
    if isinstance(error, QueueFull):
        raise ApiError(429, str(error), retry=RETRY_SECONDS) from error
    if isinstance(error, NotAgreed):
        raise ApiError(409, str(error)) from error
    raise ApiError(400, str(error), getattr(error, "problems", ())) from error


def _check(engine: Engine, many: list[Any]) -> None:
    problems: list[str] = []
    for number, values in enumerate(many, 1):
        try:
            engine.check(values)
        except SettingsError as error:
            where = f"job {number}: " if len(many) > 1 else ""
            problems += [where + problem for problem in error.problems]
    if problems:
        raise ApiError(400, "; ".join(problems), problems)
