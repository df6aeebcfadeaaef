"""The form for a model of the user's own: a file in the folders of models becomes a card, or a card
changes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from shared.engine import custom_models
from shared.engine.engine import Engine
from shared.errors import UserError
from shared.library.model_info import ModelInfo
from shared.ui.components.errors import QUIET, shows_errors
from shared.ui.components.text import plural
from shared.ui.create.form import Updates

ADD = "Add a model from a file"
NO_FILES = (
    "There is no checkpoint file in the folders of models. Put a .safetensors file into {folder}, then open "
    "this again."
)


class OwnModels:
    """Lays the form out; `wire` connects it."""

    def __init__(self, engine: Engine):
        self._engine = engine
        self.editing = gr.State("")  # the id of the card that is changed; "" while one is added
        with gr.Accordion(ADD, open=False, elem_id="own-model") as self.area:
            self.file = gr.Dropdown(
                [], label="File", info="safetensors files in the folders of models", elem_id="own-file"
            )
            self.verdict = gr.HTML("", elem_id="own-verdict", apply_default_css=False)
            with gr.Column(visible=False) as self.details:
                self.like = gr.Dropdown(
                    [], label="Works like", elem_id="own-like",
                    info="The file does not say it. Its parts, steps and guidance are taken from this model.",
                )  # fmt: skip
                self.name = gr.Textbox(label="Name", max_lines=1, elem_id="own-name")
                self.description = gr.Textbox(label="Description", lines=2, elem_id="own-description")
                with gr.Row():
                    self.steps = gr.Number(label="Steps", precision=0, elem_id="own-steps")
                    self.guidance = gr.Number(label="Guidance", elem_id="own-guidance")
                with gr.Row():
                    self.save = gr.Button("Add", variant="primary", elem_id="own-save")
                    self.close = gr.Button("Close", elem_id="own-close")

    @property
    def outputs(self) -> list[Any]:
        """What `edit` may update."""
        return [self.area, self.editing, self.file, self.verdict, self.details, *self._fields]

    @property
    def _fields(self) -> list[Any]:
        return [self.like, self.name, self.description, self.steps, self.guidance, self.save]

    def wire(self, saved: Callable[[str], Updates], outputs: Sequence[Any]) -> None:
        """saved: what the page does after a card was written; it updates `outputs`."""
        self.area.expand(self.list_files, self.file, [self.file, self.verdict], **QUIET)
        self.file.input(self.look, self.file, self.outputs, trigger_mode="always_last", **QUIET)
        self.like.input(self.follow_base, self.like, [self.steps, self.guidance], **QUIET)
        self.close.click(self.closed, None, self.outputs, **QUIET)

        @shows_errors
        def write(*values: Any) -> Updates:
            return {**saved(self._write(*values)), **self.closed()}

        inputs = [self.editing, self.file, *self._fields[:-1]]
        self.save.click(write, inputs, [*self.outputs, *outputs], **QUIET)

    # -- what the user does -------------------------------------------------------------------------------

    def list_files(self, chosen: str | None) -> Updates:
        """The files as they are now."""
        files = list(custom_models.found_files(self._engine))
        if files:
            return {self.file: gr.update(choices=files, value=chosen if chosen in files else None)}
        said = NO_FILES.format(folder=self._engine.config.ckpts)
        return {self.file: gr.update(choices=[]), self.verdict: f'<p class="zgp-line">{escape(said)}</p>'}

    def look(self, called: str | None) -> Updates:
        """What the chosen file is, and the fields for its card."""
        if not called:
            return self.closed()
        try:
            found = custom_models.recognise(self._engine, custom_models.find_file(self._engine, called))
        except UserError as error:
            said = f'<p class="zgp-problem" role="alert">{escape(str(error))}</p>'
            return {**self.closed(), self.file: called, self.verdict: said, self.area: gr.update(open=True)}
        base, models = found.like[0], plural(len(found.like), "model")
        said = f"This is {found.kind} in {found.label}; it fits {models} of this program."
        return {
            self.editing: "",
            self.verdict: f'<p class="zgp-line">{escape(said)}</p>',
            self.details: gr.update(visible=True),
            self.like: gr.update(
                choices=[(one.name, one.id) for one in found.like], value=base.id, visible=True
            ),
            self.name: gr.update(value=Path(called).stem),
            self.description: "",
            self.save: "Add",
            **self._defaults(base),
        }

    def follow_base(self, model_id: str) -> Updates:
        """The steps and the guidance of the model that the file works like."""
        return self._defaults(self._engine.catalog.model(model_id))

    def edit(self, card_id: str) -> Updates:
        """Show the user's own card to change it."""
        info = self._engine.catalog.model(card_id)
        return {
            self.area: gr.update(label=f"Edit {info.name}", open=True),
            self.editing: card_id,
            self.file: gr.update(visible=False),
            self.verdict: "",
            self.details: gr.update(visible=True),
            self.like: gr.update(visible=False),
            self.name: info.name,
            self.description: info.description,
            self.save: "Save",
            **self._defaults(info),
        }

    def closed(self) -> Updates:
        """The form for the next file."""
        return {
            self.area: gr.update(label=ADD, open=False),
            self.editing: "",
            self.file: gr.update(value=None, visible=True),
            self.verdict: "",
            self.details: gr.update(visible=False),
        }

    def _write(
        self,
        editing: str,
        called: str | None,
        like: str | None,
        name: str | None,
        description: str | None,
        steps: float | None,
        guidance: float | None,
    ) -> str:
        """Write the card and say so."""
        defaults = {
            "num_inference_steps": None if steps is None else int(steps),
            "guidance_scale": guidance,
        }
        if editing:
            custom_models.change(self._engine, editing, name or "", description or "", defaults)
            return "The model was changed."
        texts = (called or "", like or "", name or "", description or "")
        info = custom_models.add(self._engine, *texts, defaults)
        return f"{info.name} is in the list now."

    def _defaults(self, info: ModelInfo) -> Updates:
        guided = "guidance_scale" in info.settings
        value = info.defaults.get("guidance_scale") if guided else None
        return {
            self.steps: info.defaults.get("num_inference_steps"),
            self.guidance: gr.update(value=value, visible=guided),
        }
