"""Finished pictures: one batch on view with what made it, and the recent pictures below.

Both are HTML made from the store's records. A click sends the picture's number back; nothing else is kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

import gradio as gr

from shared.engine.engine import Engine
from shared.gallery.thumbnails import thumbnail
from shared.imaging import metadata
from shared.jobs.grid import axes_from
from shared.jobs.records import ImageRecord
from shared.library.catalog import Catalog
from shared.ui.components.text import grid_line, plural, settings_line

RECENT = 24
THUMBNAILS = ".thumbnails"

# 'pick' puts a picture on view, 'use' takes its settings, 'image' changes it, 'control' follows it, 'upscale'
# enlarges it, 'comfyui' makes a workflow of it, 'favour' a favourite or none, 'discard' moves it into the
# trash; all carry its number as `id`. 'all' shows all pictures.
_CLICKS = """element.addEventListener('click', (event) => {
  if (event.target.closest('[data-all]')) trigger('all');
  const button = event.target.closest('button[data-id]');
  if (!button) return;
  const acts = ['use', 'image', 'control', 'upscale', 'comfyui', 'favour', 'discard'];
  const act = acts.find((name) => name === button.dataset.act) || 'pick';
  trigger(act, {id: Number(button.dataset.id)});
});"""


def picture_area(elem_id: str) -> gr.HTML:
    """An empty component for `viewer_html` or `recent_html`, with the events of _CLICKS."""
    return gr.HTML("", js_on_load=_CLICKS, elem_id=elem_id, apply_default_css=False)


class Pictures:
    """Looks pictures up in the store and renders them."""

    def __init__(self, engine: Engine):
        self._engine = engine

    def newest(self) -> str:
        """The viewer with the newest batch; "" when there is none."""
        newest = self._engine.store.images(limit=1)
        return self.job(newest[0].job_id) if newest else ""

    def none_yet(self) -> bool:
        """Whether no picture was ever made."""
        return not self._engine.store.images(limit=1)

    def job(self, job_id: int) -> str:
        """The viewer with the pictures of a job."""
        records = self._present(self._engine.store.images(job_id))
        return viewer_html(records, records[0], self._engine.catalog) if records else ""

    def viewer(self, image_id: int) -> str:
        """The viewer with one picture among its batch; UserError when there is no such picture."""
        record = self._engine.store.image(image_id)
        batch = self._present(self._engine.store.images(record.job_id)) if record.job_id else [record]
        return viewer_html(batch, record, self._engine.catalog)

    def recent(self) -> str:
        """The newest pictures of all jobs as thumbnails; "" when there is none."""
        records = self._present(self._engine.store.images(limit=RECENT))
        if not records:
            return ""
        folder = self._engine.config.output_dir / THUMBNAILS
        tiles = "".join(_tile(record, thumbnail(Path(record.path), folder)) for record in records)
        return (
            f'<h2 class="zgp-heading">Recent <span>{plural(len(records), "picture")}</span>'
            '<button type="button" class="zgp-link" data-all>All pictures</button></h2>'
            f'<div class="zgp-grid">{tiles}</div>'
        )

    def _present(self, records: Sequence[ImageRecord]) -> list[ImageRecord]:
        """Those whose files still exist inside the folders that the page may serve."""
        roots = [folder.resolve() for folder in self._engine.config.picture_folders]
        return [record for record in records if _is_file_in(Path(record.path), roots)]


def viewer_html(batch: Sequence[ImageRecord], shown: ImageRecord, catalog: Catalog) -> str:
    """The shown picture large, its batch as a strip, its prompt, settings, notes and buttons."""
    prompt = escape(prompt_of(shown))
    url = file_url(Path(shown.path))
    return (
        '<figure class="zgp-viewer">'
        f'<a class="zgp-canvas" href="{url}" target="_blank" title="Open in full size">'
        f'<img src="{url}" alt="{prompt}" width="{shown.width}" height="{shown.height}"></a>'
        + _strip(batch, shown)
        + f'<figcaption><p class="zgp-prompt">{prompt}</p>'
        + f'<p class="zgp-line">{escape(line_of(shown, catalog))}</p>{notes_html(shown)}'
        + f"{actions_html(shown)}</figcaption></figure>"
    )


def prompt_of(record: ImageRecord) -> str:
    """What was asked for; "" when nobody knows."""
    return str(record.metadata.get("prompt", ""))


def line_of(record: ImageRecord, catalog: Catalog) -> str:
    """What made a picture, in one line."""
    settings = metadata.settings_from(record.metadata)
    name = model_name(settings, catalog)
    axes = axes_from(record.metadata)
    if axes:
        return grid_line(axes.values(), name, record.width, record.height)
    return settings_line(settings, name, record.seed, record.width, record.height)


def model_name(settings: Mapping[str, Any], catalog: Catalog) -> str:
    """The name of the settings' model; what they call it where that is no model of here."""
    model_id = str(settings.get("model_type", ""))
    return catalog.models[model_id].name if model_id in catalog.models else model_id


def notes_html(record: ImageRecord) -> str:
    """What was substituted or dropped when it was made."""
    made = record.metadata.get("zgp")
    notes = made.get("notes") if isinstance(made, dict) else None
    return "".join(
        f'<p class="zgp-note">{escape(str(note))}</p>' for note in (notes if isinstance(notes, list) else ())
    )


def actions_html(shown: ImageRecord, more: Sequence[tuple[str, str]] = ()) -> str:
    """What can be done with a picture. more: (act, what its button says) beyond what the viewer has."""
    name = escape(Path(shown.path).name)
    pressed = f' aria-pressed="{str(shown.favourite).lower()}"'
    buttons = "".join(
        f'<button type="button" class="zgp-button" data-act="{act}" data-id="{shown.id}"'
        f"{pressed if act == 'favour' else ''}>{said}</button>"
        for act, said in (*_ACTS, *more)
    )
    download = f'<a class="zgp-button" href="{file_url(Path(shown.path))}" download="{name}">Download</a>'
    return f'<p class="zgp-actions">{download}{buttons}</p>'


_ACTS = (
    ("use", "Use these settings"),
    ("upscale", "Upscale"),
    ("image", "Change this picture"),
    ("control", "Use as control"),
    ("comfyui", "ComfyUI workflow"),
    ("favour", "Favourite"),
    ("discard", "Delete"),
)


def file_url(path: Path) -> str:
    """Where Gradio serves the file, relative to the page."""
    return "gradio_api/file=" + quote(path.resolve().as_posix())


def _strip(batch: Sequence[ImageRecord], shown: ImageRecord) -> str:
    if len(batch) < 2:
        return ""
    tiles = "".join(_tile(record, Path(record.path), record.id == shown.id) for record in batch)
    return f'<div class="zgp-strip">{tiles}</div>'


def _tile(record: ImageRecord, file: Path, shown: bool = False) -> str:
    label = escape(f"Seed {record.seed}: {record.metadata.get('prompt', '')}")
    return (
        f'<button type="button" class="zgp-tile" data-id="{record.id}" aria-pressed="{str(shown).lower()}" '
        f'title="{label}"><img src="{file_url(file)}" alt="{label}" loading="lazy"></button>'
    )


def _is_file_in(path: Path, roots: Sequence[Path]) -> bool:
    return path.is_file() and any(path.resolve().is_relative_to(root) for root in roots)
