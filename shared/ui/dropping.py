"""Dropping a file anywhere on the page as if it were dropped on one of its file fields."""

from __future__ import annotations

from html import escape
from pathlib import Path

import gradio as gr

_SCRIPT = Path(__file__).with_suffix(".js").read_text(encoding="utf-8")
_SAID = "Drop it anywhere to use its settings"


def drop_anywhere(field: str) -> gr.HTML:
    """The target that is seen while a file is dragged over the page. field: elem_id of a gr.File."""
    target = f'<div class="zgp-drop-target" data-field="{escape(field)}" hidden><p>{_SAID}</p></div>'
    return gr.HTML(target, js_on_load=_SCRIPT, elem_id="drop-anywhere", apply_default_css=False)
