"""Jobs that need a large download, and the question that the page asks for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shared.errors import UserError
from shared.imaging.hires import needs_no_model
from shared.jobs.agreements import Agreed
from shared.jobs.records import ON_A_PAGE, Job
from shared.jobs.store import JobStore
from shared.library.catalog import Catalog
from shared.library.consent import Ask, NotAgreed, asks, together
from shared.library.model_info import ModelInfo
from shared.library.outlook import Outlook
from shared.settings.table import ANY_PRECISION

#: what the files of a job depend on; jobs that are alike in it are looked at once
SIZES = ("model_type", "precision", "resolution", "batch_size", "hires_scale", "hires_tile")


@dataclass(frozen=True)
class Question:
    """A download, and the jobs that wait for it."""

    ask: Ask
    jobs: tuple[Job, ...]


class Questions:
    """models: the catalog as it is now. outlook: of a job with these settings."""

    def __init__(
        self,
        store: JobStore,
        agreed: Agreed,
        models: Callable[[], Catalog],
        outlook: Callable[[ModelInfo, Mapping[str, Any]], Outlook],
    ):
        self._store, self._agreed, self._models, self._outlook = store, agreed, models, outlook

    def permit(self, jobs: Sequence[Mapping[str, Any]], source: str, download: bool) -> list[bool]:
        """Of jobs with these settings that are about to be queued: whether each waits for a yes.

        download: that is said beforehand. NotAgreed for jobs of a `source` that no page answers for.
        """
        found = self._of(jobs)
        if (ask := together([one for one in found if one])) is None:
            return [False] * len(jobs)
        if download:
            self._agreed.give(ask.sources)
            return [False] * len(jobs)
        if source not in ON_A_PAGE:
            raise NotAgreed(ask)
        return [one is not None for one in found]

    def open(self) -> Question | None:
        """The first question that waits for its answer. What has come meanwhile is not asked for any more."""
        waiting = self._store.asking()
        found = self._of([job.settings for job in waiting])
        settled = [job.id for job, ask in zip(waiting, found, strict=True) if ask is None]
        self._store.answered(settled)
        first = next((ask for ask in found if ask), None)
        if first is None:
            return None
        jobs = (job for job, ask in zip(waiting, found, strict=True) if ask and ask.mark == first.mark)
        return Question(first, tuple(jobs))

    def answer(self, mark: str, yes: bool) -> None:
        """Fetch the files of the open question, or cancel its jobs. UserError when it is another one now."""
        question = self.open()
        if question is None or question.ask.mark != mark:
            raise UserError("What has to be downloaded has changed meanwhile: look at the new question.")
        if yes:
            self._agreed.give(question.ask.sources)
            self._store.answered(job.id for job in question.jobs)
            return
        for job in question.jobs:
            self._store.request_cancel(job.id)

    def _of(self, jobs: Sequence[Mapping[str, Any]]) -> list[Ask | None]:
        known: dict[tuple[Any, ...], Ask | None] = {}
        agreed = self._agreed.given() if jobs else frozenset()
        found = []
        for settings in jobs:
            key = (*map(settings.get, SIZES), needs_no_model(settings))
            if key not in known:
                known[key] = self._ask(settings, agreed)
            found.append(known[key])
        return found

    def _ask(self, settings: Mapping[str, Any], agreed: frozenset[str]) -> Ask | None:
        try:
            info = self._models().model(settings["model_type"])
            here = info.available and settings.get("precision", ANY_PRECISION) == ANY_PRECISION
            if here or needs_no_model(settings):
                return None
            return asks(info, self._outlook(info, settings), agreed)
        except UserError:  # its job says why it cannot be made
            return None
