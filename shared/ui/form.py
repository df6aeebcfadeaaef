"""The form: one control per entry of SETTINGS, shown only where it acts on the chosen model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import gradio as gr

from shared.engine.catalog import Catalog, ModelInfo
from shared.settings import SETTINGS, Setting
from shared.ui.examples import examples_for
from shared.ui.text import size_text

Updates = dict[Any, Any]

# What the user typed stays when the model changes; the rest follows the model.
KEPT = ("prompt", "negative_prompt", "seed", "batch_size", "image_format")
PROMPT_LINES = 3


class Form:
    """Controls, model description, example prompts and the two buttons, laid out top to bottom."""

    def __init__(self, catalog: Catalog):
        self._catalog = catalog
        model = catalog.model(catalog.default_model)
        self.controls: dict[str, Any] = {}
        self._add("model_type", model)
        self.about = gr.Markdown(about(model), elem_id="about")
        self._add("prompt", model)
        self._add("negative_prompt", model)
        with gr.Row(elem_id="examples"):
            self.examples = [gr.Button(text, size="sm", elem_classes="zgp-chip") for text in examples_for(model)]
        with gr.Row(elem_classes="zgp-pair"):
            self._add("resolution", model)
            self._add("batch_size", model)
        self._add("num_inference_steps", model)
        with gr.Row(elem_classes="zgp-seed"):
            self._add("seed", model)
            self.random_seed = gr.Button("Random", size="sm", elem_id="random-seed", min_width=72)
            self.last_seed = gr.Button("Reuse last", size="sm", elem_id="last-seed", min_width=88)
        with gr.Accordion("Advanced", open=False, elem_id="advanced"):
            for name in SETTINGS:
                if name not in self.controls:
                    self._add(name, model, info=SETTINGS[name].help)
        with gr.Row(elem_id="actions"):
            self.generate = gr.Button("Generate", variant="primary", size="lg", elem_id="generate", scale=3)
            self.cancel = gr.Button("Cancel", size="lg", elem_id="cancel", visible=False, scale=1, min_width=96)
        self._wire()

    @property
    def inputs(self) -> list[Any]:
        """The controls in the order that `read` expects their values."""
        return list(self.controls.values())

    @property
    def outputs(self) -> list[Any]:
        """Everything that `fill` may update."""
        return [*self.inputs, self.about, *self.examples]

    def read(self, values: tuple[Any, ...]) -> dict[str, Any]:
        """The settings to submit: those that act on the chosen model; an emptied field means the default."""
        given = dict(zip(self.controls, values, strict=True))
        acting = self._catalog.model(given["model_type"]).settings
        return {name: given[name] for name in acting if given[name] is not None}

    def fill(self, settings: Mapping[str, Any]) -> Updates:
        """Show these settings; whatever they leave out takes the default of their model."""
        model = self._catalog.model(settings["model_type"])
        values = {**model.defaults, **settings, "model_type": model.id}
        updates = {
            control: _update(name, model, values.get(name)) for name, control in self.controls.items()
        }
        chips = zip(self.examples, examples_for(model), strict=True)
        return {**updates, self.about: about(model), **{chip: text for chip, text in chips}}

    def _add(self, name: str, model: ModelInfo, info: str | None = None) -> None:
        setting = SETTINGS[name]
        arguments = {
            "label": setting.label,
            "info": info,
            "value": model.defaults.get(name, setting.default),
            "visible": name in model.settings,
            "elem_id": name,
        }
        builder = _BUILDERS.get(name) or (_choice if setting.choices else _BY_KIND[setting.kind])
        self.controls[name] = builder(setting, arguments)
        if name == "model_type":
            self.controls[name].choices = self._model_choices()
        if name == "resolution":
            self.controls[name].choices = [(size, size) for size in model.capabilities["resolutions"]]

    def _model_choices(self) -> list[tuple[str, str]]:
        return [(label(model), model.id) for model in self._catalog.models.values() if model.card.visible]

    def _wire(self) -> None:
        kept = [self.controls[name] for name in KEPT]

        def change_model(model_id: str, *values: Any) -> Updates:
            return self.fill({"model_type": model_id, **dict(zip(KEPT, values, strict=True))})

        gr.on(
            self.controls["model_type"].input, change_model, [self.controls["model_type"], *kept], self.outputs,
            api_visibility="private", show_progress="hidden",
        )  # fmt: skip
        for chip in self.examples:
            chip.click(None, chip, self.controls["prompt"], js="(text) => text")
        self.random_seed.click(None, None, self.controls["seed"], js="() => -1")


def label(model: ModelInfo) -> str:
    """The name, with what choosing it would download."""
    if model.available:
        return model.name
    return f"{model.name} (downloads {size_text(model.size_bytes)})" if model.size_bytes else f"{model.name} (download)"


def about(model: ModelInfo) -> str:
    """The description line; for a model that is not on disk, the files that come with the first picture."""
    if model.available:
        return model.description
    files = ", ".join(f"`{source.rsplit('/', 1)[-1]}`" for source in model.missing)
    return f"{model.description}  \nDownloaded with the first picture: {files}."


def _update(name: str, model: ModelInfo, value: Any) -> Any:
    visible = name in model.settings
    if name == "resolution":
        return gr.update(value=value, visible=visible, choices=model.capabilities["resolutions"])
    return gr.update(value=value, visible=visible) if visible else gr.update(visible=False)


# ---------------------------------------------------------------- one control per kind of setting


def _text(setting: Setting, arguments: dict[str, Any]) -> Any:
    return gr.Textbox(**arguments, max_length=int(setting.maximum) if setting.maximum else None)


def _prompt(setting: Setting, arguments: dict[str, Any]) -> Any:
    return gr.Textbox(
        **arguments, lines=PROMPT_LINES, max_lines=12, autofocus=True, placeholder="What should the picture show?"
    )


def _negative_prompt(setting: Setting, arguments: dict[str, Any]) -> Any:
    return gr.Textbox(**arguments, lines=1, max_lines=6, placeholder="What should it not show?")


def _slider(setting: Setting, arguments: dict[str, Any]) -> Any:
    return gr.Slider(setting.minimum, setting.maximum, step=setting.step, buttons=[], **arguments)


def _number(setting: Setting, arguments: dict[str, Any]) -> Any:
    return gr.Number(**arguments, precision=0)


def _choice(setting: Setting, arguments: dict[str, Any]) -> Any:
    return gr.Radio(choices=list(setting.choices), **arguments)


def _checkbox(setting: Setting, arguments: dict[str, Any]) -> Any:
    return gr.Checkbox(**arguments)


def _model(setting: Setting, arguments: dict[str, Any]) -> Any:
    return gr.Dropdown(choices=[arguments["value"]], filterable=False, **arguments)


def _resolution(setting: Setting, arguments: dict[str, Any]) -> Any:
    return gr.Dropdown(choices=[arguments["value"]], allow_custom_value=True, **{**arguments, "label": "Size"})


_BY_KIND: dict[type, Callable[[Setting, dict[str, Any]], Any]] = {
    str: _text,
    int: _slider,
    float: _slider,
    bool: _checkbox,
}
_BUILDERS: dict[str, Callable[[Setting, dict[str, Any]], Any]] = {
    "model_type": _model,
    "prompt": _prompt,
    "negative_prompt": _negative_prompt,
    "resolution": _resolution,
    "seed": _number,
}
