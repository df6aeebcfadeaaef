"""What programs get to see of jobs, pictures and models: no path of this computer is in it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shared.engine.engine import Engine
from shared.jobs.inputs import without_folders
from shared.jobs.records import ImageRecord, Job
from shared.library.model_info import ModelInfo
from shared.server.schema import setting_schema
from shared.settings.table import SETTINGS
from shared.settings.validation import Validated


@dataclass(frozen=True)
class Accepted:
    """A job that was queued. `ignored`: names of settings that do nothing here, and why."""

    id: int
    url: str
    notes: list[str]
    ignored: dict[str, str]


@dataclass(frozen=True)
class AcceptedJobs:
    jobs: list[Accepted]


@dataclass(frozen=True)
class ImageView:
    """A finished picture; `url` has the file."""

    id: int
    job: int
    index: int
    url: str
    name: str
    seed: int
    width: int
    height: int
    created: float
    metadata: dict[str, Any]


@dataclass(frozen=True)
class JobView:
    """A job. `status`: queued, running, done, failed or cancelled. Times are seconds since the epoch."""

    id: int
    url: str
    status: str
    settings: dict[str, Any]
    source: str
    phase: str
    step: int
    steps: int
    seconds_left: float | None
    error: str | None
    notes: list[str]
    created: float
    started: float | None
    finished: float | None
    images: list[ImageView] = field(default_factory=list)


@dataclass(frozen=True)
class ModelView:
    """A model. `settings`: what acts on it, each as a JSON schema with this model's default.

    download_bytes: about what its first picture brings; 0 also where nobody knows.
    """

    id: str
    name: str
    description: str
    architecture: str
    on_disk: bool
    missing_files: int
    size_bytes: int
    download_bytes: int
    default: bool
    settings: dict[str, Any]


@dataclass(frozen=True)
class UploadView:
    """A picture that was taken; settings name it by `name`."""

    name: str
    width: int
    height: int
    notes: list[str]


def accepted(job_id: int, validated: Validated) -> Accepted:
    return Accepted(job_id, f"/api/v1/jobs/{job_id}", validated.notes, validated.ignored)


def image_view(record: ImageRecord) -> ImageView:
    return ImageView(
        id=record.id,
        job=record.job_id,
        index=record.index,
        url=f"/api/v1/images/{record.id}",
        name=Path(record.path).name,
        seed=record.seed,
        width=record.width,
        height=record.height,
        created=record.created,
        metadata=record.metadata,
    )


def job_view(job: Job, images: list[ImageRecord] | None = None) -> JobView:
    return JobView(
        id=job.id,
        url=f"/api/v1/jobs/{job.id}",
        status=job.status,
        settings=without_folders(job.settings),
        source=job.source,
        phase=job.phase,
        step=job.step,
        steps=job.steps,
        seconds_left=job.seconds_left,
        error=job.error,
        notes=job.notes,
        created=job.created,
        started=job.started,
        finished=job.finished,
        images=[image_view(record) for record in images or ()],
    )


def model_view(model: ModelInfo, engine: Engine) -> ModelView:
    return ModelView(
        id=model.id,
        name=model.name,
        description=model.description,
        architecture=model.architecture,
        on_disk=model.available,
        missing_files=len(model.missing),
        size_bytes=model.size_bytes,
        download_bytes=0 if model.available else engine.downloads.outlook(model).left,
        default=model.id == engine.catalog.default_model,
        settings={
            name: {**setting_schema(SETTINGS[name]), "default": model.defaults[name]}
            for name in model.settings
        },
    )
