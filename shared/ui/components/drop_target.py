"""Dropping a file anywhere on the page as if it were dropped on the file field for its kind."""

from __future__ import annotations

import json
from collections.abc import Mapping
from html import escape

import gradio as gr

from shared.ui import static_files

_SCRIPT = static_files.read("dropping.js")
_SAID = "Drop it anywhere to use its settings"
_LORA = "A LoRA goes into a folder: copy the file into the loras folder of its model, then reload the page."
_MODEL = "A model goes into a folder: copy the file into ckpts, and name it in a model's card."
WORDS = {".safetensors": f"{_LORA} {_MODEL}", ".gguf": _MODEL}
OTHERS = (
    "Only pictures, workflows and settings as text (.json, .txt) and saved queues (.zip, .json) can be "
    "dropped here."
)


def drop_anywhere(fields: Mapping[str, str]) -> gr.HTML:
    """The target that is seen while a file is dragged over the page.

    fields: from the ending of a file's name to the elem_id of the gr.File that takes such files. Its event
    'refused' tells of a file for which there is none; `refusal` has the sentence.
    """
    known = escape(json.dumps(fields))
    target = f'<div class="zgp-drop-target" data-fields="{known}" hidden><p>{_SAID}</p></div>'
    return gr.HTML(target, js_on_load=_SCRIPT, elem_id="drop-anywhere", apply_default_css=False)


def refusal(event: gr.EventData) -> str:
    """Why a dropped file is not taken, and where it goes instead."""
    return WORDS.get(str(event.ending), OTHERS)
