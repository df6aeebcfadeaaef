"""The group "LoRAs" of the form: which files act on the picture, how strongly, and the folder they lie in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from shared.engine.engine import Engine
from shared.errors import UserError
from shared.gallery.thumbnails import preview_copy
from shared.library.model_info import ModelInfo
from shared.loras.library import Library, address
from shared.loras.strengths import parse
from shared.ui import static_files
from shared.ui.components.errors import QUIET, shows_errors
from shared.ui.components.text import plural
from shared.ui.components.viewer import THUMBNAILS, file_url
from shared.ui.create.lora_list import chosen_html, list_html, look_up

Updates = dict[Any, Any]

EDIT = static_files.read("lora_edit.js")

# 'edit' changes the list or a strength, 'word' takes a trigger word; what exactly stands in window.zgpLora.
_CLICKS = """element.addEventListener('click', (event) => {
  const button = event.target.closest('button');
  if (!button) return;
  const {act, entry, index, value, word} = button.dataset;
  window.zgpLora = {act, entry, index: Number(index), value, word};
  trigger(word === undefined ? 'edit' : 'word');
});
element.addEventListener('input', (event) => {
  const {value, dataset, parentElement} = event.target;
  if (dataset.index === undefined || value === '' || !isFinite(value)) return;
  for (const input of parentElement.querySelectorAll('input')) {
    if (input !== event.target) input.value = value;
    input.setAttribute('value', String(Number(value)));
    if (input.type === 'range') {
      parentElement.style.setProperty('--zgp-part', (input.value - input.min) / (input.max - input.min));
    }
  }
  window.zgpLora = {act: 'set', index: Number(dataset.index), value: String(Number(value))};
  trigger('edit');
});"""
_ADD_WORD = """(prompt) => {
  const word = window.zgpLora.word;
  if (prompt.toLowerCase().includes(word.toLowerCase())) return prompt;
  return prompt.trim() ? prompt.replace(/[\\s,]+$/, '') + ', ' + word : word;
}"""

GRAMMAR = """<p>One number for each LoRA in their order, with blanks between; missing ones are 1.</p>
<p><code>1,0.5,0</code> is a schedule: its numbers are spread evenly over the steps. <code>#</code> begins a
comment. One <code>|</code> parts an accelerator's numbers, before it, from your own.</p>"""

ADDRESSES = """<p class="zgp-lora-line">The file of an address is fetched with the next picture, into a
subfolder if one follows: <code>https://…/file.safetensors|styles</code></p>"""


class Loras:
    """Lays the group out; `add` makes the control of a setting where it is called."""

    def __init__(self, engine: Engine, model: ModelInfo, add: Callable[[str], Any]):
        self._engine = engine
        self.chosen = add("activated_loras")
        with gr.Accordion(_title([]), open=False, visible=takes_loras(model), elem_id="loras") as self.group:
            self.rows = _html("lora-rows", _CLICKS)
            self.as_text = gr.Checkbox(
                False, label="Strengths as text", elem_id="lora-as-text", container=False
            )
            self.text = add("loras_multipliers")
            self.grammar = gr.HTML(GRAMMAR, elem_id="lora-grammar", apply_default_css=False)
            self.problem = _html("lora-problem")
            with gr.Row(elem_id="lora-find"):
                self.search = gr.Textbox(
                    label="Find", placeholder="Find a LoRA", scale=1, show_label=False, max_lines=1,
                    min_width=0, elem_id="lora-search",
                )  # fmt: skip
                self.refresh = gr.Button("Refresh", size="sm", min_width=0, scale=0, elem_id="lora-refresh")
            self.files = _html("lora-files", _CLICKS)
            with gr.Row(elem_id="lora-fetch"):
                self.address = gr.Textbox(
                    label="Address", placeholder="https://…/file.safetensors", scale=1,
                    show_label=False, max_lines=1, min_width=0, elem_id="lora-address",
                )  # fmt: skip
                self.add = gr.Button("Add", size="sm", min_width=0, scale=0, elem_id="lora-add")
            gr.HTML(ADDRESSES, elem_id="lora-addresses", apply_default_css=False)
            add("loras_optional")

    @property
    def outputs(self) -> list[Any]:
        """What `suit` may update."""
        return [self.group]

    def suit(self, model: ModelInfo) -> Updates:
        """Show the group where the model takes LoRAs."""
        return {self.group: gr.update(visible=takes_loras(model))}

    def wire(self, model_type: Any, prompt: Any) -> None:
        """Connect the group. prompt: takes the trigger words."""
        chosen, text = self.chosen, self.text
        for area in (self.rows, self.files):
            area.edit(None, [chosen, text], [chosen, text], js=EDIT)
        self.rows.word(None, prompt, prompt, js=_ADD_WORD)
        last = {"trigger_mode": "always_last", **QUIET}
        gr.on(
            [chosen.change, text.change, model_type.change, self.group.expand, self.refresh.click],
            self.draw, [model_type, chosen, text], [self.group, self.rows, self.problem], **last,
        )  # fmt: skip
        gr.on(
            [chosen.change, model_type.change, self.search.change, self.group.expand, self.refresh.click],
            self.find, [model_type, chosen, self.search], self.files, **last,
        )  # fmt: skip
        gr.on(
            [self.add.click, self.address.submit], self.add_address, [model_type, chosen, self.address],
            [chosen, self.address], **QUIET,
        )  # fmt: skip

    # -- what the group shows -----------------------------------------------------------------------------

    def draw(self, model_id: str, loras: Sequence[str], text: str | None) -> Updates:
        """The chosen LoRAs, what is wrong with their strengths, and their number in the group's title."""
        library = self._library(model_id)
        if library is None:
            return {self.rows: "", self.problem: ""}
        chosen = look_up(library, loras, library.entries())
        return {
            self.group: gr.update(label=_title(loras)),
            self.rows: chosen_html(chosen, text or "", self._picture),
            self.problem: problem_html(text or "", len(loras)),
        }

    def find(self, model_id: str, loras: Sequence[str], search: str | None) -> str:
        """The files of the folder as they are now."""
        library = self._library(model_id)
        if library is None:
            return ""
        return list_html(library, library.entries(), loras, search or "", self._picture)

    @shows_errors
    def add_address(self, model_id: str, loras: Sequence[str], entry: str | None) -> Updates:
        """Choose a LoRA by its address; its file comes with the next picture."""
        if not isinstance(loras, list) or not all(isinstance(one, str) for one in loras):
            raise UserError("The chosen LoRAs did not arrive whole: reload the page.")
        entry = (entry or "").strip()
        if not address(entry).url:
            raise UserError(
                f"'{entry}' is no address: expected https://…/file.safetensors. Files of the folder are "
                "chosen in the list above."
            )
        self._engine.loras(model_id).path(entry)  # says when it leads out of the folder
        return {self.chosen: loras if entry in loras else [*loras, entry], self.address: ""}

    def _library(self, model_id: str) -> Library | None:
        return self._engine.loras(model_id) if takes_loras(self._engine.catalog.model(model_id)) else None

    def _picture(self, preview: Path) -> str:
        """The page serves no file of the LoRA folder, only copies in the folder of its thumbnails."""
        copy = preview_copy(preview, self._engine.config.output_dir / THUMBNAILS / "loras")
        return file_url(copy) if copy else ""


def takes_loras(model: ModelInfo) -> bool:
    """Whether LoRAs act on the model."""
    return "activated_loras" in model.settings


def problem_html(text: str, count: int) -> str:
    """What is wrong with the text of strengths, or what of it does nothing; "" when all is well."""
    if not count:
        return ""  # strengths that wait for a LoRA do no harm
    try:
        surplus = parse(text, count).surplus
    except UserError as error:
        return f'<p class="zgp-problem" role="alert">{escape(str(error))}</p>'
    if not surplus:
        return ""
    return (
        f'<p class="zgp-lora-line" role="status">The strengths have {plural(surplus, "number")} more than '
        "there are LoRAs; what is left over does nothing.</p>"
    )


def _title(loras: Sequence[str]) -> str:
    return f"LoRAs ({len(loras)} chosen)" if loras else "LoRAs"


def _html(elem_id: str, js: str | None = None) -> Any:
    return gr.HTML("", js_on_load=js, elem_id=elem_id, apply_default_css=False)
