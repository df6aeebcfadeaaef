"""The page's questions: functions that one of its areas calls by their names, which answer at once.

They stand where Gradio has its own address for them, which answers what is wrong with a server error and
takes files besides. A question is small JSON, and only names that an area was given answer.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import gradio as gr
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.concurrency import run_in_threadpool

from shared.server.errors import ApiError
from shared.server.file_access import GRADIO, NOT_SERVED
from shared.server.limits import MEGABYTE

ADDRESS = f"{GRADIO}component_server"
LONGEST = MEGABYTE


def add_page_rpc(app: FastAPI, page: gr.Blocks) -> None:
    """Let the page's areas ask; before Gradio is mounted."""
    known: dict[Any, Callable[[Any], Any]] = {
        (number, function.__name__): function
        for number, block in page.blocks.items()
        if isinstance(block, gr.HTML)
        for function in block.server_fns
    }

    async def answer(request: Request) -> JSONResponse:
        asked = _asked(await request.body())
        number, name = asked.get("component_id"), asked.get("fn_name")
        function = known.get((number, name)) if type(number) is int and isinstance(name, str) else None
        if function is None:
            raise ApiError(404, NOT_SERVED)
        return JSONResponse(await run_in_threadpool(function, asked.get("data")))

    for address in (ADDRESS, f"{ADDRESS}/"):
        app.add_api_route(address, answer, methods=["POST"], include_in_schema=False)


def _asked(body: bytes) -> dict[str, Any]:
    if len(body) > LONGEST:
        raise ApiError(413, f"The question is longer than {LONGEST // MEGABYTE} MB; ask less at once.")
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError):
        raise ApiError(400, "The question cannot be read as JSON; reload the page.") from None
    if not isinstance(asked, dict):
        raise ApiError(400, "The question is no JSON object; reload the page.")
    return asked
