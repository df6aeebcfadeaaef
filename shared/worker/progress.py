"""Reports a running job's progress to the store, no more often than anybody can see."""

from __future__ import annotations

import io
import math
import time
from collections.abc import Callable, Sequence

from PIL import Image

from shared.jobs.store import JobStore

STEP_SECONDS = 0.05
PREVIEW_SECONDS = 0.25
CANCEL_SECONDS = 0.05


class Progress:
    """One job's phases, steps, previews and wish to be cancelled. `clock` is for tests."""

    def __init__(self, store: JobStore, job_id: int, clock: Callable[[], float] = time.monotonic):
        self._store, self._job_id, self._clock = store, job_id, clock
        self._phase = ""
        self._step_times: list[float] = []
        self._last_write = self._last_preview = self._last_look = -math.inf
        self._cancelled = False

    def phase(self, name: str) -> None:
        """Always written; a new phase starts counting steps anew."""
        self._phase = name
        self._step_times = []
        self._write(0, 0, None)

    def step(
        self, step: int, total: int, previews: Callable[[], Sequence[Image.Image]] | None = None
    ) -> None:
        """Step `step` of `total` is complete. `previews()` is only called when a preview is due."""
        now = self._clock()
        self._step_times.append(now)
        if step in (1, total) or now - self._last_write >= STEP_SECONDS:
            self._write(step, total, self._seconds_left(total - step))
        if previews is not None and step < total and now - self._last_preview >= PREVIEW_SECONDS:
            self._last_preview = now
            self._store.set_preview(self._job_id, to_jpeg(contact_sheet(previews())))

    def amount(self, done: int, total: int, seconds_left: float | None) -> None:
        """Part of something without steps, such as a download."""
        if done >= total or self._clock() - self._last_write >= STEP_SECONDS:
            self._write(done, total, seconds_left)

    def cancelled(self) -> bool:
        """Whether the user asked for a stop; cheap enough to be asked between any two layers."""
        now = self._clock()
        if not self._cancelled and now - self._last_look >= CANCEL_SECONDS:
            self._last_look = now
            self._cancelled = self._store.cancel_requested(self._job_id)
        return self._cancelled

    def _write(self, step: int, total: int, seconds_left: float | None) -> None:
        self._last_write = self._clock()
        self._store.progress(self._job_id, self._phase, step, total, seconds_left)

    def _seconds_left(self, steps: int) -> float | None:
        """From the ends of the steps so far, so that the first step's warming up does not count."""
        measured = len(self._step_times) - 1
        if measured < 1:
            return None
        return steps * (self._step_times[-1] - self._step_times[0]) / measured


def contact_sheet(images: Sequence[Image.Image]) -> Image.Image:
    """All images of a batch, of one size, in a grid as square as possible."""
    if len(images) == 1:
        return images[0]
    columns = math.ceil(math.sqrt(len(images)))
    width, height = images[0].size
    sheet = Image.new("RGB", (columns * width, math.ceil(len(images) / columns) * height))
    for number, image in enumerate(images):
        sheet.paste(image, (number % columns * width, number // columns * height))
    return sheet


def to_jpeg(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "JPEG", quality=80)
    return buffer.getvalue()
