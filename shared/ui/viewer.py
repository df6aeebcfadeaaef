"""Finished pictures: a large view of one batch with what made it, and the recent pictures below."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

import gradio as gr

from shared.engine.engine import Engine
from shared.engine.records import ImageRecord
from shared.imaging import metadata
from shared.ui.text import plural, settings_line
from shared.ui.thumbnails import thumbnail

Updates = dict[Any, Any]

RECENT = 24


class Viewer:
    """The pictures of one job, one of them selected. Holds ids only: the store has the rest."""

    def __init__(self, engine: Engine):
        self._engine = engine
        self.ids = gr.State([])
        self.selected = gr.State(None)
        with gr.Column(visible=False, elem_id="viewer") as self.column:
            self.gallery = gr.Gallery(
                show_label=False, container=False, preview=True, selected_index=0, columns=4, object_fit="contain",
                buttons=["fullscreen"], interactive=False, elem_id="pictures",
            )  # fmt: skip
            self.details = gr.HTML("", elem_id="details")
            self.use = gr.Button("Use these settings", size="sm", elem_id="use-settings")
        self.gallery.select(
            self._select, self.ids, [self.selected, self.details], api_visibility="private", show_progress="hidden"
        )

    @property
    def outputs(self) -> list[Any]:
        return [self.column, self.gallery, self.details, self.ids, self.selected]

    def show(self, records: Sequence[ImageRecord], index: int = 0) -> Updates:
        """Put these pictures on view with one of them selected; an empty list hides the viewer."""
        records = present(records, self._engine.config.output_dir)
        if not records:
            return {self.column: gr.update(visible=False)}
        index = min(index, len(records) - 1)
        return {
            self.column: gr.update(visible=True),
            self.gallery: gr.update(value=[(record.path, _caption(record)) for record in records], selected_index=index),
            self.details: self.details_html(records[index]),
            self.ids: [record.id for record in records],
            self.selected: records[index].id,
        }

    def hide(self) -> Updates:
        return {self.column: gr.update(visible=False)}

    def details_html(self, record: ImageRecord) -> str:
        """Prompt, settings, notes and the download of one picture."""
        settings = metadata.settings_from(record.metadata)
        model = self._engine.catalog.models.get(settings.get("model_type", ""))
        name = model.name if model else str(settings.get("model_type", ""))
        line = settings_line(settings, name, record.seed, record.width, record.height)
        notes = "".join(f"<li>{escape(str(note))}</li>" for note in record.metadata.get("zgp", {}).get("notes", []))
        path = Path(record.path)
        return (
            f'<div class="zgp-details"><p class="zgp-prompt">{escape(str(settings.get("prompt", "")))}</p>'
            f'<p class="zgp-line">{escape(line)}</p>'
            + (f'<ul class="zgp-notes">{notes}</ul>' if notes else "")
            + f'<a class="zgp-download" href="{file_url(path)}" download="{escape(path.name)}">Download</a></div>'
        )

    def _select(self, ids: list[int], event: gr.SelectData) -> tuple[int, str]:
        record = self._engine.store.image(ids[event.index])
        return record.id, self.details_html(record)


class Recent:
    """Thumbnails of the newest pictures of all jobs; they come from the store, so a reload keeps them."""

    def __init__(self, engine: Engine):
        self._engine = engine
        self.ids = gr.State([])
        with gr.Column(visible=False, elem_id="recent-area") as self.column:
            self.heading = gr.HTML("")
            self.gallery = gr.Gallery(
                show_label=False, container=False, allow_preview=False, columns=6, object_fit="cover", height="auto",
                buttons=[], interactive=False, elem_id="recent",
            )  # fmt: skip

    @property
    def outputs(self) -> list[Any]:
        return [self.column, self.heading, self.gallery, self.ids]

    def show(self) -> Updates:
        folder = self._engine.config.output_dir
        records = present(self._engine.store.images(limit=RECENT), folder)
        thumbnails = folder / ".thumbnails"
        return {
            self.column: gr.update(visible=bool(records)),
            self.heading: f'<h2 class="zgp-heading">Recent <span>{plural(len(records), "picture")}</span></h2>',
            self.gallery: [str(thumbnail(Path(record.path), thumbnails)) for record in records],
            self.ids: [record.id for record in records],
        }

    def picked(self, ids: list[int], index: int) -> tuple[list[ImageRecord], int]:
        """The whole batch of the picture that was clicked, and its place in it."""
        record = self._engine.store.image(ids[index])
        batch = present(self._engine.store.images(record.job_id), self._engine.config.output_dir)
        return batch, next((place for place, other in enumerate(batch) if other.id == record.id), 0)


def present(records: Sequence[ImageRecord], folder: Path) -> list[ImageRecord]:
    """Those whose files still exist inside the folder that the page may serve."""
    root = folder.resolve()
    return [record for record in records if _servable(Path(record.path), root)]


def file_url(path: Path) -> str:
    """Where Gradio serves the file, relative to the page."""
    return "gradio_api/file=" + quote(path.resolve().as_posix())


def _servable(path: Path, root: Path) -> bool:
    return path.is_file() and path.resolve().is_relative_to(root)


def _caption(record: ImageRecord) -> str:
    return f"Seed {record.seed}"
