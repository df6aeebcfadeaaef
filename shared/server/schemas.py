"""What programs get to see of jobs, pictures and models: no path of this computer is in it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shared.engine.engine import Engine
from shared.jobs.inputs import without_folders
from shared.jobs.records import ImageRecord, Job
from shared.library.model_info import ModelInfo
from shared.settings.table import SETTINGS, Setting
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
class ImageResponse:
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
class JobResponse:
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
    images: list[ImageResponse] = field(default_factory=list)


@dataclass(frozen=True)
class ModelResponse:
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
class UploadResponse:
    """A picture that was taken; settings name it by `name`."""

    name: str
    width: int
    height: int
    notes: list[str]


@dataclass(frozen=True)
class WorkflowResponse:
    """prompt: the nodes, as ComfyUI takes them for its queue. notes: what differs or has no node there."""

    prompt: dict[str, Any]
    notes: list[str]


def accepted(job_id: int, validated: Validated) -> Accepted:
    return Accepted(job_id, f"/api/v1/jobs/{job_id}", validated.notes, validated.ignored)


def image_response(record: ImageRecord) -> ImageResponse:
    return ImageResponse(
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


def job_response(job: Job, images: list[ImageRecord] | None = None) -> JobResponse:
    return JobResponse(
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
        images=[image_response(record) for record in images or ()],
    )


def model_response(model: ModelInfo, engine: Engine) -> ModelResponse:
    return ModelResponse(
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


# ---- the one list of settings as JSON schemas, for OpenAPI and for /models ---------------------------------

TYPES: dict[type, str] = {str: "string", int: "integer", float: "number", bool: "boolean", list: "array"}
LIMITS = {
    str: ("minLength", "maxLength"),
    list: ("minItems", "maxItems"),
    int: ("minimum", "maximum"),
    float: ("minimum", "maximum"),
}
PROBLEM = {
    "type": "object",
    "description": "What went wrong, as RFC 9457 has it.",
    "required": ["title", "status", "detail", "problems"],
    "properties": {
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "detail": {"type": "string", "description": "One sentence."},
        "problems": {"type": "array", "items": {"type": "string"}, "description": "Every single problem."},
    },
}


def setting_schema(setting: Setting) -> dict[str, Any]:
    """One setting; without its default, which depends on the model."""
    schema: dict[str, Any] = {
        "type": TYPES[setting.kind],
        "title": setting.label,
        "description": setting.help,
    }
    for word, limit in zip(LIMITS.get(setting.kind, ()), (setting.minimum, setting.maximum), strict=False):
        if limit is not None:
            schema[word] = int(limit) if float(limit).is_integer() else limit
    if setting.choices:
        schema["enum"] = list(setting.choices)
    if setting.kind is list:
        schema["items"] = {"type": "string"}
    return schema


def settings_schema() -> dict[str, Any]:
    """What POST /jobs takes. Further names are allowed: those of Wan2GP are reported back, not refused."""
    return {
        "type": "object",
        "description": "Settings of one job. Which of them act on a model is told by /api/v1/models.",
        "required": ["prompt"],
        "properties": {name: setting_schema(setting) for name, setting in SETTINGS.items()},
        "additionalProperties": True,
    }
