"""A strip above the pictures that stays until it is closed: why a job failed, what a picture brought."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import gradio as gr

# 'undo' takes back what the strip tells of; it carries the pictures' numbers as `ids`.
_CLOSE = """element.addEventListener('click', (event) => {
  const undone = event.target.closest('[data-undo]');
  if (undone) trigger('undo', {ids: undone.dataset.undo.split(',').map(Number)});
  if (undone || event.target.closest('.zgp-close')) props.value = '';
});"""


def notice_area(elem_id: str = "notice") -> gr.HTML:
    """The component; its value comes from `notice_html`, "" hides it."""
    return gr.HTML("", js_on_load=_CLOSE, elem_id=elem_id, apply_default_css=False)


def notice_html(lines: Sequence[str], kind: str = "info", undo: Sequence[int] = ()) -> str:
    """One strip. kind: "info" or "error". undo: the deleted pictures that a button brings back."""
    role = "alert" if kind == "error" else "status"
    paragraphs = "".join(f"<p>{escape(line)}</p>" for line in lines)
    return (
        f'<div class="zgp-notice zgp-{kind}" role="{role}"><div>{paragraphs}</div>{_undo_button(undo)}'
        '<button type="button" class="zgp-close" aria-label="Close">×</button></div>'
    )


def _undo_button(ids: Sequence[int]) -> str:
    numbers = ",".join(map(str, ids))
    return f'<button type="button" class="zgp-button" data-undo="{numbers}">Undo</button>' if ids else ""
