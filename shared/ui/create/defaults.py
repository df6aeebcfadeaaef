"""A model's defaults: what the form says becomes them, and the factory's come back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gradio as gr

from shared.engine.engine import Engine
from shared.ui.components.errors import QUIET, shows_errors
from shared.ui.components.notice import notice_html
from shared.ui.create.form import Form, Updates
from shared.ui.create.presets import changes


class Defaults:
    """Connects the two buttons, which stand below the presets."""

    def __init__(self, engine: Engine, form: Form, filled: Sequence[Any], notice: Any):
        self._engine, self._form, self._notice = engine, form, notice
        buttons: Any = form.presets.acts
        buttons.defaults(self.change, form.inputs, filled, **QUIET)

    @shows_errors
    def change(self, event: gr.EventData, *values: Any) -> Updates:
        """Save the model's defaults, or go back to the factory's."""
        if event.name == "factory":
            return self.factory(values)
        return {self._notice: self.keep(values)}

    def keep(self, values: tuple[Any, ...]) -> str:
        """Make what the form says the defaults of its model, for the page and for programs."""
        settings = self._form.read(values)
        kept = self._engine.preferences.save_defaults(settings)
        name = self._engine.catalog.model(settings["model_type"]).name
        if not kept:
            return notice_html([f"{name} keeps its factory defaults: the form says nothing else."])
        lines = changes(self._engine.catalog.model(settings["model_type"]).factory, kept)
        return notice_html([f"These are the defaults of {name} from now on.", *lines])

    def factory(self, values: tuple[Any, ...]) -> Updates:
        """Forget what was saved for the model, and show its factory defaults; what was typed stays."""
        model = self._engine.catalog.model(values[0])
        asides = self._engine.preferences.reset_defaults([model.id])
        said = [f"The saved defaults are now in {path.name}." for path in asides]
        shown = notice_html([f"{model.name} has its factory defaults.", *said])
        fresh = self._form.fill({"model_type": model.id, "prompt": self._form.read(values)["prompt"]})
        return {**fresh, self._notice: shown}
