"""Enlarging: the group of the form for new pictures, and the panel for a finished one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gradio as gr

from shared.engine.engine import Engine
from shared.imaging import metadata
from shared.jobs.upscale_job import upscale_settings
from shared.library.model_info import ModelInfo
from shared.settings.table import SETTINGS
from shared.ui.api import uploads
from shared.ui.components.errors import QUIET, shows_errors
from shared.ui.components.tab_name import WITH_TAB
from shared.ui.create.controls import control

Updates = dict[Any, Any]

HIRES = tuple(name for name, setting in SETTINGS.items() if setting.group == "hires")
FROM_PICTURE = ("hires_scale", "hires_upscaler", "hires_denoising_strength", "hires_tile")
USUAL = {"hires_scale": 2.0, "hires_denoising_strength": 0.0}  # of the panel


def upscaler_names(model: ModelInfo) -> list[str]:
    """What a picture can be enlarged by, as the setting names it."""
    return [*SETTINGS["hires_upscaler"].choices, *model.capabilities.get("upscalers", [])]


class Enlarging:
    """The form's group; `add(model, name)` makes the control of a setting where it is called."""

    def __init__(self, model: ModelInfo, add: Callable[..., Any]):
        acts = HIRES[0] in model.settings
        with gr.Accordion("Enlarge", open=False, visible=acts, elem_id="enlarge-group") as self.group:
            self.scale = self._add(model, add, "hires_scale")
            with gr.Column(visible=model.defaults.get("hires_scale", 1) > 1) as self.details:
                for name in HIRES[1:]:
                    self._add(model, add, name)
        self.scale.change(
            lambda scale: gr.update(visible=(scale or 1) > 1), self.scale, self.details, **QUIET
        )

    @property
    def outputs(self) -> list[Any]:
        """What `suit` may update."""
        return [self.group]

    def suit(self, model: ModelInfo, settings: Mapping[str, Any]) -> Updates:
        """Show the group where it acts."""
        return {self.group: gr.update(visible=HIRES[0] in model.settings)}

    def present(self, model: ModelInfo, settings: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """The settings with an upscaler that is here, and a line where it is not the one that they name."""
        name, scale = settings.get("hires_upscaler"), settings.get("hires_scale", 1)
        if name is None or name in upscaler_names(model):
            return dict(settings), []
        usual = SETTINGS["hires_upscaler"].default
        lines = [f"Its upscaler {name} is not here: {usual} takes its place."] if scale != 1 else []
        return {**settings, "hires_upscaler": usual}, lines

    @staticmethod
    def _add(model: ModelInfo, add: Callable[..., Any], name: str) -> Any:
        more = {"choices": upscaler_names(model)} if name == "hires_upscaler" else {}
        return add(model, name, info=SETTINGS[name].help, **more)


class Upscale:
    """A panel that enlarges a finished picture as a job of its own; closed until `open`."""

    def __init__(self, engine: Engine):
        self._engine = engine
        model = engine.catalog.model(engine.catalog.default_model)
        self.picture = gr.State(None)  # its number
        with gr.Column(visible=False, elem_id="upscale") as self.panel:
            self.about = gr.HTML("", elem_id="upscale-about", apply_default_css=False)
            self.model = gr.Dropdown(
                [], label="Model that paints the new detail", filterable=False, elem_id="upscale-model"
            )
            self.prompt = gr.Textbox(label="Prompt", lines=2, max_lines=4, elem_id="upscale-prompt")
            self.values = [self._control(model, name) for name in FROM_PICTURE]
            with gr.Row():
                self.go = gr.Button("Upscale", variant="primary", size="sm", elem_id="upscale-go")
                self.close = gr.Button("Close", size="sm", elem_id="upscale-close")

    @staticmethod
    def _control(model: ModelInfo, name: str) -> Any:
        setting = SETTINGS[name]
        more = {"choices": upscaler_names(model)} if name == "hires_upscaler" else {}
        component = control(setting, value=USUAL.get(name, setting.default), info=setting.help, **more)
        component.elem_id = f"upscale-{name}"  # the form has the other one
        return component

    def opens_from(self, area: Any) -> None:
        """Let the button of `area` (`pictures.picture_area`) open the panel."""
        shown = [self.picture, self.panel, self.about, self.model, self.prompt]
        area.upscale(self.open, None, shown, **QUIET)

    def wire(self, tab: Any, submitted: Any, notice: Any) -> None:
        """tab: holds the tab's name. submitted: the state that a new job's number goes to. notice: what a new
        job clears.
        """
        given = [tab, self.picture, self.model, self.prompt, *self.values]
        self.go.click(self.submit, given, [submitted, notice, self.panel], js=WITH_TAB, **QUIET)
        self.close.click(lambda: gr.update(visible=False), None, self.panel, **QUIET)

    @shows_errors
    def open(self, event: gr.EventData) -> Updates:
        """Show the panel for a picture, with the model that it was made with."""
        record = self._engine.store.image(int(event.id))
        models = [one for one in self._engine.catalog.models.values() if HIRES[0] in one.settings]
        own = metadata.settings_from(record.metadata)
        models = [model for model in models if model.available] or models
        ids = [model.id for model in models]
        chosen = own.get("model_type") if own.get("model_type") in ids else ids[0]
        size = f"{record.width} × {record.height}"
        return {
            self.picture: record.id,
            self.panel: gr.update(visible=True),
            self.about: f'<h2 class="zgp-heading">Upscale <span>{size}</span></h2>',
            self.model: gr.update(choices=[(model.name, model.id) for model in models], value=chosen),
            self.prompt: str(own.get("prompt", "")),
        }

    @shows_errors
    def submit(
        self, tab: str, picture: int, model_id: str, prompt: str, *values: Any
    ) -> tuple[int, str, Any]:
        """Queue the job, and close."""
        record, model = self._engine.store.image(picture), self._engine.catalog.model(model_id)
        scale, upscaler, strength, tile = values
        settings = upscale_settings(
            Path(record.path), model, scale=scale, upscaler=upscaler, strength=strength, tile=tile,
            prompt=prompt,
        )  # fmt: skip
        job_id, _ = self._engine.submit(settings, uploads=uploads(), client=tab)
        return job_id, "", gr.update(visible=False)
