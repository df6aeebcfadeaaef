"""The page: built once per process, served by Gradio, a client of the engine like any other."""

from __future__ import annotations

import time

import gradio as gr

from shared.engine.engine import Engine
from shared.errors import UserError
from shared.ui.api import add_generate
from shared.ui.gallery import Gallery
from shared.ui.generate import Generate
from shared.ui.models import Models
from shared.ui.preferences import Preferences, header_area
from shared.ui.theme import look

#: every open tab follows the queue and every waiting call of the API waits in one of these
MANY = 1000
HEADER = '<header class="zgp-header"><h1>ZGP</h1><p>Z-Image for the GPU poor</p></header>'


def build(engine: Engine) -> gr.Blocks:
    """The whole page; UserError when there is no model to choose."""
    if not engine.catalog.models:
        folder = engine.config.root / "defaults"
        raise UserError(f"There is no usable model card in {folder}: restore that folder.")
    with gr.Blocks(title="ZGP", analytics_enabled=False, fill_width=True) as page:
        header = header_area(HEADER)
        with gr.Tabs(selected="create", elem_id="tabs") as tabs:
            with gr.Tab("Create", id="create"):
                create = Generate(engine, page)
            with gr.Tab("Gallery", id="gallery"):
                Gallery(engine, page, tabs, create)
            Models(engine, page, tabs, create)
            Preferences(engine, page, tabs, create, header)
        add_generate(engine)
    return page


def launch(
    engine: Engine,
    *,
    host: str = "127.0.0.1",
    port: int = 7860,
    share: bool = False,
    open_browser: bool = False,
    theme: str = "",
) -> None:
    """Serve the page until the process is told to stop. UserError when the port is taken."""
    page = build(engine)
    outputs = engine.config.output_dir.resolve()
    outputs.mkdir(parents=True, exist_ok=True)
    try:
        page.queue(default_concurrency_limit=None).launch(
            server_name=host,
            server_port=port,
            share=share,
            inbrowser=open_browser,
            # pictures that were made before the folder was changed lie beside the queue
            allowed_paths=[str(outputs), str(engine.config.database.resolve().parents[1])],
            # the queue and the log are nobody's download
            blocked_paths=[str(engine.config.database.resolve().parent)],
            prevent_thread_lock=True,
            max_threads=MANY,
            quiet=True,
            **look(theme),
        )
    except OSError as error:
        raise UserError(
            f"Port {port} on {host} cannot be used ({error.strerror or 'it is taken'}): "
            "close the other program or choose another port with --server-port."
        ) from error
    print(f"ZGP is at {page.share_url or page.local_url}", flush=True)
    try:
        while True:  # not an endless wait() on a lock: Ctrl-C would not end that on Windows
            time.sleep(3600)
    finally:
        page.close(verbose=False)
