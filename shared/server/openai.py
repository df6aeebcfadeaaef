"""POST /v1/images/generations as OpenAI's clients send it. Names of our settings go along as extras."""

from __future__ import annotations

import asyncio
import base64
import time
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from starlette.concurrency import run_in_threadpool

from shared.engine.engine import Engine
from shared.jobs.records import CANCELLED, DONE, ENDED, ImageRecord, Job
from shared.server.errors import ApiError
from shared.server.file_access import FileAccess
from shared.server.jobs import json_body, submit_all

POLL_SECONDS = 0.1
#: theirs -> ours
NAMES = {"model": "model_type", "n": "batch_size", "size": "resolution", "output_format": "image_format"}
#: what they send and no local model has
WITHOUT_MEANING = {"quality", "style", "user", "background", "moderation", "output_compression"}
FORMATS = ("b64_json", "url")
TAKES = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {
                    "type": "object",
                    "required": ["prompt"],
                    "properties": {
                        "prompt": {"type": "string"},
                        "model": {"type": "string", "description": "The id of a model here."},
                        "n": {"type": "integer", "minimum": 1, "maximum": 16},
                        "size": {"type": "string", "examples": ["1024x1024", "auto"]},
                        "response_format": {"type": "string", "enum": list(FORMATS), "default": "b64_json"},
                    },
                    "additionalProperties": True,
                }
            }
        },
    }
}


def openai_router(engine: Engine, uploads: Path, files: FileAccess) -> APIRouter:
    """The routes below /v1."""
    router = APIRouter(prefix="/v1")

    @router.get("/models")
    def models() -> dict[str, Any]:
        """The models, in OpenAI's shape."""
        listed = [
            {"id": name, "object": "model", "created": 0, "owned_by": "zgp"} for name in engine.catalog.models
        ]
        return {"object": "list", "data": listed}

    @router.post("/images/generations", openapi_extra=TAKES)
    async def generate(request: Request, download: bool = False) -> dict[str, Any]:
        """Make pictures and wait for them. Who hangs up cancels. download: as for /api/v1/jobs."""
        wanted, form = translated(await json_body(request), engine)
        queued = await run_in_threadpool(submit_all, engine, uploads, [wanted], download)
        jobs = [await _ended(engine, job_id, request) for job_id, _ in queued]
        records = [record for job in jobs for record in engine.store.images(job.id)]
        base = str(request.base_url).rstrip("/")
        data = [await run_in_threadpool(_datum, record, form, base, files) for record in records]
        told = {
            "jobs": [job.id for job in jobs],
            "notes": [note for job in jobs for note in job.notes],
            "ignored": queued[0][1].ignored,
        }
        return {"created": int(time.time()), "data": data, "zgp": told}

    return router


def translated(values: Any, engine: Engine) -> tuple[dict[str, Any], str]:
    """(our settings, the form of the answer) for a request's body. ApiError for what cannot be done."""
    if not isinstance(values, dict):
        raise ApiError(400, "The body is no JSON object; expected one with a prompt.")
    form = str(values.get("response_format") or FORMATS[0])
    if form not in FORMATS:
        raise ApiError(400, f"response_format came as {form[:40]!r}; expected {' or '.join(FORMATS)}.")
    if values.get("stream"):
        raise ApiError(400, "stream came as true; pictures come whole here: leave it out.")
    model = values.get("model")
    if model and not (isinstance(model, str) and model in engine.catalog.models):
        known = ", ".join(engine.catalog.models)
        raise ApiError(404, f"There is no model {str(model)[:80]!r}: choose one of {known}, or name none.")
    dropped = {"response_format", "stream", "partial_images", *WITHOUT_MEANING}
    settings: dict[str, Any] = {
        NAMES.get(str(name), str(name)): value for name, value in values.items() if name not in dropped
    }
    if settings.get("resolution") == "auto":
        del settings["resolution"]
    return settings, form


async def _ended(engine: Engine, job_id: int, request: Request) -> Job:
    """The job once it is done. ApiError when it was not; a caller who hangs up cancels it."""
    while (job := engine.store.job(job_id)).status not in ENDED:
        if await request.is_disconnected():
            engine.cancel(job_id)
        await asyncio.sleep(POLL_SECONDS)
    if job.status == DONE:
        return job
    if job.status == CANCELLED:
        raise ApiError(409, f"Job {job_id} was cancelled.")
    raise ApiError(500, job.error or f"Job {job_id} failed.")


def _datum(record: ImageRecord, form: str, base: str, files: FileAccess) -> dict[str, Any]:
    if form == "url":
        return {"url": f"{base}/api/v1/images/{record.id}", "seed": record.seed}
    path = files.picture(record.path)
    if path is None:
        raise ApiError(404, f"The file of image {record.id} is no longer among the pictures here.")
    return {"b64_json": base64.b64encode(path.read_bytes()).decode("ascii"), "seed": record.seed}
