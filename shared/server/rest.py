"""REST: the engine for programs. The paths are in the project's contracts; docs/api.md explains them."""

from __future__ import annotations

import mimetypes
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Header, Query, Request
from fastapi import Path as InPath
from fastapi.responses import FileResponse, Response, StreamingResponse
from starlette.concurrency import run_in_threadpool

from shared.engine.comfyui import comfyui_workflow, settings_of
from shared.engine.engine import Engine
from shared.errors import UserError
from shared.imaging.sources import load_picture
from shared.jobs.inputs import keep_picture
from shared.jobs.records import ENDED, ImageRecord, Job
from shared.server.errors import ApiError
from shared.server.events import event_lines, nothing_follows
from shared.server.file_access import FileAccess
from shared.server.jobs import json_body, refuse, submit_all
from shared.server.schemas import (
    AcceptedJobs,
    ImageResponse,
    JobResponse,
    ModelResponse,
    UploadResponse,
    WorkflowResponse,
    accepted,
    image_response,
    job_response,
    model_response,
)

LARGEST_ID = 2**53 - 1

Id = Annotated[int, InPath(ge=1, le=LARGEST_ID)]
Status = Literal["queued", "running", "done", "failed", "cancelled"]
Limit = Annotated[int, Query(ge=1, le=500)]
PROBLEM = {"content": {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}}}
_SETTINGS = {"$ref": "#/components/schemas/Settings"}


def _takes(content: dict[str, Any]) -> dict[str, Any]:
    return {"requestBody": {"required": True, "content": content}}


TAKES_SETTINGS = _takes(
    {"application/json": {"schema": {"oneOf": [_SETTINGS, {"type": "array", "items": _SETTINGS}]}}}
)
TAKES_PICTURE = _takes({"image/*": {"schema": {"type": "string", "format": "binary"}}})


def rest_router(engine: Engine, uploads: Path, files: FileAccess) -> APIRouter:
    """The routes below /api/v1."""
    router = APIRouter(prefix="/api/v1", responses={"4XX": {"description": "Refused", **PROBLEM}})
    _add_jobs(router, engine, uploads)
    _add_models(router, engine)
    _add_pictures(router, engine, files)
    return router


def _add_jobs(router: APIRouter, engine: Engine, uploads: Path) -> None:
    store = engine.store

    @router.post("/jobs", status_code=201, openapi_extra=TAKES_SETTINGS)
    async def submit(request: Request, download: bool = False) -> AcceptedJobs:
        """Queue a job, or a list of jobs: all of them or, when one is wrong, none.

        download: fetch the model's missing files, however large; without it, more than 1 GB is refused.
        """
        values = await json_body(request)
        many = values if isinstance(values, list) else [values]
        queued = await run_in_threadpool(submit_all, engine, uploads, many, download)
        return AcceptedJobs([accepted(job_id, validated) for job_id, validated in queued])

    @router.get("/jobs")
    def jobs(limit: Limit = 100, status: Status | None = None) -> list[JobResponse]:
        """Jobs, newest first, without their pictures."""
        return [job_response(job) for job in store.jobs([status] if status else None, limit)]

    @router.get("/jobs/{job_id}")
    def job(job_id: Id) -> JobResponse:
        """A job with its pictures."""
        return job_response(_job(engine, job_id), store.images(job_id))

    @router.get("/jobs/{job_id}/events", response_class=StreamingResponse, responses=_EVENTS)
    async def events(
        job_id: Id,
        previews: bool = False,
        last_event_id: Annotated[int, Header(ge=0, le=LARGEST_ID)] = 0,
    ) -> Response:
        """What happens to a job, as server-sent events; 204 when nothing follows Last-Event-ID."""
        _job(engine, job_id)
        if last_event_id and nothing_follows(store, job_id, last_event_id):
            return Response(status_code=204)  # a browser's EventSource then stops asking
        lines = event_lines(store, job_id, last_event_id, previews)
        return StreamingResponse(lines, media_type="text/event-stream", headers={"X-Accel-Buffering": "no"})

    @router.delete("/jobs/{job_id}")
    def cancel(job_id: Id) -> JobResponse:
        """Cancel a job: at once while it waits, after the step in progress while it runs."""
        if (found := _job(engine, job_id)).status in ENDED:
            raise ApiError(409, f"Job {job_id} is {found.status}: there is nothing to cancel.")
        engine.cancel(job_id)
        return job_response(_job(engine, job_id))


def _add_models(router: APIRouter, engine: Engine) -> None:
    @router.get("/models")
    def models() -> list[ModelResponse]:
        """The models with what acts on them."""
        return [model_response(model, engine) for model in engine.catalog.models.values()]


def _add_pictures(router: APIRouter, engine: Engine, files: FileAccess) -> None:
    store = engine.store

    @router.get("/images")
    def images(
        limit: Limit = 100, job: Annotated[int, Query(ge=0, le=LARGEST_ID)] = 0
    ) -> list[ImageResponse]:
        """Finished pictures: the newest of all jobs, or those of one."""
        return [image_response(record) for record in store.images(job or None, limit)]

    @router.get("/images/{image_id}", response_class=FileResponse, responses=_FILE)
    def image(image_id: Id) -> FileResponse:
        """The file of a picture."""
        path = files.picture(_image(engine, image_id).path)
        if path is None:
            raise ApiError(404, f"The file of image {image_id} is no longer among the pictures here.")
        kind = mimetypes.guess_type(path.name)[0]
        return FileResponse(path, media_type=kind, filename=path.name, content_disposition_type="inline")

    @router.get("/images/{image_id}/comfyui")
    def comfyui(image_id: Id) -> WorkflowResponse:
        """A picture's settings as a workflow of ComfyUI, in the form that its API takes."""
        try:
            made = comfyui_workflow(settings_of(_image(engine, image_id), engine.catalog), engine.catalog)
        except UserError as error:
            refuse(error)
        return WorkflowResponse(made.nodes, made.lines)

    @router.post("/uploads", status_code=201, openapi_extra=TAKES_PICTURE)
    async def upload(request: Request) -> UploadResponse:
        """Take a picture that settings may then name. The body is the file as it is."""
        return await run_in_threadpool(_keep, await request.body(), engine.config.inputs)


_FILE: dict[int | str, dict[str, Any]] = {
    200: {"description": "The file", "content": {"image/*": {"schema": {"type": "string"}}}}
}
_EVENTS: dict[int | str, dict[str, Any]] = {
    200: {"description": "Events", "content": {"text/event-stream": {"schema": {"type": "string"}}}}
}


def _job(engine: Engine, job_id: int) -> Job:
    try:
        return engine.store.job(job_id)
    except UserError as error:
        raise ApiError(404, str(error)) from error


def _image(engine: Engine, image_id: int) -> ImageRecord:
    try:
        return engine.store.image(image_id)
    except UserError as error:
        raise ApiError(404, str(error)) from error


def _keep(data: bytes, folder: Path) -> UploadResponse:
    try:
        copy, notes = keep_picture(data, folder)
        width, height = load_picture(copy).image.size
    except UserError as error:
        refuse(error)
    return UploadResponse(copy.name, width, height, notes)
