"""The page: built once per process, served by Gradio, a client of the engine like any other."""

from __future__ import annotations

import time

import gradio as gr

from shared.engine.engine import Engine
from shared.errors import UserError
from shared.ui.api import add_generate
from shared.ui.gallery import Gallery
from shared.ui.generate import Generate
from shared.ui.theme import look

HEADER = '<header class="zgp-header"><h1>ZGP</h1><p>Z-Image for the GPU poor</p></header>'


def build(engine: Engine) -> gr.Blocks:
    """The whole page; UserError when there is no model to choose."""
    if not engine.catalog.models:
        folder = engine.config.root / "defaults"
        raise UserError(f"There is no usable model card in {folder}: restore that folder.")
    with gr.Blocks(title="ZGP", analytics_enabled=False, fill_width=True) as page:
        gr.HTML(HEADER, elem_id="header")
        with gr.Tabs(selected="create", elem_id="tabs") as tabs:
            with gr.Tab("Create", id="create"):
                create = Generate(engine, page)
            with gr.Tab("Gallery", id="gallery"):
                Gallery(engine, page, tabs, create)
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
            allowed_paths=[str(outputs)],
            # the queue and the log are nobody's download
            blocked_paths=[str(engine.config.database.resolve().parent)],
            prevent_thread_lock=True,
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
