"""The endpoint /generate of Gradio's API: settings in, picture files and their metadata out."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import gradio as gr
from gradio.utils import get_upload_folder

from shared.engine.engine import Engine
from shared.errors import UserError
from shared.jobs.records import DONE, ENDED, ImageRecord

POLL_SECONDS = 0.1


def uploads() -> Path:
    """The folder where Gradio puts what browsers and programs send."""
    return Path(get_upload_folder())


def add_generate(engine: Engine) -> None:
    """Add the endpoint to the Blocks being built."""
    gr.api(generate_with(engine), api_name="generate", concurrency_limit=None)


def generate_with(engine: Engine) -> Callable[[dict], Awaitable[dict]]:
    """The endpoint's function. Named and typed for its page in the API documentation."""

    async def generate(settings: dict, download: bool = False) -> dict:
        """Make pictures and wait for them.

        Parameters:
            settings: names and values as in a settings file, for example {"prompt": "a red circle"}
            download: fetch the model's missing files first, even if they are more than 1 GB
        Returns:
            {"images": [path, …], "metadata": [object, …]}, one of each per picture
        """
        try:
            queued = engine.submit_all(
                settings, source="api", uploads=uploads(), download=download
            )
            made = [record for job_id, _ in queued for record in await _pictures(engine, job_id)]
        except UserError as error:
            raise gr.Error(str(error), print_exception=False) from None
        return {
            "images": [record.path for record in made],
            "metadata": [record.metadata for record in made],
        }

    return generate


async def _pictures(engine: Engine, job_id: int) -> list[ImageRecord]:
    while (job := engine.store.job(job_id)).status not in ENDED:
        await asyncio.sleep(POLL_SECONDS)
    if job.status != DONE:
        raise UserError(job.error or f"Job {job_id} was {job.status}.")
    return engine.store.images(job_id)
