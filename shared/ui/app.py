"""The page: built once per process, served by shared/server, a client of the engine like any other."""

from __future__ import annotations

import gradio as gr

from shared.engine.engine import Engine
from shared.errors import UserError
from shared.ui.api import add_generate
from shared.ui.create.tab import Generate
from shared.ui.gallery.tab import Gallery
from shared.ui.models.tab import Models
from shared.ui.settings.tab import Preferences, header_area

HEADER = '<header class="zgp-header"><h1>ZGP</h1><p>Z-Image for the GPU poor</p>%s</header>'
LOGOUT = '<form method="post" action="logout"><button class="zgp-button">Log out</button></form>'
HOUR, DAY = 3600, 24 * 3600  # seconds


def build(engine: Engine, login: bool = False) -> gr.Blocks:
    """The whole page; UserError when there is no model to choose. login: whether one can log out."""
    if not engine.catalog.models:
        folder = engine.config.root / "defaults"
        raise UserError(f"There is no usable model card in {folder}: restore that folder.")
    with gr.Blocks(title="ZGP", analytics_enabled=False, fill_width=True, delete_cache=(HOUR, DAY)) as page:
        header = header_area(HEADER % (LOGOUT if login else ""))
        with gr.Tabs(selected="create", elem_id="tabs") as tabs:
            with gr.Tab("Create", id="create"):
                create = Generate(engine, page)
            with gr.Tab("Gallery", id="gallery"):
                Gallery(engine, page, tabs, create)
            Models(engine, page, tabs, create)
            Preferences(engine, page, tabs, create, header)
        add_generate(engine)
    return page
