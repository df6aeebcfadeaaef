"""What is done with the pictures of the tab Create: viewed, kept as favourites, deleted and brought back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gradio as gr

from shared.engine.comfyui import comfyui_workflow, settings_of
from shared.engine.engine import Engine
from shared.gallery.archive import DOWNLOAD, keep
from shared.gallery.collection import Collection
from shared.ui.api import uploads
from shared.ui.components.errors import QUIET, shows_errors
from shared.ui.components.notice import notice_html
from shared.ui.components.viewer import Pictures

Updates = dict[Any, Any]


def workflow_of(engine: Engine, image_id: int) -> tuple[Path, list[str]]:
    """A picture as a workflow of ComfyUI, in a file, and what differs there. UserError when it cannot be."""
    record = engine.store.image(image_id)
    made = comfyui_workflow(settings_of(record, engine.catalog), engine.catalog)
    name = f"{Path(record.path).stem}.comfyui.json"
    file = keep(json.dumps(made.nodes, indent=2, ensure_ascii=False), name, uploads() / "workflows")
    return file, [f"{name} is a workflow for ComfyUI.", *made.lines]


class PictureActs:
    """Connects the picture on view and the recent ones (`pictures.picture_area`) with the collection."""

    def __init__(self, engine: Engine, pictures: Pictures, viewer: Any, recent: Any, notice: Any):
        self._engine, self._pictures = engine, pictures
        self._collection = Collection(engine.store, *engine.config.picture_folders)
        self.viewer, self.recent, self.notice = viewer, recent, notice
        for area in (viewer, recent):
            area.pick(self.pick, None, viewer, **QUIET)
        self.workflow = gr.File(visible=False)
        viewer.comfyui(self.comfyui, None, [self.workflow, notice], **QUIET).then(
            None, self.workflow, None, js=DOWNLOAD
        )
        viewer.favour(self.favour, None, viewer, **QUIET)
        viewer.discard(self.discard, None, [viewer, recent, notice], **QUIET)
        notice.undo(self.restore, None, [viewer, recent], **QUIET)

    @shows_errors
    def pick(self, event: gr.EventData) -> str:
        """Put a picture on view, with its batch."""
        return self._pictures.viewer(int(event.id))

    @shows_errors
    def favour(self, event: gr.EventData) -> str:
        """Make the picture on view a favourite, or none."""
        record = self._engine.store.image(int(event.id))
        self._collection.favour([record.id], not record.favourite)
        return self._pictures.viewer(record.id)

    @shows_errors
    def comfyui(self, event: gr.EventData) -> Updates:
        """The picture on view as a workflow of ComfyUI, and what it lacks."""
        file, lines = workflow_of(self._engine, int(event.id))
        return {self.workflow: str(file), self.notice: notice_html(lines)}

    @shows_errors
    def discard(self, event: gr.EventData) -> Updates:
        """Move the picture on view into the trash, and show another one of its batch, or the newest."""
        record = self._engine.store.image(int(event.id))
        moved = self._collection.discard([record.id])
        notice = notice_html(moved.problems or ["Deleted: it lies in the gallery's trash."], undo=moved.ids)
        shown = self._pictures.job(record.job_id) or self._pictures.newest()
        return {self.viewer: shown, self.recent: self._pictures.recent(), self.notice: notice}

    @shows_errors
    def restore(self, event: gr.EventData) -> Updates:
        """Take pictures out of the trash again."""
        ids = [int(one) for one in event.ids]
        self._collection.restore(ids)
        return {self.viewer: self._pictures.viewer(ids[0]), self.recent: self._pictures.recent()}
