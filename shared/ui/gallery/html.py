"""The gallery's HTML. Texts come from prompts and files that anyone may have written: all are escaped."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from html import escape
from pathlib import Path
from typing import Any

from shared.gallery.collection import TRASH, Tile
from shared.imaging import metadata
from shared.jobs.records import ImageRecord
from shared.library.catalog import Catalog
from shared.settings.table import SETTINGS
from shared.ui.components.text import DOT
from shared.ui.components.viewer import actions_html, file_url, line_of, model_name, notes_html, prompt_of

MORE_ACTS = (("mask", "Use as mask"),)
SKIPPED = {"prompt", "model_type", "batch_size", "resolution", "seed"}  # shown elsewhere


def tile_html(tile: Tile, url: str) -> str:
    """One picture of the list. url: of its small copy; "" when the page has to ask for it."""
    label = escape(tile.prompt[:300] or tile.path.name)
    source = f'src="{url}"' if url else "data-wait"
    star = ' data-favourite="1"' if tile.favourite else ""
    shape = max(0.4, min(tile.width / max(tile.height, 1), 3))
    return (
        f'<div class="zgp-shot" role="option" tabindex="-1" aria-selected="false" data-id="{tile.id}"{star} '
        f'style="--zgp-shape: {shape:.3f}" title="{label}" aria-label="{label}">'
        f'<img {source} alt="" loading="lazy" draggable="false">'
        '<span class="zgp-tick" data-act="tick" aria-hidden="true"></span>'
        '<span class="zgp-star" aria-hidden="true">★</span></div>'
    )


def detail_html(record: ImageRecord, catalog: Catalog) -> str:
    """A picture large, its prompt, settings and buttons."""
    url, prompt = file_url(Path(record.path)), escape(prompt_of(record))
    copy = '<button type="button" class="zgp-button" data-act="copy">Copy</button>' if prompt else ""
    when = datetime.fromtimestamp(record.created).strftime("%Y-%m-%d %H:%M")
    special, usual = _lines(record, catalog)
    actions = actions_html(record, MORE_ACTS) if record.place != TRASH else _trash_actions(record)
    return (
        f'<div class="zgp-large"><a href="{url}" target="_blank" title="Open in full size">'
        f'<img src="{url}" alt="{prompt}" width="{record.width}" height="{record.height}"></a></div>'
        f'<div class="zgp-about"><div class="zgp-said"><p class="zgp-prompt">{prompt}</p>{copy}</div>'
        f'<p class="zgp-line">{escape(line_of(record, catalog))}</p>{notes_html(record)}{actions}'
        + _facts_html([("Made", when), ("File", Path(record.path).name), *special])
        + (f"<details><summary>As usual</summary>{_facts_html(usual)}</details>" if usual else "")
        + "</div>"
    )


def _facts_html(rows: Sequence[tuple[str, str]]) -> str:
    listed = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in rows)
    return f'<dl class="zgp-facts">{listed}</dl>'


def _trash_actions(record: ImageRecord) -> str:
    return (
        '<p class="zgp-actions"><button type="button" class="zgp-button" data-act="restore" '
        f'data-id="{record.id}">Bring it back</button></p>'
    )


def _lines(record: ImageRecord, catalog: Catalog) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """The settings in words, in the order of the form: those of this picture, and those that are as usual."""
    settings = metadata.settings_from(record.metadata)
    model = catalog.models.get(str(settings.get("model_type")))
    usual = {**{name: one.default for name, one in SETTINGS.items()}, **(model.defaults if model else {})}
    lines: tuple[list[tuple[str, str]], list[tuple[str, str]]] = ([], [])
    for name, setting in SETTINGS.items():
        if name not in SKIPPED and settings.get(name) not in (None, "", []):
            lines[settings[name] == usual[name]].append((setting.label, _value_text(settings[name])))
    return lines


def _value_text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def compare_html(left: ImageRecord, right: ImageRecord, catalog: Catalog) -> str:
    """Two pictures over each other with a slider, and a table of the settings that differ."""
    shape = max((left, right), key=lambda one: one.width * one.height)
    pictures = "".join(
        f'<img class="zgp-{side}" src="{file_url(Path(one.path))}" alt="{escape(prompt_of(one))}">'
        for side, one in (("right", right), ("left", left))
    )
    return (
        f'<div class="zgp-compare" style="--zgp-shape: {shape.width / shape.height:.4f}">{pictures}<i></i>'
        '<input type="range" min="0" max="100" step="0.5" value="50" '
        'aria-label="How much of the left picture is shown"></div>' + _differences_html(left, right, catalog)
    )


def _differences_html(left: ImageRecord, right: ImageRecord, catalog: Catalog) -> str:
    one, other = _facts(left, catalog), _facts(right, catalog)
    rows = [
        (name, one.get(name, "–"), other.get(name, "–"))
        for name in {**one, **other}
        if one.get(name) != other.get(name)
    ]
    if not rows:
        return '<p class="zgp-line">Their settings are the same.</p>'
    cells = "".join(
        f"<tr><th>{escape(name)}</th><td>{escape(was)}</td><td>{escape(became)}</td></tr>"
        for name, was, became in rows
    )
    return f'<table class="zgp-differences"><tr><th></th><th>Left</th><th>Right</th></tr>{cells}</table>'


def _facts(record: ImageRecord, catalog: Catalog) -> dict[str, str]:
    special, usual = _lines(record, catalog)
    facts = {
        "Model": model_name(record.metadata, catalog),
        "Prompt": prompt_of(record),
        "Size": f"{record.width} × {record.height}",
        "Seed": str(record.seed),
        **dict([*special, *usual]),
    }
    return {name: value for name, value in facts.items() if value}


ANY = {"model": "Any model", "lora": "Any LoRA", "size": "Any size"}


def options_html(anything: str, options: Sequence[tuple[str, str, int]]) -> str:
    listed = "".join(
        f'<option value="{escape(value)}">{escape(label)}{DOT}{count}</option>'
        for label, value, count in options
    )
    return f'<option value="">{escape(anything)}</option>{listed}'
