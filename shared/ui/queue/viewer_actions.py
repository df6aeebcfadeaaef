"""What is done with the pictures of the tab Create: viewed, kept as favourites, deleted and brought back."""

from __future__ import annotations

from typing import Any

import gradio as gr

from shared.engine.engine import Engine
from shared.gallery.collection import Collection
from shared.ui.components.errors import QUIET, shows_errors
from shared.ui.components.notice import notice_html
from shared.ui.components.viewer import Pictures

Updates = dict[Any, Any]


class PictureActs:
    """Connects the picture on view and the recent ones (`pictures.picture_area`) with the collection."""

    def __init__(self, engine: Engine, pictures: Pictures, viewer: Any, recent: Any, notice: Any):
        self._engine, self._pictures = engine, pictures
        self._collection = Collection(engine.store, *engine.config.picture_folders)
        self.viewer, self.recent, self.notice = viewer, recent, notice
        for area in (viewer, recent):
            area.pick(self.pick, None, viewer, **QUIET)
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
